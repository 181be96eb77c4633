"""Regrowth to live positions only: where a weight, as soon as it is there, lies on a path from image to output.

Elsewhere a weight would be dead: what it reads does not depend on the image, or nothing reads what it makes.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from utils.analysis_utils import prunable_layers
from utils.channels import live_positions
from utils.regrowth import SELECTORS, Chosen, WeightRegrowth


@contextmanager
def dead_positions_taken(model: nn.Module) -> Iterator[None]:
    """While it lasts, the masks of a pruned model are 1 also where a weight would be dead: nothing may return there.

    The model must not run meanwhile. UserError for a model that cannot be followed (`utils.channels.trace`).
    """
    layers = prunable_layers(model)
    masks = {name: layer.weight_mask.clone() for name, layer in layers.items()}
    live = live_positions(model)
    try:
        for name, layer in layers.items():
            layer.weight_mask.masked_fill_(~live[name].to(layer.weight_mask.device), 1)
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight_mask.copy_(masks[name])


class LiveRegrowth(WeightRegrowth):
    """`WeightRegrowth` in which every weight that returns is on a live path; capacities are those of live positions."""

    def select(self, allocation: Mapping[str, int], step: int = 1) -> dict[str, Chosen]:
        """As `WeightRegrowth.select`; positions count as live by the masks before the step."""
        for kind in SELECTORS[self.rule].needs:
            self.evidence.make(kind)  # it may run the model
        with dead_positions_taken(self.model):
            return super().select(allocation, step)
