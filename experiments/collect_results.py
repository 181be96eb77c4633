#!/usr/bin/env python
"""Gathers what several runs left under their roots into one table and one figure: the pruning curves of all roots and
an arrow for each regrown model. Trains nothing.
"""
from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import pipeline, plots  # noqa: E402
from utils.checkpoint import save_csv  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.run import ArgumentParser, add_model_option, script  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--roots", type=Path, nargs="+", default=[Path(".")], help="--root of the runs to gather")
    parser.add_argument("--save_dir", type=Path, default=Path("results"), help="where the tables and the figure go")
    parser.add_argument("--name", default="bidirectional", help="file name of the figure and beginning of the tables'")
    return parser.parse_args(argv)


def pruning_rows(roots: Sequence[Path], m_name: str) -> list[dict[str, Any]]:
    """Rows of all roots by pruner and sparsity; a dense model that several roots share stands there once."""
    rows = [row for root in roots for row in pipeline.summary_rows(root, m_name)]
    unique = {tuple(row.items()): row for row in rows}.values()
    return sorted(unique, key=lambda row: (row["pruner"] != "none", row["pruner"], row["schedule"], row["sparsity"]))


def regrowth_rows(roots: Sequence[Path], m_name: str) -> list[dict[str, str]]:
    """Rows of every regrowth_results.csv of the model under the roots, by sparsity, method and allocation."""
    tables = sorted(path for root in roots for path in root.rglob("regrowth_results.csv"))
    rows = [row for table in tables for row in csv.DictReader(table.read_text().splitlines())
            if row["checkpoint"].startswith(f"regrown_{m_name}_")]
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name, "") for name in columns} for row in rows]  # tables of earlier versions have fewer
    return sorted(rows, key=lambda row: (row["sparsity"], row["method"], row["allocation"], row["seed"]))


def print_table(pruning: Sequence[dict[str, Any]], regrown: Sequence[dict[str, str]]) -> None:
    """A line per model: how it was made, sparsity, accuracy on validation and test."""
    lines = [(f"{row['pruner']} {row['schedule']}".strip().replace("none", "dense"), row) for row in pruning]
    lines += [(f"regrown: {row['method']}, {plots.allocation_name(row)}", row) for row in regrown]
    print(f"{'model':<36} {'sparsity %':>10} {'val %':>8} {'test %':>8}")
    for name, row in lines:
        test = f"{float(row['test_acc']):8.2f}" if row["test_acc"] != "" else f"{'-':>8}"
        print(f"{name:<36} {100 * float(row['sparsity']):10.2f} {float(row['val_acc']):8.2f} {test}")


def main(argv: Sequence[str] | None = None) -> None:
    """Gathers, writes, says where."""
    args = parse_args(argv)
    pruning, regrown = pruning_rows(args.roots, args.m_name), regrowth_rows(args.roots, args.m_name)
    if not pruning:
        raise UserError(f"no run cards of {args.m_name} under {', '.join(map(str, args.roots))}; run main.py first")
    figure = args.save_dir / f"{args.name}.png"
    save_csv(pruning, args.save_dir / f"{args.name}_pruning.csv")
    if regrown:
        save_csv(regrown, args.save_dir / f"{args.name}_regrowth.csv")
    plots.plot_bidirectional(pruning, regrown, figure, title=f"{args.m_name} on {pruning[0]['dataset']}")
    print_table(pruning, regrown)
    print(f"{len(pruning)} pruned or dense and {len(regrown)} regrown models: {figure}, tables in {args.save_dir}")


if __name__ == "__main__":
    script(main, resumable=False)
