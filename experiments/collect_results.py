#!/usr/bin/env python
"""Gathers what several runs left under their roots into one table and one figure: the pruning curves of all roots and
an arrow for each regrown model. Runs that differ in nothing but the seed become one line through their mean; others of
the same pruner, or of the same method and allocation, are told apart by their folder. Trains nothing.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from experiments.gathered import Model, gather, listed  # noqa: E402
from utils import checkpoint, plots  # noqa: E402
from utils.run import ArgumentParser, add_model_option, script  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--roots", type=Path, nargs="+", default=[Path(".")], help="--root of the runs to gather")
    parser.add_argument("--save_dir", type=Path, default=Path("results"), help="where the tables and the figure go")
    parser.add_argument("--name", default="bidirectional", help="file name of the figure and beginning of the tables'")
    return parser.parse_args(argv)


def print_table(models: Sequence[Model]) -> None:
    """A line per model: how it was made, seed, sparsity, accuracy on validation and test."""
    width = max(len(model.name) for model in models)
    print(f"{'model':<{width}} {'seed':>5} {'sparsity %':>10} {'val %':>8} {'test %':>8}")
    for model in models:
        row = model.row
        test = f"{float(row['test_acc']):8.2f}" if row["test_acc"] != "" else f"{'-':>8}"
        print(f"{model.name:<{width}} {row['seed']:>5} {100 * model.sparsity:>10.10g} "
              f"{float(row['val_acc']):8.2f} {test}")


def print_lacking(models: Sequence[Model]) -> None:
    """Says which models keep the figure from showing test accuracy, if only some of them do."""
    lacking = [f"{model.name} at {100 * model.sparsity:.10g} %" if "pruner" in model.row
               else f"{model.name} or its start" for model in models if plots.lacks_test(model.row)]
    if 0 < len(lacking) < len(models):
        print(f"the figure shows validation accuracy for all, since {len(lacking)} of {len(models)} models lack a test "
              f"accuracy: {listed(list(dict.fromkeys(lacking)))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Gathers, writes, says where."""
    args = parse_args(argv)
    pruned, regrown = gather(args.roots, args.m_name)
    pruning_rows, regrowth_rows = [model.row for model in pruned], [model.row for model in regrown]
    figure = args.save_dir / f"{args.name}.png"
    checkpoint.save_csv(pruning_rows, args.save_dir / f"{args.name}_pruning.csv")
    if regrown:
        checkpoint.save_csv(regrowth_rows, args.save_dir / f"{args.name}_regrowth.csv")
    plots.plot_bidirectional(pruning_rows, regrowth_rows, figure, f"{args.m_name} on {pruning_rows[0]['dataset']}")
    print_table([*pruned, *regrown])
    print_lacking([*pruned, *regrown])
    print(f"{len(pruned)} pruned or dense and {len(regrown)} regrown models: {figure}, tables in {args.save_dir}")


if __name__ == "__main__":
    script(main, resumable=False)
