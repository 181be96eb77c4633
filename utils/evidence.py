"""What rules look at besides the weights: made when first needed, kept, and the same for all models compared.

`Evidence` holds it by kind; `SaliencyComputer` makes saliency and gradients in one pass. Drift is measured by
`utils.analysis_utils`. A rule names in its registry which kinds it needs; no other is made.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.analysis_utils import count_pruned_params, prunable_layers
from utils.common import autocast


class Evidence:
    """What rules and initialisers look at besides the model that they change; made when first needed, then kept.

    reference: a dense or pruned model of the same architecture. By layer name, each given as a mapping or as a function
    that makes it: saliency, s of `SaliencyComputer`; gradient, |dL/dw| of the model to be changed as to its
    effective weights, pruned ones included, both of the weight's shape; magnitude, the reference's |w|; drift, the SSIM
    to the dense model (1: none). A rule names in its registry which of these `KINDS` it needs; no other is made.
    """

    KINDS = ("saliency", "gradient", "magnitude", "drift")

    def __init__(self, *, reference: nn.Module | None = None, **sources: Mapping[str, Any] | Callable[[], Any] | None):
        """sources: by names of `KINDS`; TypeError for another name."""
        if unknown := sources.keys() - set(self.KINDS):
            raise TypeError(f"evidence of unknown kind {', '.join(sorted(unknown))}; known: {', '.join(self.KINDS)}")
        self.reference, self._sources = reference, sources

    def make(self, kind: str) -> Mapping[str, Any] | None:
        """The evidence of a kind, made if it is not there yet; None without a source for it.

        For what is not a rule: a rule may be asked about several layers at once, by as many threads, and uses `get`.
        """
        source = self._sources.get(kind)
        self._sources[kind] = source() if callable(source) else source
        return self._sources[kind]

    def get(self, kind: str) -> Mapping[str, Any] | None:
        """The evidence of a kind, None where there is no source for it. Raises ValueError unless `make` made it."""
        if callable(self._sources.get(kind)):
            raise ValueError(f"a rule looks at {kind} without naming it among its needs")
        return self._sources.get(kind)

    def tensor(self, kind: str, name: str) -> Tensor:
        """The layer's tensor of a kind. Raises ValueError if there is none."""
        tensors = self.get(kind)
        if tensors is None or name not in tensors:
            raise ValueError(f"no {kind} is given for layer {name!r}")
        return tensors[name]

    def reference_layer(self, name: str, layer: nn.Module) -> nn.Module:
        """The reference's counterpart of a layer. Raises ValueError if there is none of this name and shape."""
        try:
            counterpart = self.reference.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"no reference with a layer {name!r} is given") from error
        if counterpart.weight.shape != layer.weight_mask.shape:
            raise ValueError(f"{name}: the reference has weights of shape {tuple(counterpart.weight.shape)}")
        return counterpart


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
        found = "pruned" if count_pruned_params(model).pruned else "dense"
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
