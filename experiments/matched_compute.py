#!/usr/bin/env python
"""Which way to a sparse network is best? Arms that end at one sparsity after as many training epochs, paired by seed.

The control prunes the dense model straight to --sparsity and finetunes for --finetune_epochs. An arm of a mask schedule
moves the mask during these epochs. Every other arm prunes deeper, to --start_sparsity, finetunes for part of the
epochs, regrows to --sparsity by an allocation, a selection and initial values, and finetunes for the rest; what a
search trains on top is reported apart. Arms of a seed share dense model, recipe, split and order of the images.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from experiments.rows import make_rows, trained  # noqa: E402
from utils import checkpoint, plots, stage1, stage2  # noqa: E402
from utils.allocation import ALLOCATORS  # noqa: E402
from utils.common import UserError, count, epoch_count, fraction, needed, positive_int  # noqa: E402
from utils.controller import SearchConfig  # noqa: E402
from utils.mask_schedule import MASK_SCHEDULES, plan_fields  # noqa: E402
from utils.methods import regrowth_arguments  # noqa: E402
from utils.pruning import PRUNERS  # noqa: E402
from utils.regrowth import INITIALISERS, SELECTORS  # noqa: E402
from utils.run import Run, add_recipe_numbers, recipe_changes, run_parser, script  # noqa: E402
from utils.stage1 import Outcome  # noqa: E402
from utils.statistics import compare_arms  # noqa: E402
from utils.training import RECIPES, Recipe  # noqa: E402

CONTROL = "one-shot"
# Arms that move the mask while they train: schedule[+rule[+allocation]], what is left out being the schedule's own
CHOICES = [(), *product(SELECTORS), *product(SELECTORS, ("layer", "global", *ALLOCATORS))]
MOVING = {"+".join((name, *choice)): plan_fields(name, **dict(zip(("regrow_rule", "regrow_allocation"), choice)))
          for name, row in MASK_SCHEDULES.items() for choice in CHOICES
          if not choice or "regrow_rule" not in row.ignores}
# Arms that regrow once: allocation+selection[+values]; of two parts with the selection's published values
DEFAULT_VALUES = {selection: "zero" if selection == "saliency" else "reference" for selection in SELECTORS}
REGROWN = {"+".join(parts[:2] if parts[2] == DEFAULT_VALUES[parts[1]] else parts): parts
           for parts in product(("rl", *ALLOCATORS), SELECTORS, INITIALISERS)}  # -> allocation, selection, values
ARMS = [CONTROL, *MOVING, *REGROWN]
DEFAULT_ARMS = [CONTROL, *MASK_SCHEDULES, "rl+reference", "rl+saliency", "proportional+reference",
                "proportional+saliency", "proportional+saliency+reference", "proportional+random"]


def arm_name(text: str) -> str:
    """An argparse type: the name of an arm, in which values that its selection has anyway may be written out."""
    names = {"+".join(parts): name for name, parts in REGROWN.items()} | {name: name for name in ARMS}
    if text not in names:
        raise argparse.ArgumentTypeError(f"'{text}' is not {CONTROL}, schedule[+rule[+allocation]] such as "
                                         "bidirectional+gradient, or allocation+selection[+values] such as rl+saliency")
    return names[text]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--arms", nargs="+", type=arm_name, default=DEFAULT_ARMS, metavar="ARM",
                        help=f"schedule[+rule[+allocation]]: {', '.join(MASK_SCHEDULES)}; {', '.join(SELECTORS)}; "
                        f"layer, global, {', '.join(ALLOCATORS)}. Or allocation+selection[+values]: rl or a rule of "
                        f"these; {', '.join(INITIALISERS)}, where values left out are zero for saliency, else "
                        "reference, the dense weights. The control always runs")
    parser.add_argument("--against", type=arm_name, default=CONTROL, metavar="ARM",
                        help="arm that verdicts compare the others with; it runs, too")
    parser.add_argument("--sparsity", "--target_sparsity", type=fraction, nargs="+", default=[0.97],
                        help="sparsities that every arm ends at")
    parser.add_argument("--start_sparsity", type=fraction, default=0.99,
                        help="sparsity that the arms that regrow once start from; they end at those below it only")
    parser.add_argument("--pruner", choices=[name for name, rule in PRUNERS.items() if not needed(rule)],
                        help="which weights go, in every arm (default: magnitude)")
    parser.add_argument("--num_seeds", type=positive_int, default=3, help="seeds --seed, --seed + 1, ...")
    parser.add_argument("--recipe", choices=list(RECIPES), default="published", help="of every training")
    parser.add_argument("--max_epochs", type=positive_int, help="epochs of pretraining (default: the recipe's)")
    parser.add_argument("--finetune_epochs", type=positive_int, default=40, help="epochs after pretraining, each arm")
    parser.add_argument("--before_share", type=fraction, default=0.5, help="share of them before regrowth")
    add_recipe_numbers(parser, "finetune_", "final")
    parser.add_argument("--finetune_batch_size", type=positive_int, help="default: the recipe's")
    parser.set_defaults(patience=None)
    parser.add_argument("--search_budget", type=count, default=SearchConfig.search_budget,
                        help="epochs of a search, on top; 0: no limit")
    parser.add_argument("--mini_finetune_epochs", type=epoch_count, nargs="+", default=list(SearchConfig.rungs),
                        help="epochs of an episode of a search, as of the stage-2 scripts")
    parser.add_argument("--save_dir", type=Path, help="default: matched_compute/{m_name} under --root")
    args = parser.parse_args(argv)
    args.arms = [CONTROL, *(arm for arm in ARMS[1:] if arm in {*args.arms, args.against})]
    args.sparsity, args.pruner = sorted(set(args.sparsity)), None if args.pruner == "magnitude" else args.pruner
    once = [arm for arm in args.arms if arm in REGROWN]
    if once and min(args.sparsity) >= args.start_sparsity:
        raise UserError(f"{once[0]} makes a model denser, and --sparsity {min(args.sparsity)} is not below "
                        f"--start_sparsity {args.start_sparsity}")
    if once and not 0 < round(args.before_share * args.finetune_epochs) < args.finetune_epochs:
        raise UserError(f"arms that regrow once, such as {once[0]}, train before and after; --finetune_epochs "
                        f"{args.finetune_epochs} with --before_share {args.before_share} leaves a part without epochs")
    if any(REGROWN[arm][0] == "rl" for arm in once):  # raises where the budget pays no batch
        SearchConfig(rungs=tuple(args.mini_finetune_epochs), search_budget=args.search_budget or None).ladder()
    return args


def finetuning(args: argparse.Namespace, epochs: int) -> Recipe:
    """The recipe of a training after the dense model's; no arm stops early."""
    recipe = replace(RECIPES[args.recipe].final, **recipe_changes(args, "finetune_"))
    return replace(recipe, epochs=epochs, patience=None)


