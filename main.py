#!/usr/bin/env python
"""Stage 1: pretrain a network, prune it to extreme sparsity, finetune it, and report accuracy against sparsity.

One-shot (--iter_end 1, the default) prunes the dense model to each --sparsity at once; iterative (--iter_end n) prunes
and finetunes n times, either towards one --sparsity or by --amount of the surviving weights each time.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from iclr2021_solution.tools.pruners import PRUNERS, weight_pruner_loader
from utils import pipeline
from utils.errors import UserError
from utils.pipeline import PruneStep
from utils.run import (
    ArgumentParser,
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
from utils.training import FINETUNE_ITERATIVE, FINETUNE_ONE_SHOT, PRETRAIN, SCHEDULES, Recipe


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--pruner", choices=[*PRUNERS, "none"], default="magnitude",
                        help="none stops after pretraining")
    parser.add_argument("--sparsity", type=fraction, nargs="+",
                        help="target sparsity, default 0.99; several values are a one-shot sweep from one dense model")
    parser.add_argument("--amount", type=fraction, help="prune rate of each iteration, instead of --sparsity")
    parser.add_argument("--iter_start", type=positive_int, default=1,
                        help="first iteration; above 1 starts from the checkpoint of the iteration before")
    parser.add_argument("--iter_end", type=positive_int, default=1, help="last iteration; 1 is one-shot pruning")
    parser.add_argument("--max_epochs", type=positive_int, default=PRETRAIN.epochs, help="epochs of pretraining")
    parser.add_argument("--lr", type=positive_float, default=PRETRAIN.lr, help="learning rate of pretraining")
    parser.add_argument("--batch_size", type=positive_int, help="default: 128 in pretraining, 100 in finetuning")
    parser.add_argument("--patience", type=positive_int, default=PRETRAIN.patience,
                        help="epochs without a better validation accuracy before a stage stops")
    parser.add_argument("--finetune_epochs", type=count, help="default: 400 one-shot, 40 for each iteration")
    parser.add_argument("--finetune_lr", type=positive_float, default=FINETUNE_ONE_SHOT.lr,
                        help="learning rate of finetuning (AdamW)")
    parser.add_argument("--finetune_schedule", choices=list(SCHEDULES), default=FINETUNE_ONE_SHOT.schedule,
                        help="learning rate over the finetuning epochs")
    add_run_options(parser)
    add_overwrite_options(parser)
    args = parser.parse_args(argv)
    check_schedule(args)
    return args


def check_schedule(args: argparse.Namespace) -> None:
    """Fills in the default sparsity; UserError for options that contradict each other."""
    if args.iter_end < args.iter_start:
        raise UserError(f"--iter_end {args.iter_end} lies before --iter_start {args.iter_start}")
    if args.sparsity and args.amount:
        raise UserError("--sparsity and --amount exclude each other: give the target or the rate of an iteration")
    default = args.amount if args.amount and args.iter_end == 1 else 0.99
    args.sparsity = sorted(set(args.sparsity or [default]))
    if len(args.sparsity) > 1 and args.iter_end > 1:
        raise UserError("several values of --sparsity are a one-shot sweep; use --iter_end 1, or one value")


def recipes(args: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """The published recipes of pretraining and finetuning with what the command line changes."""
    finetune = FINETUNE_ITERATIVE if args.iter_end > 1 else FINETUNE_ONE_SHOT
    pre = replace(PRETRAIN, epochs=args.max_epochs, lr=args.lr, patience=args.patience,
                  batch_size=args.batch_size or PRETRAIN.batch_size)
    epochs = finetune.epochs if args.finetune_epochs is None else args.finetune_epochs
    return pre, replace(finetune, epochs=epochs, lr=args.finetune_lr, schedule=args.finetune_schedule,
                        patience=args.patience, batch_size=args.batch_size or finetune.batch_size)


def plan(args: argparse.Namespace) -> list[PruneStep]:
    """The prunings of the command line, in order."""
    if args.pruner == "none":
        return []
    if args.iter_end == 1:
        return [PruneStep(args.pruner, "one-shot", 1, sparsity) for sparsity in args.sparsity]
    rate = args.amount or pipeline.rate_towards(args.sparsity[0], args.iter_end)
    return pipeline.iterative_steps(args.pruner, rate, args.iter_start, args.iter_end)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrains, prunes, finetunes, reports."""
    args = parse_args(argv)
    steps = plan(args)
    pretrain_recipe, finetune_recipe = recipes(args)
    run = open_run(args)
    pruner = weight_pruner_loader(args.pruner) if steps else None
    pipeline.check_steps(run, steps, pruner)
    keep = {"resume": args.resume, "overwrite": args.overwrite}
    outcomes = [pipeline.pretrain(run, pretrain_recipe, **keep)]
    outcomes += pipeline.prune_steps(run, outcomes[0], steps, pruner, finetune_recipe, **keep)
    pipeline.print_summary(run, pipeline.report(run, outcomes))


if __name__ == "__main__":
    script(main)
