"""Options of stage 1 that `main.py` and `iclr2021_solution/iterate.py` share: iterations, changes to the recipes."""
from __future__ import annotations

import argparse
from typing import Any

from utils.errors import UserError
from utils.run import count, fraction, positive_float, positive_int
from utils.training import SCHEDULES, Recipe


def add_iteration_options(parser: argparse.ArgumentParser, iter_end: int, amount: str) -> None:
    """`--iter_start`, `--iter_end` (with its default) and `--amount` (with its help)."""
    parser.add_argument("--amount", type=fraction, help=amount)
    parser.add_argument("--iter_start", type=positive_int, default=1,
                        help="first iteration; above 1 starts from the checkpoint of the iteration before")
    parser.add_argument("--iter_end", type=positive_int, default=iter_end, help="last iteration")


def check_iterations(args: argparse.Namespace) -> None:
    """UserError for iterations that end before they start."""
    if args.iter_end < args.iter_start:
        raise UserError(f"--iter_end {args.iter_end} lies before --iter_start {args.iter_start}")


def add_recipe_options(parser: argparse.ArgumentParser, pre: Recipe, post: Recipe, finetune_epochs: str,
                       note: str | None = None) -> None:
    """Options that change the recipes of pretraining (`pre`) and of finetuning (`post`); None where not given.

    The help shows the recipes' values as defaults, `finetune_epochs` in words; note: what else to say on them.
    """
    group = parser.add_argument_group("training", note)
    group.add_argument("--max_epochs", type=positive_int, help=f"epochs of pretraining (default: {pre.epochs})")
    group.add_argument("--lr", type=positive_float, help=f"learning rate of pretraining, SGD (default: {pre.lr})")
    group.add_argument("--batch_size", type=positive_int,
                       help=f"default: {pre.batch_size} in pretraining, {post.batch_size} in finetuning")
    group.add_argument("--patience", type=positive_int, help="epochs without a better validation accuracy before a "
                       f"stage stops (default: {pre.patience})")
    group.add_argument("--finetune_epochs", type=count, help=f"epochs after pruning (default: {finetune_epochs})")
    group.add_argument("--finetune_lr", type=positive_float,
                       help=f"learning rate of finetuning, AdamW (default: {post.lr})")
    group.add_argument("--finetune_schedule", choices=list(SCHEDULES),
                       help=f"learning rate over the finetuning epochs (default: {post.schedule})")


def pretrain_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the recipe of pretraining that the command line gives."""
    return _given(epochs=args.max_epochs, lr=args.lr, batch_size=args.batch_size, patience=args.patience)


def finetune_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the recipe of finetuning that the command line gives."""
    return _given(epochs=args.finetune_epochs, lr=args.finetune_lr, schedule=args.finetune_schedule,
                  batch_size=args.batch_size, patience=args.patience)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