def dense_model(run: Run, args: argparse.Namespace) -> Outcome:
    """The dense model of the run's seed; if it is made already, it is reused."""
    pretrain = RECIPES[args.recipe].pretrain
    return stage1.pretrain(run, replace(pretrain, epochs=args.max_epochs or pretrain.epochs))


def common_models(run: Run, args: argparse.Namespace) -> None:
    """What the rows of a seed begin with; UserError, before anything is trained, where one of them cannot be made."""
    once, pruner = not {*args.arms}.isdisjoint(REGROWN), args.pruner or "magnitude"
    steps = [step for arm in args.arms if arm not in REGROWN
             for step in stage1.sweep_steps(pruner, args.sparsity, MOVING.get(arm))]
    steps += stage1.sweep_steps(pruner, [args.start_sparsity]) if once else []
    stage1.check_steps(run, steps, "--sparsity", finetuning(args, 1))
    dense_model(run, args)
    if once:
        pruned_model(run, args, args.start_sparsity, round(args.before_share * args.finetune_epochs))


def pruned_model(run: Run, args: argparse.Namespace, sparsity: float, epochs: int, arm: str = CONTROL) -> Outcome:
    """The dense model of the run's seed pruned to `sparsity`, at once or by the arm's mask schedule, while or before it
    is trained for so many epochs; what is made already is reused."""
    step, = stage1.sweep_steps(args.pruner or "magnitude", [sparsity], MOVING.get(arm))
    own = replace(run, root=run.root / f"{arm}_{epochs}")  # files are named by their sparsity only
    return stage1.prune_and_finetune(own, dense_model(run, args), step, finetuning(args, epochs))


