"""A pruned model in PyTorch's compressed sparse rows (CSR), as `deploy.py` measures it, and what a form multiplies."""
from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.analysis_utils import clone_model, prunable_layers, remove_masks
from utils.common import SIDE


class SparseProduct(nn.Module):
    """A linear layer, or a zero-padded convolution of one group, as the product of a CSR matrix and its input's
    patches; its tensors are buffers."""

    def __init__(self, layer: nn.Module):
        """layer: without a mask."""
        super().__init__()
        self.bias, options = layer.bias, ("kernel_size", "dilation", "padding", "stride")
        self.geometry = {name: getattr(layer, name) for name in options} if isinstance(layer, nn.Conv2d) else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch calls CSR beta
            self.matrix = layer.weight.detach().flatten(1).to_sparse_csr()
        for name in ("values", "col_indices", "crow_indices"):
            self.register_buffer(name, getattr(self.matrix, name)())

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) or (B, inputs), as the layer takes it."""
        if not self.geometry:
            out = (self.matrix @ x.T).T
            return out if self.bias is None else out + self.bias
        kernel, dilation, padding, stride = (sizes[0] for sizes in self.geometry.values())
        height = (x.shape[2] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        out = self.matrix @ F.unfold(x, **self.geometry).transpose(0, 1).flatten(1)
        out = out.view(len(out), len(x), height, -1).transpose(0, 1)
        return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)


def without_masks(model: nn.Module) -> nn.Module:
    """A dense copy, in evaluation mode."""
    copy = clone_model(model).eval()
    remove_masks(copy)
    return copy


def sparse_products(model: nn.Module) -> nn.Module:
    """A copy without masks in which every layer that CSR can do is a `SparseProduct`."""
    copy = without_masks(model).to(memory_format=torch.contiguous_format)
    for name, layer in prunable_layers(copy).items():
        if getattr(layer, "groups", 1) == 1:
            parent, _, child = name.rpartition(".")
            setattr(copy.get_submodule(parent), child, SparseProduct(layer))
    return copy


@torch.no_grad()
def multiplications(network: nn.Module, side: int = SIDE) -> int:
    """Multiply-accumulate operations of convolutions and linear layers for one image of `side` pixels a side; in CSR,
    of weights not zero."""
    counts: list[int] = []

    def count(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        weights = layer.values if isinstance(layer, SparseProduct) else layer.weight
        counts.append(weights.numel() * math.prod(output.shape[2:]))
    handles = [layer.register_forward_hook(count) for layer in network.modules()
               if isinstance(layer, (SparseProduct, nn.Conv2d, nn.Linear))]
    network(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return sum(counts)
