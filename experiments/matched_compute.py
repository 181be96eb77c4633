#!/usr/bin/env python
"""Does regrowth help? Arms that end at one sparsity after one number of training epochs, paired by seed.

The control prunes the dense model straight to --target_sparsity and finetunes for --finetune_epochs. Every other arm
prunes deeper, to --start_sparsity, finetunes for part of these epochs, regrows to the target by an allocation, a
selection and initial values, and finetunes for the rest. What a search trains on top is reported apart. Arms of a seed,
the control among them, share the dense model, the split and the order of the images, epoch by epoch.
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

from utils import checkpoint, plots, stage1, stage2  # noqa: E402
from utils.allocation import ALLOCATORS  # noqa: E402
from utils.common import UserError, epoch_count  # noqa: E402
from utils.controller import SearchConfig  # noqa: E402
from utils.methods import METHODS, regrowth_arguments  # noqa: E402
from utils.regrowth import INITIALISERS, SELECTORS  # noqa: E402
from utils.run import (  # noqa: E402
    ArgumentParser,
    Run,
    add_model_option,
    add_overwrite_options,
    add_run_options,
    count,
    fraction,
    open_run,
    positive_float,
    positive_int,
    script,
)
from utils.stage import ResumableTable  # noqa: E402
from utils.stage1 import Outcome, PruneStep  # noqa: E402
from utils.statistics import holm, paired_difference  # noqa: E402
from utils.training import FINETUNE_FINAL, PRETRAIN, SCHEDULES  # noqa: E402

CONTROL = "one-shot"
# An arm of two parts has its selection's published values: dense ones, but saliency's weights return at zero.
DEFAULT_VALUES = {selection: "zero" if selection == "saliency" else "reference" for selection in SELECTORS}
ARMS = {"+".join(parts[:2] if parts[2] == DEFAULT_VALUES[parts[1]] else parts): parts
        for parts in product(("rl", *ALLOCATORS), SELECTORS, INITIALISERS)}  # -> allocation, selection, values
DEFAULT_ARMS = [CONTROL, "rl+reference", "rl+saliency"]
DEFAULT_ARMS += [f"{rule}+{selection}" for rule in ("proportional", "uniform", "greedy", "random")
                 for selection in ("reference", "saliency", "random")] + ["proportional+saliency+reference"]


def arm_name(text: str) -> str:
    """An argparse type: the name of an arm, in which values that its selection has anyway may be written out."""
    names = {"+".join(parts): name for name, parts in ARMS.items()} | {name: name for name in (CONTROL, *ARMS)}
    if text not in names:
        raise argparse.ArgumentTypeError(f"'{text}' is not {CONTROL}, allocation+selection or allocation+selection+"
                                         "values, such as rl+saliency or proportional+saliency+reference")
    return names[text]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--arms", nargs="+", type=arm_name, default=DEFAULT_ARMS, metavar="ARM",
                        help=f"allocation+selection or allocation+selection+values: rl, {', '.join(ALLOCATORS)}; "
                        f"{', '.join(SELECTORS)}; {', '.join(INITIALISERS)}. Values left out are zero for saliency, "
                        "else reference, the dense weights; the control always runs")
    parser.add_argument("--num_seeds", type=positive_int, default=3, help="seeds --seed, --seed + 1, ...")
    parser.add_argument("--start_sparsity", type=fraction, default=0.99, help="sparsity that regrowth starts from")
    parser.add_argument("--target_sparsity", type=fraction, default=0.97, help="sparsity that every arm ends at")
    parser.add_argument("--max_epochs", type=positive_int, default=PRETRAIN.epochs, help="epochs of pretraining")
    parser.add_argument("--finetune_epochs", type=positive_int, default=40, help="epochs after pretraining, each arm")
    parser.add_argument("--before_share", type=fraction, default=0.5, help="share of them before regrowth")
    parser.add_argument("--finetune_lr", type=positive_float, default=FINETUNE_FINAL.lr, help="learning rate (AdamW)")
    parser.add_argument("--finetune_schedule", choices=list(SCHEDULES), default=FINETUNE_FINAL.schedule,
                        help="learning rate over the epochs of each part")
    parser.add_argument("--search_budget", type=count, default=SearchConfig.search_budget,
                        help="epochs of a search, on top; 0: no limit")
    parser.add_argument("--mini_finetune_epochs", type=epoch_count, nargs="+", default=list(SearchConfig.rungs),
                        help="epochs of an episode of a search, as of the stage-2 scripts")
    parser.add_argument("--save_dir", type=Path, help="default: matched_compute/{m_name} under --root")
    add_run_options(parser)
    add_overwrite_options(parser)
    args = parser.parse_args(argv)
    if args.target_sparsity >= args.start_sparsity:
        raise UserError(f"--target_sparsity {args.target_sparsity} is not below --start_sparsity {args.start_sparsity}")
    if not 0 < round(args.before_share * args.finetune_epochs) < args.finetune_epochs:
        raise UserError(f"--before_share {args.before_share} of {args.finetune_epochs} epochs leaves a part without "
                        "epochs")
    args.arms = [CONTROL, *(arm for arm in ARMS if arm in args.arms)]
    return args


def pruned_model(run: Run, args: argparse.Namespace, sparsity: float, epochs: int) -> Outcome:
    """The dense model of the run's seed pruned to `sparsity` at once and finetuned; both are made once and reused."""
    keep = {"resume": args.resume, "overwrite": args.overwrite}
    dense = stage1.pretrain(run, replace(PRETRAIN, epochs=args.max_epochs), **keep)
    recipe = replace(FINETUNE_FINAL, epochs=epochs, lr=args.finetune_lr, schedule=args.finetune_schedule,
                     patience=None)
    step = PruneStep("magnitude", "one-shot", 1, sparsity)
    return stage1.prune_and_finetune(run, dense, step, recipe, **keep)


