"""Masks of a pruned model: put on, set, read, count, clone, and hold while an optimizer runs; and what rules look at
besides the weights: saliency, gradients, drift.

A pruned layer uses the reparametrization of `torch.nn.utils.prune`: parameter `weight_orig`, buffer `weight_mask`
(1 active, 0 pruned) and `weight = weight_orig * weight_mask`, made anew before every forward pass.
"""
from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from utils.common import autocast, numbers


class PruneCounts(NamedTuple):
    """Prunable weights of a model, in weights."""

    total: int
    surviving: int
    pruned: int

    @property
    def sparsity(self) -> float:
        """pruned / total, in [0, 1] (0 for a model without prunable weights)."""
        return self.pruned / self.total if self.total else 0.0


def prunable_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Every Conv2d and Linear of the model by name, in `named_modules` order; their `weight` is what is pruned.

    Left out is the output projection of `nn.MultiheadAttention`, whose weight is read without the layer being called: a
    mask would freeze it. remove_duplicate: give a layer that the model uses in several places its first name only.
    """
    return {name: layer for name, layer in model.named_modules(remove_duplicate=remove_duplicate)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not isinstance(layer, NonDynamicallyQuantizableLinear)}


def has_masks(model: nn.Module) -> bool:
    """Whether any prunable layer has a mask."""
    return any(hasattr(layer, "weight_mask") for layer in prunable_layers(model).values())


@torch.no_grad()  # so that `weight`, made here, holds no graph
def add_masks(model: nn.Module) -> None:
    """Give every prunable layer that has no mask one of all ones. Parameters stay the same objects."""
    for layer in prunable_layers(model).values():
        if not hasattr(layer, "weight_mask"):
            prune.identity(layer, "weight")


def remove_masks(model: nn.Module) -> None:
    """Make pruning permanent: `weight` becomes an ordinary parameter, zero where it was pruned."""
    for layer in prunable_layers(model).values():
        if not hasattr(layer, "weight_mask"):
            continue
        prune.remove(layer, "weight")
        if layer.bias is not None:  # back behind `weight`, so that the state dict has the order of a dense model
            bias = layer.bias
            del layer.bias
            layer.register_parameter("bias", bias)


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write masks (layer name -> bool or 0/1 tensor of the weight's shape) into the model, in place.

    Masks are put on where absent; layers not named keep theirs, or get all ones. Raises ValueError, with the model
    unchanged, on an unknown layer, a wrong shape or a value other than 0 and 1.
    """
    layers = prunable_layers(model)
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"mask of {name}: the model has no such prunable layer")
        if mask.shape != layers[name].weight.shape:
            raise ValueError(f"mask of {name}: shape {tuple(mask.shape)} instead of {tuple(layers[name].weight.shape)}")
        if not is_binary(mask):
            raise ValueError(f"mask of {name}: values other than 0 and 1")
    add_masks(model)
    for name, mask in masks.items():
        layers[name].weight_mask.copy_(mask)
        refresh_weight(layers[name])


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """A bool copy of every prunable layer's mask, True where active; all True where the layer has none."""
    return {name: layer.weight_mask.bool() if hasattr(layer, "weight_mask")
            else torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in prunable_layers(model).items()}


def is_binary(mask: Tensor) -> bool:
    """Whether it holds nothing but 0 and 1."""
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


@torch.no_grad()
def refresh_weight(layer: nn.Module) -> None:
    """Make the masked `weight` anew, as the next forward pass will; without a graph, so that it holds no memory."""
    layer.weight = layer.weight_orig * layer.weight_mask


