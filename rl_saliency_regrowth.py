#!/usr/bin/env python
"""Stage 2b, saliency-based regrowth: a controller decides how many weights return to each layer, their saliency
(gradient squared times weight squared) which ones.

Starts from the pruned checkpoint that `main.py --m_name ... --pruner magnitude --iter_end 1` leaves. Layers stand in
the order of their SSIM drift; an episode is regrowth, a short finetuning and the validation accuracy as reward.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

from utils import regrowth_run
from utils.regrowth import INITIALISERS, SELECTORS, Evidence, SaliencyComputer, WeightRegrowth
from utils.regrowth_options import parse_regrowth_args, regrowth_parser
from utils.regrowth_report import report
from utils.run import Run, open_run, positive_int, script
from utils.seeding import derive_seed

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
                        help="batches of 128 training images over which saliency is averaged")


def prepare(run: Run, args: argparse.Namespace, pruned: nn.Module, dense: nn.Module) -> regrowth_run.Regrower:
    """Computes saliency (and gradients) once, on un-augmented training images; what ranks highest returns."""
    computer = SaliencyComputer(dense if args.saliency_source == "dense" else pruned, run.train.unaugmented(128),
                                precision=run.precision, max_batches=args.saliency_max_batches,
                                source=args.saliency_source)
    saliency, seed = computer.compute(), derive_seed(run.seed, "regrowth")
    evidence = Evidence(saliency=saliency, gradient=computer.gradients, reference=dense)
    return lambda model: WeightRegrowth(model, args.selection, evidence, args.init_strategy, seed)


METHOD = regrowth_run.Method(name="saliency", save_dir=SAVE_DIR, search_stem="saliency_rl_checkpoint",
                             best_file="best_saliency_allocation.pth", prepare=prepare,
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
