#!/usr/bin/env python
"""The published tables of arXiv 2511.11675 beside ours: setting A (ten iterations at 0.4), setting B (one-shot), and
regrowth from 0.99 to 0.98 .. 0.95. Prints ours beside the published figure with the difference.

Ours chooses on validation, never augments it, and hits sparsities exactly; the published figures were chosen on the
test set. The published rows are VGG16's; for another --m_name their columns stay empty. Models are kept as they finish,
and so are rows; those of setting A are entered together, seed by seed.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from experiments.rows import make_rows, trained  # noqa: E402
from utils import checkpoint, plots, stage1, stage2  # noqa: E402
from utils.allocation import ALLOCATORS  # noqa: E402
from utils.common import UserError  # noqa: E402
from utils.methods import METHODS, regrowth_arguments  # noqa: E402
from utils.run import Run, count, positive_float, positive_int, run_parser, script  # noqa: E402
from utils.stage1 import Outcome, PruneStep  # noqa: E402
from utils.training import FINETUNE_FINAL, FINETUNE_ITERATIVE, FINETUNE_ONE_SHOT, PRETRAIN  # noqa: E402

PUBLISHED_MODEL = "vgg16"
# setting -> sparsity -> test accuracy in %, mean and standard deviation (None: not given); arXiv 2511.11675
PUBLISHED: dict[str, dict[float, tuple[float, float | None]]] = {
    "A": {0.4: (92.09, 0.28), 0.64: (92.43, 0.12), 0.784: (92.60, 0.15), 0.8704: (92.68, 0.18), 0.9222: (92.68, 0.19),
          0.9533: (92.49, 0.26), 0.972: (92.35, 0.02), 0.9832: (91.92, 0.09), 0.9899: (91.01, 0.05),
          0.994: (90.31, 0.18)},
    "B": {0.95: (92.43, 0.10), 0.96: (92.41, 0.22), 0.97: (92.27, 0.06), 0.98: (91.93, 0.17), 0.99: (91.03, 0.17),
          0.995: (89.53, 0.10), 0.999: (81.08, 0.85)},
    "R": {0.98: (92.33, None), 0.97: (92.41, None), 0.96: (92.57, None), 0.95: (92.73, None)},
}
START = 0.99  # sparsity that regrowth starts from
AMOUNT = 0.4  # of setting A
ENTRIES = {f"{setting}:{checkpoint.format_sparsity(sparsity)}": (setting, sparsity)  # by what `--rows` calls it
           for setting in ("B", "A", "R") for sparsity in PUBLISHED[setting]}


def chosen_entries(words: Sequence[str]) -> list[str]:
    """The rows that words like ``B`` (all of a setting) or ``A:0.64`` name, in the tables' order; else UserError."""
    for word in words:
        if word not in (*ENTRIES, *PUBLISHED):
            raise UserError(f"--rows {word} is no row; take {', '.join(PUBLISHED)} or one of "
                            f"{', '.join(ENTRIES)}")
    return [entry for entry, (setting, _) in ENTRIES.items() if entry in words or setting in words]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__, model=PUBLISHED_MODEL, seed=False)
    parser.add_argument("--rows", nargs="+", default=list(PUBLISHED), metavar="ROW",
                        help="A, B, R (all of a setting) or single ones such as B:0.99")
    parser.add_argument("--seeds", type=count, nargs="+", default=[0, 1, 2], help="each a training of its own")
    parser.add_argument("--max_epochs", type=positive_int, default=PRETRAIN.epochs, help="epochs of pretraining")
    parser.add_argument("--lr", type=positive_float, default=PRETRAIN.lr, help="learning rate of pretraining")
    parser.add_argument("--iterative_epochs", type=count, default=FINETUNE_ITERATIVE.epochs,
                        help="epochs after each pruning of setting A")
    parser.add_argument("--finetune_epochs", type=count, default=FINETUNE_ONE_SHOT.epochs,
                        help="epochs after one-shot pruning, and after regrowth")
    parser.add_argument("--finetune_lr", type=positive_float, default=FINETUNE_FINAL.lr, help="of both (AdamW)")
    parser.add_argument("--method", choices=list(METHODS), default="reference", help="of regrowth")
    parser.add_argument("--allocation", choices=["rl", *ALLOCATORS], default="rl", help="of regrowth")
    parser.add_argument("--search_budget", type=count, default=60, help="epochs of a search; 0: no limit")
    parser.add_argument("--save_dir", type=Path, help="default: vgg16_tables/{m_name} under --root")
    args = parser.parse_args(argv)
    if args.allocation != "rl" and args.search_budget != parser.get_default("search_budget"):
        raise UserError(f"--search_budget is for the search, which --allocation {args.allocation} does without; leave "
                        "it out, or take --allocation rl")
    args.entries, args.seeds = chosen_entries(args.rows), sorted(set(args.seeds))
    if any(ENTRIES[entry][0] == "R" for entry in args.entries):
        options_of_regrowth(args, START - 0.01)  # raises on what contradicts itself, before anything is trained
    return args


def options_of_regrowth(args: argparse.Namespace, sparsity: float, **more: Any) -> argparse.Namespace:
    """What the script of `--method` would read for regrowth from 0.99 to this sparsity; more: of one run."""
    return regrowth_arguments(
        args.method, m_name=args.m_name, allocation=args.allocation, start_sparsity=START, target_sparsity=sparsity,
        finetune_epochs=args.finetune_epochs, finetune_lr=args.finetune_lr, search_budget=args.search_budget, **more)


# --- one row: the models on the way to its own, which is the last ---------------------------------------------------


