#!/usr/bin/env python
"""A dynamic sparse training method of your own, as a hook of the trainer: an example to start from.

SET (Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018): a sparse
network trains from its start, and every few steps each layer's smallest weights make way for as many random ones.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import checkpoint  # noqa: E402, I001  first: it says which packages are missing

import torch  # noqa: E402

from utils.analysis_utils import count_pruned_params, prunable_layers  # noqa: E402
from utils.common import UserError, fraction, generator, positive_int  # noqa: E402
from utils.pruning import prune_to, weights_left  # noqa: E402
from utils.run import open_run, run_parser, script  # noqa: E402
from utils.selection import exact_k_mask  # noqa: E402
from utils.training import SHORT_PRETRAIN, Trainer, TrainingHook  # noqa: E402


class Swap(TrainingHook):
    """SET: every `every` steps `share` of each layer's active weights, the smallest, make way for random ones at 0."""

    def __init__(self, every: int, share: float, seed: int):
        """The last quarter of the training keeps its mask."""
        self.every, self.share, self.seed = every, share, seed

    def on_step(self, trainer: Trainer) -> None:
        """Exchanges weights in every layer, if it is time."""
        if trainer.step % self.every or trainer.step > 0.75 * trainer.total_steps:
            return
        returned = {}
        for name, layer in prunable_layers(trainer.model).items():
            weight, active = layer.weight_orig.data, layer.weight_mask.bool()
            moved = min(round(self.share * int(active.sum())), int((~active).sum()))
            kept = exact_k_mask(weight.abs(), int(active.sum()) - moved, active)
            draws = torch.rand(weight.shape, generator=generator(self.seed, name, trainer.step)).to(weight.device)
            new = returned[name] = exact_k_mask(draws, moved, ~active)
            weight[new] = 0.0
            layer.weight_mask.copy_(kept | new)
        trainer.hold_pruned(returned)  # what is pruned now stays where it is; what returned has no momentum


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = run_parser(__doc__, resumable=False)
    parser.add_argument("--sparsity", type=fraction, default=0.9, help="of the whole training")
    parser.add_argument("--epochs", type=positive_int, default=4, help="of training")
    parser.add_argument("--update_every", type=positive_int, default=10, help="steps from one swap to the next")
    parser.add_argument("--exchange", type=fraction, default=0.1, help="share of the active weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a sparse network, saves it and says how good it became."""
    args = parse_args(argv)
    path = args.root / "dynamic_method" / f"{args.m_name}.pth"
    if path.exists():
        raise UserError(f"{path} exists; move it away, or use another --root")
    run = open_run(args)
    model = run.new_model()
    total = count_pruned_params(model).total
    prune_to(model, weights_left(total, total, args.sparsity, f"--sparsity {args.sparsity}"), "erk")
    recipe = replace(SHORT_PRETRAIN, epochs=args.epochs)
    hook = Swap(args.update_every, args.exchange, run.seed)
    result = Trainer(model, run.train, run.val, recipe, seed=run.seed, precision=run.precision, hook=hook).run("SET")
    checkpoint.save_checkpoint(model.state_dict(), path)
    print(f"{result.accuracy:.2f} % on validation at sparsity {count_pruned_params(model).sparsity:.4f}; model: {path}")


if __name__ == "__main__":
    script(main, resumable=False)
