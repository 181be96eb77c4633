#!/usr/bin/env python
"""Iterative layerwise pruning (LAMP, Lee et al., ICLR 2021): prune a share of the surviving weights, finetune, repeat.

Starts from ./{model}/checkpoint/ckpt.pth (pretrained first if it is missing) and removes the model's `amount` of
`tools/modelloaders.py` in each iteration; ten iterations of resnet20 end at a sparsity of exactly 0.99.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from iclr2021_solution.tools.modelloaders import SETTINGS, model_and_opt_loader  # noqa: E402
from iclr2021_solution.tools.pruners import PRUNERS, weight_pruner_loader  # noqa: E402
from utils import pipeline  # noqa: E402
from utils.checkpoint import dense_path  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.run import (  # noqa: E402
    ArgumentParser,
    Run,
    add_overwrite_options,
    add_run_options,
    count,
    fraction,
    open_run,
    positive_int,
    script,
)
from utils.training import Recipe  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model", "--m_name", dest="m_name", choices=list(SETTINGS), required=True,
                        help="network to prune")
    parser.add_argument("--pruner", choices=list(PRUNERS), default="lamp", help="which weights go")
    parser.add_argument("--iter_start", type=positive_int, default=1,
                        help="first iteration; above 1 starts from the checkpoint of the iteration before")
    parser.add_argument("--iter_end", type=positive_int, default=10, help="last iteration")
    parser.add_argument("--amount", type=fraction, help="prune rate of an iteration, instead of the model's own")
    parser.add_argument("--cuda", type=count, metavar="N", help="GPU number, short for --device cuda:N")
    parser.add_argument("--max_epochs", type=positive_int, help="epochs of pretraining, instead of the recipe's")
    parser.add_argument("--finetune_epochs", type=count, help="epochs of an iteration, instead of the recipe's")
    add_run_options(parser)
    add_overwrite_options(parser)
    args = parser.parse_args(argv)
    if args.iter_end < args.iter_start:
        raise UserError(f"--iter_end {args.iter_end} lies before --iter_start {args.iter_start}")
    if args.cuda is not None:
        args.device = f"cuda:{args.cuda}"
    return args


def settings(args: argparse.Namespace) -> tuple[float, Recipe, Recipe]:
    """Prune rate and recipes of the model's table row with what the command line changes."""
    _, amount, _, opt_pre, opt_post = model_and_opt_loader(args.m_name)
    pre_epochs = opt_pre.epochs if args.max_epochs is None else args.max_epochs
    post_epochs = opt_post.epochs if args.finetune_epochs is None else args.finetune_epochs
    return args.amount or amount, replace(opt_pre, epochs=pre_epochs), replace(opt_post, epochs=post_epochs)


def start(run: Run, args: argparse.Namespace, recipe: Recipe) -> pipeline.Outcome:
    """The dense model that is there, however it was trained; pretrained when it is missing or unfinished."""
    there = dense_path(run.root, run.m_name)
    if there.is_file() and not args.overwrite:
        return pipeline.load_outcome(run, there)
    return pipeline.pretrain(run, recipe, resume=args.resume, overwrite=args.overwrite)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrains if need be, then prunes and finetunes iteration by iteration, and reports."""
    args = parse_args(argv)
    amount, opt_pre, opt_post = settings(args)
    run = open_run(args)
    pruner = weight_pruner_loader(args.pruner)
    steps = pipeline.iterative_steps(args.pruner, amount, args.iter_start, args.iter_end)
    pipeline.check_steps(run, steps, pruner)
    dense = start(run, args, opt_pre)
    outcomes = pipeline.prune_steps(run, dense, steps, pruner, opt_post, resume=args.resume, overwrite=args.overwrite)
    pipeline.print_summary(run, pipeline.report(run, [dense, *outcomes]))


if __name__ == "__main__":
    script(main)