def one_shot(run: Run, args: argparse.Namespace, dense: Outcome, sparsity: float) -> list[Outcome]:
    """Setting B: the dense model pruned at once and finetuned."""
    recipe = replace(FINETUNE_ONE_SHOT, epochs=args.finetune_epochs, lr=args.finetune_lr)
    step = PruneStep("magnitude", "one-shot", 1, sparsity)
    return [stage1.prune_and_finetune(run, dense, step, recipe)]


def iterative(run: Run, args: argparse.Namespace, dense: Outcome, sparsity: float) -> list[Outcome]:
    """Setting A: the iteration that ends at this sparsity, and those before it."""
    steps = stage1.iterative_steps("magnitude", AMOUNT, 1, len(PUBLISHED["A"]))
    last = min(steps, key=lambda step: abs(step.sparsity - sparsity))
    recipe = replace(FINETUNE_ITERATIVE, epochs=args.iterative_epochs, lr=args.finetune_lr)
    return stage1.prune_steps(run, dense, steps[:last.iteration], recipe)


def regrown(run: Run, args: argparse.Namespace, dense: Outcome, sparsity: float) -> list[Outcome]:
    """Regrowth from the one-shot 0.99 model."""
    folder = run.root / f"regrown_{checkpoint.format_sparsity(sparsity)}"
    return stage2.regrow(run, options_of_regrowth(args, sparsity, root=run.root, seed=run.seed, save_dir=folder))


SETTINGS = {"A": iterative, "B": one_shot, "R": regrown}


def prepare(run: Run, args: argparse.Namespace) -> Outcome:
    """The dense model, and where something regrows the model it starts from: what the rows of a seed share."""
    recipe = replace(PRETRAIN, epochs=args.max_epochs, lr=args.lr)
    dense = stage1.pretrain(run, recipe)
    if any(ENTRIES[entry][0] == "R" for entry in args.entries):
        one_shot(run, args, dense, START)
    return dense


def measure(run: Run, args: argparse.Namespace, entry: str) -> dict[str, Any]:
    """Makes (or reuses) the model of a row with the run's seed and reads its test accuracy; epochs and seconds count
    from the dense model."""
    setting, sparsity = ENTRIES[entry]
    models = SETTINGS[setting](run, args, prepare(run, args), sparsity)
    training, card = trained(models), models[-1].card
    stage1.read_test(run, models[-1:])
    return {"row": entry, "seed": run.seed, "sparsity": card["sparsity"], "surviving": card["surviving"],
            "val_acc": card["val_acc"], "test_acc": card["test_acc"], "epochs": training["epochs"],
            "search_epochs": card.get("search_epochs", 0), "seconds": training["seconds"], "dataset": run.data_label}


# --- beside the published figures ---------------------------------------------------------------------------------


def beside_published(rows: Sequence[dict[str, Any]], m_name: str) -> list[dict[str, Any]]:
    """A row per measured entry: ours (mean, standard deviation, seeds), published, difference, whether it lies within
    the published standard deviation. Nothing unmeasured is in it."""
    results = []
    for entry, (setting, sparsity) in ENTRIES.items():
        values = [row["test_acc"] for row in rows if row["row"] == entry]
        if not values:
            continue
        mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else ""
        result = {"row": entry, "sparsity": sparsity, "seeds": len(values), "mean": mean, "std": std,
                  "published": "", "published_std": "", "difference": "", "within_published_spread": ""}
        if m_name == PUBLISHED_MODEL:
            published, spread = PUBLISHED[setting][sparsity]
            result |= {"published": published, "difference": mean - published}
            if spread is not None:
                result |= {"published_std": spread, "within_published_spread": int(abs(mean - published) <= spread)}
        results.append(result)
    return results


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """A line per row: ours beside the published figure."""
    print(f"\n{'row':<10} {'ours (test %)':>16} {'seeds':>6} {'published':>16} {'difference':>11}")
    for row in results:
        ours = f"{row['mean']:.2f}" + (f" ± {row['std']:.2f}" if row["std"] != "" else "")
        published = "-" if row["published"] == "" else f"{row['published']:.2f}"
        published += f" ± {row['published_std']:.2f}" if row["published_std"] != "" else ""
        difference = f"{row['difference']:+.2f}" if row["difference"] != "" else "-"
        within = {1: "  within its spread", 0: "  outside its spread", "": ""}[row["within_published_spread"]]
        print(f"{row['row']:<10} {ours:>16} {row['seeds']:>6} {published:>16} {difference:>11}{within}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and puts it beside the published tables."""
    args = parse_args(argv)
    folder = args.save_dir or args.root / "vgg16_tables" / args.m_name
    config = {key: getattr(args, key) for key in ("m_name", "max_epochs", "lr", "iterative_epochs", "finetune_epochs",
                                                  "finetune_lr", "method", "allocation", "search_budget", "dataset",
                                                  "val_split")}
    chained = [entry for entry in args.entries if ENTRIES[entry][0] == "A"]  # each from the iteration before
    alone = [[entry] for entry in args.entries if entry not in chained]
    groups = [[(entry, seed) for entry in group] for seed in args.seeds for group in (chained, *alone) if group]
    rows = make_rows(args, folder, config, ("row", "seed"), groups, lambda run: prepare(run, args),
                     lambda run, entry: measure(run, args, entry))
    if not rows:  # the leader has them
        return
    results = beside_published(rows, args.m_name)
    checkpoint.save_csv(results, folder / "tables.csv")
    label = f"{args.m_name} on {rows[0]['dataset']}"
    plots.plot_tables(results, folder / "tables.png", label)
    print(f"\n{label}")
    print_table(results)
    print(f"runs, table and figure: {folder}")


if __name__ == "__main__":
    script(main, several=True)