def regrown_models(run: Run, args: argparse.Namespace, arm: str, sparsity: float, before: int) -> list[Outcome]:
    """The model that an arm which regrows once starts from, and the one that it ends with."""
    allocation, selection, values = REGROWN[arm]
    published = (selection, values) == ("reference", "reference")
    start = pruned_model(run, args, args.start_sparsity, before)
    options = regrowth_arguments(
        "reference" if published else "saliency", m_name=args.m_name, recipe=args.recipe, allocation=allocation,
        start_sparsity=args.start_sparsity, starting_checkpoint=str(start.artifact), target_sparsity=sparsity,
        search_budget=args.search_budget, mini_finetune_epochs=args.mini_finetune_epochs, root=run.root,
        save_dir=run.root / f"{arm}_{checkpoint.format_sparsity(sparsity)}",
        selection=selection, init_strategy=values)
    recipe = finetuning(args, args.finetune_epochs - before)
    options.finetuning = replace(recipe, patience=recipe.epochs + 1)
    return stage2.regrow(run, options, passes=before)


def measure(run: Run, args: argparse.Namespace, arm: str, sparsity: float) -> dict[str, Any]:
    """A row of the table: one arm with the run's seed; seconds are those of training after pretraining."""
    if arm in REGROWN:
        models = regrown_models(run, args, arm, sparsity, round(args.before_share * args.finetune_epochs))
    else:
        models = [pruned_model(run, args, sparsity, args.finetune_epochs, arm)]
    training, card = trained(models), models[-1].card
    stage1.read_test(run, models[-1:])
    return {"arm": arm, "target": sparsity, "seed": run.seed, "sparsity": card["sparsity"],
            "surviving": card["surviving"], "val_acc": card["val_acc"], "test_acc": card["test_acc"],
            "epochs": training["epochs"], "search_epochs": card.get("search_epochs", 0),
            "seconds": training["seconds"], "dataset": run.data_label}


def report(rows: Sequence[dict[str, Any]], against: str, folder: Path, title: str) -> None:
    """Verdicts as a table, a figure for each sparsity, and a line for each arm."""
    results = compare_arms(rows, against, ARMS)
    stem, named = ("verdicts", "one-shot pruning") if against == CONTROL else (f"verdicts_against_{against}", against)
    if results:
        checkpoint.save_csv(results, folder / f"{stem}.csv")
    for target in sorted({row["target"] for row in results}):
        own = [row for row in results if row["target"] == target]
        plots.plot_differences(own, folder / f"{stem}_{target}.png", f"{title}, sparsity {target}", named)
        for row in own:
            print(f"{target} {row['arm']:<24} {row['mean']:+6.2f} points against {against}: {row['verdict']}" + (
                f" at {row['pairs']} seeds [{row['t_low']:+.2f}, {row['t_high']:+.2f}] (p {row['p']:.3f}, Holm "
                f"{row['p_holm']:.3f}; smallest effect that would have shown: {row['detectable']:.2f})"
                if row["pairs"] > 1 else ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then compares, draws and says what came out."""
    args = parse_args(argv)
    folder = args.save_dir or args.root / "matched_compute" / args.m_name
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
              if key not in ("arms", "against", "sparsity", "seed", "num_seeds", "save_dir", "root", "resume",
                             "overwrite", "data_dir", "device")}  # the rest decides what a row holds
    config["schedules"] = {arm: MOVING[arm] for arm in args.arms if arm in MOVING}  # so do their defaults
    keys = [(arm, sparsity, seed) for seed in range(args.seed, args.seed + args.num_seeds) for sparsity in args.sparsity
            for arm in args.arms if arm not in REGROWN or sparsity < args.start_sparsity]
    rows = make_rows(args, folder, config, ("arm", "target", "seed"), [[key] for key in keys],
                     lambda run: common_models(run, args), lambda run, *key: measure(run, args, *key))
    if not rows:  # the leader has them
        return
    report(rows, args.against, folder, f"{args.m_name}, {args.finetune_epochs} epochs after pretraining")
    print(f"runs, verdicts and figures: {folder}")


if __name__ == "__main__":
    script(main, several=True)
