#!/usr/bin/env python
"""Stage 1: pretrain a network, prune it to extreme sparsity, finetune it, and report accuracy against sparsity.

One-shot (--iter_end 1, the default) prunes the dense model to each --sparsity at once; iterative (--iter_end n) prunes
and finetunes n times, either towards one --sparsity or by --amount of the surviving weights each time.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils import export, stage1
from utils.common import UserError, fraction
from utils.mask_schedule import add_mask_options, mask_options
from utils.pruning import PRUNERS
from utils.run import (
    add_iteration_options,
    add_recipe_options,
    check_iterations,
    open_run,
    run_parser,
    script,
    stage1_recipes,
)
from utils.stage1 import PruneStep
from utils.training import RECIPES, Recipe


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--pruner", choices=[*PRUNERS, "none"], default="magnitude",
                        help="none stops after pretraining")
    parser.add_argument("--sparsity", type=fraction, nargs="+",
                        help="target sparsity, default 0.99; several values are a one-shot sweep from one dense model")
    parser.add_argument("--size_budget", type=export.byte_size, metavar="SIZE", help="instead of --sparsity: the "
                        "lowest at which the sparse file of the model fits into this size (64KB, KiB, MB, MiB)")
    add_iteration_options(parser, iter_end=1, amount="prune rate of each iteration, instead of --sparsity")
    add_recipe_options(parser)
    add_mask_options(parser)
    args = parser.parse_args(argv)
    check_schedule(args)
    return args


def check_schedule(args: argparse.Namespace) -> None:
    """Fills in the default sparsity; UserError for options that contradict each other."""
    check_iterations(args)
    if args.sparsity and args.amount:
        raise UserError("--sparsity and --amount exclude each other: give the target or the rate of an iteration")
    if args.size_budget and (args.sparsity or args.amount or args.pruner == "none"):
        other = "--sparsity" if args.sparsity else "--amount" if args.amount else "--pruner none"
        raise UserError(f"--size_budget finds out how much to prune; leave out {other}")
    if args.pruner == "none" and (args.sparsity or args.amount):
        raise UserError(f"--pruner none prunes nothing; leave --{'sparsity' if args.sparsity else 'amount'} out, or "
                        "choose a pruner")
    default = args.amount if args.amount and args.iter_end == 1 else 0.99
    args.sparsity = sorted(set(args.sparsity or [default]))
    if len(args.sparsity) > 1 and args.iter_end > 1:
        raise UserError("several values of --sparsity are a one-shot sweep; use --iter_end 1, or one value")


def recipes(args: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """The recipes of pretraining and finetuning with what the command line changes."""
    chosen = RECIPES[args.recipe]
    finetune = chosen.iterative if args.iter_end > 1 else chosen.one_shot
    return stage1_recipes(args, chosen.pretrain, finetune)


def plan(args: argparse.Namespace, finetune: Recipe) -> list[PruneStep]:
    """The prunings of the command line, in order; finetune: the recipe after each."""
    mask = mask_options(args, finetune.epochs, args.pruner)
    if args.pruner == "none":
        if mask:
            raise UserError("--pruner none prunes nothing; leave --mask_schedule out, or choose a pruner")
        return []
    if args.iter_end == 1:
        return stage1.sweep_steps(args.pruner, args.sparsity, mask)
    rate = args.amount or 1.0 - (1.0 - args.sparsity[0]) ** (1.0 / args.iter_end)  # ends there after so many
    return stage1.iterative_steps(args.pruner, rate, args.iter_start, args.iter_end, mask)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrains, prunes, finetunes, reports."""
    args = parse_args(argv)
    pretrain_recipe, finetune_recipe = recipes(args)
    steps = plan(args, finetune_recipe)
    run = open_run(args)
    if args.size_budget:
        args.sparsity = [export.safe_sparsity(run.new_model(), args.pruner, args.size_budget)]
        steps = plan(args, finetune_recipe)
    tried_out = args.size_budget and args.iter_end == 1 and args.mask_schedule == "fixed"
    stage1.check_steps(run, steps, "--amount" if args.amount else "--sparsity", finetune_recipe)
    stage = stage1.dense_stage(run, pretrain_recipe)
    stage1.check_stages(run, stage, [] if tried_out else steps, finetune_recipe)
    outcomes = [stage1.pretrain(run, pretrain_recipe, stage)]
    if tried_out:
        steps = [export.fit(run, outcomes[0], steps[0], args.size_budget)]
    outcomes += stage1.prune_steps(run, outcomes[0], steps, finetune_recipe)
    stage1.report(run, outcomes)
    if args.size_budget:
        print(f"sparse file: {export.write_within(outcomes[-1], args.size_budget)}")


if __name__ == "__main__":
    script(main)
