"""EfficientNet-B0 for 32x32 images.

Tan and Le 2019, "EfficientNet: rethinking model scaling for convolutional neural networks" (arXiv 1905.11946), table 1:
MBConv blocks with squeeze-and-excitation at a quarter of the block's input width, swish, dropout 0.2 and drop-connect
(stochastic depth, Huang et al. 2016, arXiv 1603.09382) rising linearly to 0.2. CIFAR practice: a stem of stride 1 and
no final 1x1 convolution.

As in the paper, the first block (MBConv1) does not expand. The published checkpoints carry weights for that step all
the same, so `layers.0.conv1` and `layers.0.bn1` exist here, are never run and get no gradient.
Weights start from PyTorch's default distribution.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from utils.models.layers import head, named

# Per stage: expansion, output channels, blocks, kernel, stride of the first block.
STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
STEM = 32
DROPOUT = 0.2
DROP_CONNECT = 0.2


class SqueezeExcite(nn.Module):
    """Scale each of `channels` maps by a factor in (0, 1) computed from all maps' means; keeps the shape."""

    def __init__(self, channels: int, squeezed: int) -> None:
        """Build the two 1x1 convolutions, channels -> squeezed -> channels."""
        super().__init__()
        self.se1 = nn.Conv2d(channels, squeezed, 1)
        self.se2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times its channel gates."""
        means = F.adaptive_avg_pool2d(x, 1)
        return x * self.se2(F.silu(self.se1(means))).sigmoid()


class MBConv(nn.Module):
    """Expand, filter each map, gate, project: (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, drop: float) -> None:
        """Build the block; `drop` is the chance that a sample skips it in training, where there is a skip."""
        super().__init__()
        width = expansion * inputs
        self.expands = expansion > 1
        self.skips = stride == 1 and inputs == outputs
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel, stride, padding=kernel // 2, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcite(width, inputs // 4)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projected maps, plus `x` where the shape is kept."""
        out = F.silu(self.bn1(self.conv1(x))) if self.expands else x
        out = self.se(F.silu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        if not self.skips:
            return out
        if self.training:
            # Dropout on one number per sample: 0 drops the sample's branch, 1 / (1 - p) keeps the expectation.
            out = out * self.drop(out.new_ones(len(out), 1, 1, 1))
        return out + x


def mbconv_blocks() -> nn.Sequential:
    """Build the seven stages: (B, STEM, 32, 32) -> (B, 320, 2, 2)."""
    total = sum(stage[2] for stage in STAGES)
    blocks: list[nn.Module] = []
    inputs = STEM
    for expansion, outputs, count, kernel, stride in STAGES:
        for index in range(count):
            drop = DROP_CONNECT * len(blocks) / total
            blocks.append(MBConv(inputs, outputs, expansion, kernel, stride if index == 0 else 1, drop))
            inputs = outputs
    return nn.Sequential(*blocks)


def effnet(num_classes: int) -> nn.Sequential:
    """Build EfficientNet-B0: (B, 3, S, S) -> (B, num_classes) logits."""
    tail = head(STAGES[-1][1], num_classes)
    linear = tail.pop("linear")
    return named(
        conv1=nn.Conv2d(3, STEM, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(STEM), swish=nn.SiLU(),
        layers=mbconv_blocks(), **tail, dropout=nn.Dropout(DROPOUT), linear=linear,
    )