def regrown_model(run: Run, args: argparse.Namespace, arm: str, epochs_before: int) -> Outcome:
    """The model that an arm other than the control ends with."""
    allocation, selection, values = ARMS[arm]
    published = (selection, values) == ("reference", "reference")
    method = METHODS["reference" if published else "saliency"]
    pruned_model(run, args, args.start_sparsity, epochs_before)
    after = args.finetune_epochs - epochs_before
    options = regrowth_arguments(
        m_name=args.m_name, allocation=allocation,
        start_sparsity=args.start_sparsity, target_sparsity=args.target_sparsity, finetune_epochs=after,
        patience=after + 1, finetune_lr=args.finetune_lr, finetune_schedule=args.finetune_schedule,
        search_budget=args.search_budget, mini_finetune_epochs=args.mini_finetune_epochs, root=run.root,
        save_dir=run.root / arm, resume="latest" if args.resume else None, overwrite=args.overwrite,
        selection=selection, init_strategy=values)
    return stage2.regrow(run, options, method, passes=epochs_before)[-1]


def measure(run: Run, args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """A row of the table: one arm with one seed."""
    before = round(args.before_share * args.finetune_epochs)
    outcome = (pruned_model(run, args, args.target_sparsity, args.finetune_epochs) if arm == CONTROL
               else regrown_model(run, args, arm, before))
    stage1.read_test(run, [outcome])
    card = outcome.card
    return {"arm": arm, "seed": seed, "sparsity": card["sparsity"], "surviving": card["surviving"],
            "val_acc": card["val_acc"], "test_acc": card["test_acc"], "epochs": args.finetune_epochs,
            "search_epochs": card.get("search_epochs", 0), "seconds": card["seconds"], "dataset": run.data_label}


def compare(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """A row per arm: paired difference of test accuracy to the control, verdict, p adjusted for all arms (Holm)."""
    by_key = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    results = []
    for arm in arms:
        pairs = [(by_key[arm, seed]["test_acc"], by_key[CONTROL, seed]["test_acc"]) for seed in seeds
                 if (arm, seed) in by_key and (CONTROL, seed) in by_key]
        if arm != CONTROL and pairs:
            own = [row for row in rows if row["arm"] == arm]
            results.append({"arm": arm, **paired_difference(*zip(*pairs)),
                            "search_epochs": sum(row["search_epochs"] for row in own) / len(own)})
    for result, adjusted in zip(results, holm([row["p"] for row in results])):
        result["p_holm"] = adjusted
    return results


def print_verdicts(results: Sequence[dict[str, Any]]) -> None:
    """A line per arm."""
    for row in results:
        print(f"{row['arm']:<24} {row['mean']:+6.2f} points [{row['t_low']:+.2f}, {row['t_high']:+.2f}] against "
              f"one-shot: {row['verdict']} at {row['pairs']} seeds (p {row['p']:.3f}, Holm {row['p_holm']:.3f}; "
              f"smallest effect that would have shown: {row['detectable']:.2f})")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, seed by seed, then compares, draws and says what came out."""
    args = parse_args(argv)
    root, first = args.root, args.seed
    folder = args.save_dir or root / "matched_compute" / args.m_name
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
              if key not in ("arms", "num_seeds", "save_dir", "root", "resume", "overwrite", "data_dir", "device")}
    table = ResumableTable(folder / "runs.csv", ("arm", "seed"), config, resume=args.resume, overwrite=args.overwrite)
    for seed in range(first, first + args.num_seeds):
        args.seed, args.root = seed, folder / f"seed_{seed}"
        run = open_run(args)
        for number, arm in enumerate(args.arms, 1):
            if not table.has(arm, seed):
                turn = f"({seed - first + 1} of {args.num_seeds})"
                print(f"\nseed {seed} {turn}, arm {arm} ({number} of {len(args.arms)})", flush=True)
                table.add(measure(run, args, arm, seed), run.card())
    results = compare(table.rows, [arm for arm in ARMS if any(row["arm"] == arm for row in table.rows)])
    if results:
        checkpoint.save_csv(results, folder / "verdicts.csv")
        plots.plot_differences(results, folder / "verdicts.png", f"{args.m_name}, sparsity {args.target_sparsity}, "
                               f"{args.finetune_epochs} epochs after pretraining")
        print_verdicts(results)
    print(f"runs, verdicts and figure: {folder}")


if __name__ == "__main__":
    script(main)
