"""Drift: how far pruning moved what each layer computes, as the SSIM of mean feature maps of two models.

Lower SSIM means more drift, and an earlier place when weights are handed back (arXiv 2511.11675). The map of a
convolution is its output summed over channels, L1-normalised per sample, averaged over samples and scaled to [0, 1].
Where that map would be under 3 pixels wide or high, and for Linear layers, the fallback compares the vector of all
outputs instead (normalised, averaged and scaled in the same way) by SSIM with one window over the whole vector.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from utils.precision import autocast

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

        loader: un-augmented batches; both models of a comparison must see the same ones. The model is run in
        evaluation mode and left in the mode it was in. Raises ValueError for an empty loader.
        """
        sums: dict[str, Tensor] = {}
        seen, was_training = 0, self.model.training
        device = next(self.model.parameters()).device
        handles = [module.register_forward_hook(_adder(sums, name)) for name, module in self.modules.items()]
        self.model.eval()
        try:
            with autocast(device, self.precision):
                for inputs, _ in islice(loader, max_batches):
                    self.model(inputs)
                    seen += len(inputs)
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        if not seen:
            raise ValueError("the loader gave no batch")
        silent = torch.zeros(1, dtype=torch.float64)  # a layer that never runs (effnet has one) shows no drift
        return {name: scale_to_unit((sums.get(name, silent) / seen).cpu().numpy()) for name in self.modules}


def _adder(sums: dict[str, Tensor], name: str) -> Callable[..., None]:
    def add(_: nn.Module, __: object, output: Tensor) -> None:
        total = normalised_maps(output.float()).sum(0, dtype=torch.float64)
        sums[name] = total if name not in sums else sums[name] + total
    return add


def normalised_maps(output: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W), summed over channels; other or small outputs to (B, outputs); L1 norm 1 each.

    An output of zeros stays zero.
    """
    is_map = output.dim() == 4 and min(output.shape[2:]) >= SMALLEST_MAP
    maps = output.sum(1) if is_map else output.flatten(1)
    norms = maps.flatten(1).abs().sum(1).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps / norms.view(-1, *[1] * (maps.dim() - 1))


def scale_to_unit(values: np.ndarray) -> np.ndarray:
    """Min-max scaling to [0, 1]; constant values become 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def map_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """SSIM of two maps or two vectors in [0, 1]; identical ones give exactly 1. Raises ValueError on unequal shapes."""
    if one.shape != other.shape:
        raise ValueError(f"maps of shapes {one.shape} and {other.shape} cannot be compared")
    if one.ndim == 1:
        return _vector_similarity(one, other)
    window = min(LARGEST_WINDOW, *one.shape)
    from skimage.metrics import structural_similarity  # takes a while, and no --help needs it

    return float(structural_similarity(one, other, data_range=1, win_size=window - 1 + window % 2))


def _vector_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """SSIM (Wang et al., IEEE TIP 2004, eq. 13) with one window over the whole vector and data range 1."""
    c1, c2 = 0.01**2, 0.03**2
    means = 2 * one.mean() * other.mean() + c1, one.mean() ** 2 + other.mean() ** 2 + c1
    covariance = ((one - one.mean()) * (other - other.mean())).mean()
    spreads = 2 * covariance + c2, one.var() + other.var() + c2
    return float(means[0] * spreads[0] / (means[1] * spreads[1]))


def compute_block_ssim(dense_maps: Mapping[str, np.ndarray], pruned_maps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """SSIM of every layer in [-1, 1] from the maps of `BlockwiseFeatureExtractor.extract`; 1 is no drift.

    Raises ValueError unless both hold the same layers and shapes.
    """
    if dense_maps.keys() != pruned_maps.keys():
        raise ValueError(f"maps of different layers: {sorted(dense_maps.keys() ^ pruned_maps.keys())}")
    return {name: map_similarity(dense_maps[name], pruned_maps[name]) for name in dense_maps}