@contextmanager
def used_weights(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Layer name -> what serves as its `weight` in the forward passes meanwhile, if that requires a gradient: without a
    mask the parameter, else a product for every call, which has a gradient at pruned positions, too."""
    layers = prunable_layers(model)
    used = {name: [layer.weight] if layer.weight.is_leaf and layer.weight.requires_grad else []
            for name, layer in layers.items()}

    def record(products: list[Tensor], layer: nn.Module, *_: object) -> None:
        if layer.weight.requires_grad and not layer.weight.is_leaf:
            products.append(layer.weight)

    handles = [layer.register_forward_hook(partial(record, used[name])) for name, layer in layers.items()]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def count_pruned_params(model: nn.Module) -> PruneCounts:
    """Total, surviving and pruned weights over all prunable layers."""
    total = sum(layer.weight.numel() for layer in prunable_layers(model).values())
    surviving = sum(surviving_by_layer(model).values())
    return PruneCounts(total, surviving, total - surviving)


def surviving_by_layer(model: nn.Module) -> dict[str, int]:
    """Layer name -> its surviving weights, by one transfer from the device for all layers."""
    masks = get_masks(model)
    return dict(zip(masks, numbers(mask.count_nonzero() for mask in masks.values()), strict=True))


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """pruned / total of every prunable layer, in [0, 1]."""
    layers = prunable_layers(model)
    return {name: 1 - count / layers[name].weight.numel() for name, count in surviving_by_layer(model).items()}


def empty_layers(model: nn.Module) -> list[str]:
    """Names of the prunable layers without a single surviving weight: nothing passes through them."""
    return [name for name, count in surviving_by_layer(model).items() if not count]


def clone_model(model: nn.Module) -> nn.Module:
    """An independent copy, also of a pruned model that has run forward, where `copy.deepcopy` fails.

    The tensors that deepcopy refuses are results of a computation (such as the masked `weight`); the copy gets their
    detached values, and its own pruning hooks make them anew at its next forward pass.
    """
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def hold_weights(optimizer: Optimizer, params_and_keep: Iterable[tuple[nn.Parameter, Tensor]]) -> RemovableHandle:
    """Freeze single weights: after every step, positions where keep is 0 get back their value of now.

    Momentum and weight decay move even weights without a gradient; this undoes it in two kernel launches a step,
    whatever the number of tensors. `keep` has the parameter's shape, 1 or True where it may move. Returns a handle
    whose `remove()` lets go.
    """
    pairs = [(param, torch.empty_like(param).copy_(keep)) for param, keep in params_and_keep]
    if not pairs:
        return RemovableHandle(OrderedDict())
    params, keeps = zip(*pairs, strict=True)
    held = [param.detach() * (1 - keep) for param, keep in pairs]

    @torch.no_grad()
    def restore(*_: object) -> None:
        torch._foreach_mul_(params, keeps)
        torch._foreach_add_(params, held)

    return optimizer.register_step_post_hook(restore)


def hold_pruned_weights(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """`hold_weights` for every pruned position of `weight_orig`; a handle that does nothing if there are no masks."""
    layers = [layer for layer in prunable_layers(model).values() if hasattr(layer, "weight_mask")]
    return hold_weights(optimizer, [(layer.weight_orig, layer.weight_mask) for layer in layers])


# In the state of Adam and its kin, Adamax, RMSprop, Adadelta, Adagrad
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"}


@torch.no_grad()
def forget_momentum(model: nn.Module, optimizer: Optimizer, returned: Mapping[str, Tensor]) -> None:
    """Zeroes the momentum of regrown weights (layer -> bool). `SECOND_MOMENTS` are set to the mean over the layer's
    other active weights: after zero, which bias correction no longer offsets, steps would be too large."""
    layers = prunable_layers(model)
    for name, new in returned.items():
        weight, mask = layers[name].weight_orig, layers[name].weight_mask
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                fill = torch.zeros((), device=value.device)
                if key in SECOND_MOMENTS:
                    stayed = mask.bool() & ~new
                    fill = (value * stayed).sum() / stayed.sum().clamp(min=1)
                value.masked_fill_(new, fill)


# ---- what rules look at besides the weights --------------------------------------------------------------------------


def stored_weight(layer: nn.Module) -> Tensor:
    """What the layer stores at every position: `weight_orig` where it is masked, else `weight`; detached."""
    return (layer.weight_orig if hasattr(layer, "weight_orig") else layer.weight).detach()


# Evidence from gradients: the power of each batch's dL/dw (with respect to the effective weights, pruned ones
# included) to average over batches, and a function of that mean and the stored weight. A new kind is a line here.
GRADIENT_KINDS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "saliency": (2, lambda mean, weight: mean * weight.square()),  # the method's, s of `SaliencyComputer`
    "gradient": (1, lambda mean, weight: mean.abs()),  # what RigL grows by (Evci et al., ICML 2020)
}


class Evidence:
    """What rules and initialisers look at besides the model that they change; made when first needed, then kept.

    reference: a dense or pruned model of the same architecture. Each kind is a mapping by layer name or a function that
    returns one. `GRADIENT_KINDS`: tensors of the weight's shape, from the model to be changed or (all but gradient) the
    dense one; magnitude: the reference's |w|; drift: SSIM to the dense model (1: none). Rules declare the `KINDS` that
    they need by `@needs`; only those are computed.
    """

    KINDS = (*GRADIENT_KINDS, "magnitude", "drift")

    def __init__(self, *, reference: nn.Module | None = None, **sources: Mapping[str, Any] | Callable[[], Any] | None):
        """sources: by names of `KINDS`; TypeError for another name."""
        if unknown := sources.keys() - set(self.KINDS):
            raise TypeError(f"evidence of unknown kind {', '.join(sorted(unknown))}; known: {', '.join(self.KINDS)}")
        self.reference, self._sources = reference, sources

    def make(self, kind: str) -> Mapping[str, Any] | None:
        """The evidence of a kind, made if it is not there yet; None without a source for it.

        Not for use in rules: these may run in one thread per layer at the same time, and use `get`.
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
    """Saliency of every prunable weight, s_i = (dL/dtheta_i)^2 * theta_i^2, and all else that is made of gradients
    (`GRADIENT_KINDS`), in one pass over the loader.

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

    def compute(self) -> dict[str, Tensor]:
        """Layer name -> saliency, of the weight's shape and on its device; see `evidence`."""
        return self.evidence()["saliency"]

    def evidence(self) -> dict[str, dict[str, Tensor]]:
        """Kind of `GRADIENT_KINDS` -> layer name -> tensor of the weight's shape, on its device.

        Batch normalisation uses its running statistics. Modes, statistics and `.grad` are left as they were. Raises
        ValueError if the loader is empty.
        """
        layers, count = prunable_layers(self.model), 0
        sums = {power: [torch.zeros_like(layer.weight.detach()) for layer in layers.values()]
                for power, _ in GRADIENT_KINDS.values()}
        with evaluating(self.model):
            for inputs, targets in islice(self.loader, self.max_batches):
                gradients = self._gradients(layers, inputs, targets)
                for power, totals in sums.items():
                    torch._foreach_addcmul_(totals, gradients, torch._foreach_pow(gradients, power - 1))
                count += 1
        if not count:
            raise ValueError("the loader has no batch to compute saliency from")
        named = {power: dict(zip(layers, totals, strict=True)) for power, totals in sums.items()}
        return gradient_evidence(self.model, named, count)

    @torch.enable_grad()
    def _gradients(self, layers: Mapping[str, nn.Module], inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """dL/dweight of one batch, at pruned positions too; a layer that no forward pass uses has gradient 0."""
        with used_weights(self.model) as used, autocast(inputs.device, self.precision):
            loss = F.cross_entropy(self.model(inputs), targets)
        found = iter(torch.autograd.grad(loss, list(chain(*used.values())), materialize_grads=True))
        return [sum((next(found) for _ in used[name]), torch.zeros_like(layer.weight))
                for name, layer in layers.items()]


def gradient_evidence(model: nn.Module, sums: Mapping[int, Mapping[str, Tensor]], batches: int) -> dict[str, Any]:
    """Kind of `GRADIENT_KINDS` -> layer name -> tensor, of those whose power is there; sums: power -> layer name -> sum
    over so many `batches` of dL/dw to this power."""
    stored = {name: stored_weight(layer) for name, layer in prunable_layers(model).items()}
    return {kind: {name: make(total / batches, stored[name]) for name, total in sums[power].items()}
            for kind, (power, make) in GRADIENT_KINDS.items() if power in sums}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module has its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- drift -----------------------------------------------------------------------------------------------------------

SMALLEST_MAP = 3  # pixels; a smaller map has no window of odd size above 1
LARGEST_WINDOW = 7  # pixels, the usual SSIM window (Wang et al., IEEE TIP 2004)


class BlockwiseFeatureExtractor:
    """Collects the mean feature map of named layers over a pass; running sums stay on the device.

    Memory does not grow with the number of batches, and the hooks are removed whatever happens.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], precision: str = "fp32"):
        """layers: names of Conv2d or Linear layers. Raises AttributeError for a name that the model does not have."""
        self.model, self.precision = model, precision
        self.modules = {name: model.get_submodule(name) for name in layers}

    @torch.no_grad()
    def extract(self, loader: Iterable[tuple[Tensor, Tensor]], max_batches: int | None = None) -> dict[str, np.ndarray]:
        """Mean maps by layer, float64 (H, W) or, by the fallback, (outputs,), each scaled to [0, 1].

        loader: un-augmented batches, the same ones for both models of a comparison. The model runs in evaluation mode
        and is left in the mode it was in. Of a layer's resolutions its first counts. ValueError for an empty loader.
        """
        sums: dict[str, Tensor] = {}
        seen, device = 0, next(self.model.parameters()).device

        def add(name: str, _: nn.Module, __: object, output: Tensor) -> None:
            maps = normalised_maps(output.float()).sum(0, dtype=torch.float64)
            if maps.shape == sums.setdefault(name, torch.zeros_like(maps)).shape:  # the resolution of its first call
                sums[name] += maps
        handles = [module.register_forward_hook(partial(add, name)) for name, module in self.modules.items()]
        try:
            with evaluating(self.model), autocast(device, self.precision):
                for inputs, _ in islice(loader, max_batches):
                    self.model(inputs)
                    seen += len(inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise ValueError("the loader gave no batch")
        silent = torch.zeros(1, dtype=torch.float64)  # a layer that never runs (effnet has one) shows no drift
        return {name: scale_to_unit((sums.get(name, silent) / seen).cpu().numpy()) for name in self.modules}


def normalised_maps(output: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W), summed over channels; other or small outputs to (B, outputs); each has L1
    norm 1, or stays zero."""
    is_map = output.dim() == 4 and min(output.shape[2:]) >= SMALLEST_MAP
    maps = output.sum(1) if is_map else output.flatten(1)
    norms = maps.flatten(1).abs().sum(1).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps / norms.view(-1, *[1] * (maps.dim() - 1))


def scale_to_unit(values: np.ndarray) -> np.ndarray:
    """Min-max scaling to [0, 1]; constant values become 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def map_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM of two maps or two vectors in [0, 1]; identical ones give exactly 1. Raises ValueError on unequal shapes."""
    if first.shape != second.shape:
        raise ValueError(f"maps of shapes {first.shape} and {second.shape} cannot be compared")
    if first.ndim == 1:
        return _vector_similarity(first, second)
    window = min(LARGEST_WINDOW, *first.shape)
    from skimage.metrics import structural_similarity  # takes a while, and no --help needs it

    return float(structural_similarity(first, second, data_range=1, win_size=window - 1 + window % 2))


def _vector_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM (Wang et al., IEEE TIP 2004, eq. 13) with one window over the whole vector and data range 1."""
    c1, c2 = 0.01**2, 0.03**2
    means = 2 * first.mean() * second.mean() + c1, first.mean() ** 2 + second.mean() ** 2 + c1
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    spreads = 2 * covariance + c2, first.var() + second.var() + c2
    return float(means[0] * spreads[0] / (means[1] * spreads[1]))


def compute_block_ssim(dense_maps: Mapping[str, np.ndarray], pruned_maps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """SSIM of every layer in [-1, 1] from the maps of `BlockwiseFeatureExtractor.extract`; 1 is no drift.

    Raises ValueError unless both hold the same layers and shapes.
    """
    if dense_maps.keys() != pruned_maps.keys():
        raise ValueError(f"maps of different layers: {sorted(dense_maps.keys() ^ pruned_maps.keys())}")
    return {name: map_similarity(dense_maps[name], pruned_maps[name]) for name in dense_maps}
