"""Saliency of every prunable weight, accumulated in one pass over the data."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.analysis_utils import overall_sparsity, prunable_layers
from utils.precision import autocast


class SaliencyComputer:
    """Saliency of every prunable weight, s_i = (dL/dtheta_i)^2 * theta_i^2, in one pass over the loader.

    What is averaged: s = theta^2 * (1/B) * sum over the B batches of g_b^2, where g_b is the gradient of the mean
    cross-entropy of batch b. Every batch counts the same, also a smaller last one.
    """

    def __init__(self, model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, precision: str = "fp32",
                 max_batches: int | None = None, source: str = "dense"):
        """loader: un-augmented (inputs, targets) batches; max_batches: how many of them at most (None: all).

        source: what the model is. 'dense': it has no pruned weights. 'pruned': the gradient is with respect to the
        effective weight, at every position, pruned ones included, and theta is `weight_orig`. Raises ValueError if the
        model is not of this kind, or for max_batches < 1.
        """
        found = "pruned" if overall_sparsity(model) > 0 else "dense"
        if source != found:
            raise ValueError(f"source is {source!r}, but the model given is {found}")
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {max_batches}")
        self.model, self.loader, self.precision, self.max_batches = model, loader, precision, max_batches
        self.gradients: dict[str, Tensor] = {}  # |mean over batches of g_b|, what RigL ranks by; `compute` fills it

    def compute(self) -> dict[str, Tensor]:
        """Layer name -> saliency, of the weight's shape and on its device; fills `gradients` in the same pass.

        Batch normalisation uses its running statistics. Modes, statistics and `.grad` are left as they were. Raises
        ValueError if the loader is empty.
        """
        layers, count = prunable_layers(self.model), 0
        squares = [torch.zeros_like(layer.weight.detach()) for layer in layers.values()]
        sums = [torch.zeros_like(square) for square in squares]
        with _evaluating(self.model):
            for inputs, targets in islice(self.loader, self.max_batches):
                gradients = self._gradients(layers.values(), inputs, targets)
                torch._foreach_addcmul_(squares, gradients, gradients)
                torch._foreach_add_(sums, gradients)
                count += 1
        if not count:
            raise ValueError("the loader has no batch to compute saliency from")
        self.gradients = {name: total.div_(count).abs_() for name, total in zip(layers, sums, strict=True)}
        return {name: square.div_(count).mul_(stored_weight(layer).square())
                for (name, layer), square in zip(layers.items(), squares, strict=True)}

    @torch.enable_grad()
    def _gradients(self, layers: Iterable[nn.Module], inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """dL/dweight of one batch. The `weight` of a masked layer is the very product that the forward pass used, so
        that its gradient is there at pruned positions too; a layer that no forward pass uses has gradient 0."""
        with autocast(inputs.device, self.precision):
            loss = F.cross_entropy(self.model(inputs), targets)
        weights = [layer.weight for layer in layers]
        found = iter(torch.autograd.grad(loss, [w for w in weights if w.requires_grad], materialize_grads=True))
        return [next(found) if w.requires_grad else torch.zeros_like(w) for w in weights]


def stored_weight(layer: nn.Module) -> Tensor:
    """What the layer stores at every position: `weight_orig` where it is masked, else `weight`; detached."""
    return (layer.weight_orig if hasattr(layer, "weight_orig") else layer.weight).detach()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module has its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
