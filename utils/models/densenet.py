"""DenseNet-121 for 32x32 images.

Huang et al. 2017, "Densely connected convolutional networks" (arXiv 1608.06993), DenseNet-BC with growth rate 32,
bottlenecks of four times the growth rate and compression 0.5. CIFAR practice: a 3x3 stem of stride 1 without pooling.
A layer puts its new maps in front of the old ones, the channel order of the published checkpoints.
Weights start from PyTorch's default distribution.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.models.layers import head, named

GROWTH = 32
BLOCKS = (6, 12, 24, 16)


class DenseLayer(nn.Module):
    """Bottleneck layer: (B, inputs, H, W) -> (B, GROWTH + inputs, H, W)."""

    def __init__(self, inputs: int) -> None:
        """Build the 1x1 bottleneck and the 3x3 convolution, each behind its own normalisation."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the new maps followed by `x`."""
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return torch.cat([out, x], dim=1)


def transition(inputs: int) -> nn.Sequential:
    """Halve the number of maps, their height and their width between two dense blocks."""
    conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
    return named(bn=nn.BatchNorm2d(inputs), relu=nn.ReLU(inplace=True), conv=conv, pool=nn.AvgPool2d(2))


def densenet(num_classes: int) -> nn.Sequential:
    """Build DenseNet-121: (B, 3, S, S) -> (B, num_classes) logits."""
    width = 2 * GROWTH
    children: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, width, 3, padding=1, bias=False)}
    for block, count in enumerate(BLOCKS, start=1):
        children[f"dense{block}"] = nn.Sequential(*(DenseLayer(width + i * GROWTH) for i in range(count)))
        width += count * GROWTH
        if block < len(BLOCKS):
            children[f"trans{block}"] = transition(width)
            width //= 2
    return named(**children, bn=nn.BatchNorm2d(width), relu=nn.ReLU(inplace=True), **head(width, num_classes))
