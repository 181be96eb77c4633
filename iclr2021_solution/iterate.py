#!/usr/bin/env python
"""Iterative layerwise pruning (LAMP, Lee et al., ICLR 2021): prune a share of the surviving weights, finetune, repeat.

Starts from ./{model}/checkpoint/ckpt.pth (pretrained first if it is missing; any recipe will do, unless --max_epochs,
--lr and the like ask for another) and removes the model's `amount` of `tools/modelloaders.py` in each iteration; ten
iterations of resnet20 end at a sparsity of exactly 0.99.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from iclr2021_solution.tools.modelloaders import SETTINGS, model_and_opt_loader  # noqa: E402
from utils import checkpoint, stage1  # noqa: E402
from utils.mask_schedule import add_mask_options, mask_options  # noqa: E402
from utils.pruning import PRUNERS  # noqa: E402
from utils.run import (  # noqa: E402
    Run,
    add_iteration_options,
    add_recipe_options,
    check_iterations,
    count,
    open_run,
    recipe_changes,
    run_parser,
    script,
    stage1_recipes,
)
from utils.training import RECIPES, Recipe  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--pruner", choices=list(PRUNERS), default="lamp", help="which weights go")
    add_iteration_options(parser, iter_end=10, amount="prune rate of an iteration, instead of the model's own")
    parser.add_argument("--cuda", type=count, metavar="N", help="GPU number, short for --device cuda:N")
    add_recipe_options(parser, "published rates and batch size are those of tools/modelloaders.py; some differ for "
                       f"{', '.join(SETTINGS)}")
    add_mask_options(parser)
    args = parser.parse_args(argv)
    check_iterations(args)
    if args.cuda is not None:
        args.device = f"cuda:{args.cuda}"
    return args


def settings(args: argparse.Namespace) -> tuple[float, Recipe, Recipe]:
    """Prune rate and recipes of the model's settings with what the command line changes."""
    _, amount, _, opt_pre, opt_post = model_and_opt_loader(args.m_name)
    if args.recipe != "published":
        opt_pre, opt_post = RECIPES[args.recipe].pretrain, RECIPES[args.recipe].iterative
    return args.amount or amount, *stage1_recipes(args, opt_pre, opt_post)


def dense_settings(run: Run, args: argparse.Namespace, recipe: Recipe) -> tuple[Recipe, bool]:
    """(recipe, resume) of pretraining with which a dense model that is there is taken, unless an option contradicts it.

    Where the command line gives nothing, the recipe of another script is as good as `recipe`, and a checkpoint without
    a run card as good as one that has it.
    """
    artifact = checkpoint.dense_path(run.root, run.m_name)
    if args.overwrite or not artifact.is_file() or checkpoint.progress_path(artifact).exists():
        return recipe, False
    given, card = recipe_changes(args), checkpoint.read_card(artifact)
    made = (card or {}).get("config", {}).get("recipe", {})
    return Recipe(**{**(made or recipe.as_dict()), **given}), not (card or given)  # a card leaves out what is usual


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrains if need be, then prunes and finetunes iteration by iteration, and reports."""
    args = parse_args(argv)
    amount, opt_pre, opt_post = settings(args)
    mask = mask_options(args, opt_post.epochs, args.pruner)
    steps = stage1.iterative_steps(args.pruner, amount, args.iter_start, args.iter_end, mask)
    run = open_run(args)
    opt_pre, resume = dense_settings(run, args, opt_pre)
    stage1.check_steps(run, steps, "--amount", opt_post)
    stage = stage1.dense_stage(run, opt_pre, resume)
    stage1.check_stages(run, stage, steps, opt_post)
    dense = stage1.pretrain(run, opt_pre, stage)
    stage1.report(run, [dense, *stage1.prune_steps(run, dense, steps, opt_post)])


if __name__ == "__main__":
    script(main)
