#!/usr/bin/env python
"""Stage 2b, saliency-based regrowth: a controller decides how many weights return to each layer, their saliency
(gradient squared times weight squared) which ones.

Starts from the pruned checkpoint that `main.py --m_name ... --pruner magnitude --iter_end 1` leaves. Layers stand in
the order of their SSIM drift; an episode is regrowth, a short finetuning and the validation accuracy as reward.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils import regrowth_run
from utils.regrowth import INITIALISERS, SELECTORS
from utils.regrowth_options import parse_regrowth_args, regrowth_parser
from utils.regrowth_report import report
from utils.run import open_run, positive_int, script

SAVE_DIR = "rl_saliency_regrow_savedir"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = regrowth_parser(__doc__, SAVE_DIR)
    add_options(parser)
    return parse_regrowth_args(parser, argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only this method takes."""
    parser.add_argument("--selection", choices=list(SELECTORS), default="saliency",
                        help="rule that chooses the weights within a layer")
    parser.add_argument("--init_strategy", choices=list(INITIALISERS), default="zero",
                        help="values that weights return with")
    parser.add_argument("--saliency_source", choices=["dense", "pruned"], default="dense",
                        help="model that saliency is computed on")
    parser.add_argument("--saliency_max_batches", type=positive_int, default=50,
                        help="batches of 128 training images that saliency or gradients are averaged over")


METHOD = regrowth_run.Method(name="saliency", save_dir=SAVE_DIR, search_stem="saliency_rl_checkpoint",
                             best_file="best_saliency_allocation.pth",
                             rule=lambda args: (args.selection, args.init_strategy),
                             add_options=add_options,
                             options=("selection", "init_strategy", "saliency_source", "saliency_max_batches"))


def main(argv: Sequence[str] | None = None) -> None:
    """Finds an allocation, regrows by it, finetunes, reports."""
    args = parse_args(argv)
    run = open_run(args)
    outcomes = regrowth_run.regrow(run, args, METHOD)
    report(run, regrowth_run.save_folder(run, args, METHOD), outcomes)


if __name__ == "__main__":
    script(main)
