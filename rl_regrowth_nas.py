#!/usr/bin/env python
"""Stage 2a, reference-based regrowth: a controller decides how many weights return to each layer, a reference model
which ones and with what values.

Starts from the pruned checkpoint that `main.py --m_name ... --pruner magnitude --iter_end 1` leaves. Layers stand in
the order of their SSIM drift; an episode is regrowth, a short finetuning and the validation accuracy as reward.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils import regrowth_run
from utils.regrowth_options import parse_regrowth_args, regrowth_parser
from utils.regrowth_report import report
from utils.run import open_run, script

SAVE_DIR = "rl_regrow_savedir"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = regrowth_parser(__doc__, SAVE_DIR)
    add_options(parser)
    return parse_regrowth_args(parser, argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only this method takes."""
    parser.add_argument("--reference_model", metavar="FILE|SPARSITY", help="model whose mask and weights are copied: a "
                        "checkpoint, or the sparsity of one under the root, such as 0.95; default: the dense model")


METHOD = regrowth_run.Method(name="reference", save_dir=SAVE_DIR, search_stem="rl_training_checkpoint",
                             best_file="best_allocation_{m_name}.pth", rule=lambda args: ("reference", "reference"),
                             add_options=add_options, options=("reference_model",))


def main(argv: Sequence[str] | None = None) -> None:
    """Finds an allocation, regrows by it, finetunes, reports."""
    args = parse_args(argv)
    run = open_run(args)
    outcomes = regrowth_run.regrow(run, args, METHOD)
    report(run, regrowth_run.save_folder(run, args, METHOD), outcomes)


if __name__ == "__main__":
    script(main)
