"""ShuffleNet V2, twice the base width, for 32x32 images.

Ma et al. 2018, "ShuffleNet V2: practical guidelines for efficient CNN architecture design" (arXiv 1807.11164), table 5,
column 2x (whose first stage is 224 wide in the published checkpoints, 244 in the paper). CIFAR practice: a stem of
stride 1 without pooling. Weights start from PyTorch's default distribution.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.models.layers import head, named

STEM = 24
STAGES = ((224, 4), (488, 8), (976, 4))
LAST = 2048


def interleave(left: Tensor, right: Tensor) -> Tensor:
    """Return the channels left[0], right[0], left[1], right[1], …: (B, C, H, W) twice -> (B, 2C, H, W).

    Equals a concatenation followed by a channel shuffle of two groups, in one copy that comes out channels_last.
    """
    pairs = torch.stack([left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)], dim=-1)
    return pairs.flatten(3).permute(0, 3, 1, 2)


def pointwise(inputs: int, outputs: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a 1x1 convolution and its normalisation."""
    return nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)


def depthwise(channels: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a 3x3 convolution of each map by itself and its normalisation."""
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return conv, nn.BatchNorm2d(channels)


class Unit(nn.Module):
    """Basic unit (figure 3c): half of the channels pass, half are transformed; keeps (B, channels, H, W)."""

    def __init__(self, channels: int) -> None:
        """Build the transforming branch, on half of the channels."""
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = pointwise(half, half)
        self.conv2, self.bn2 = depthwise(half, 1)
        self.conv3, self.bn3 = pointwise(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """Return the passed and the transformed channels, interleaved."""
        passed, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        return interleave(passed, F.relu(self.bn3(self.conv3(out)), inplace=True))


class DownUnit(nn.Module):
    """Down-sampling unit (figure 3d), two branches: (B, inputs, H, W) -> (B, outputs, H / 2, W / 2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Build the branches, each making half of the output channels."""
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = depthwise(inputs, 2)
        self.conv2, self.bn2 = pointwise(inputs, half)
        self.conv3, self.bn3 = pointwise(inputs, half)
        self.conv4, self.bn4 = depthwise(half, 2)
        self.conv5, self.bn5 = pointwise(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """Return both branches, interleaved."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        return interleave(left, F.relu(self.bn5(self.conv5(right)), inplace=True))


def shufflenetv2(num_classes: int) -> nn.Sequential:
    """Build ShuffleNet V2 2x: (B, 3, S, S) -> (B, num_classes) logits."""
    stages = {}
    inputs = STEM
    for stage, (width, count) in enumerate(STAGES, start=1):
        stages[f"layer{stage}"] = nn.Sequential(DownUnit(inputs, width), *(Unit(width) for _ in range(1, count)))
        inputs = width
    conv2, bn2 = pointwise(inputs, LAST)
    return named(
        conv1=nn.Conv2d(3, STEM, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(STEM), relu1=nn.ReLU(inplace=True),
        **stages, conv2=conv2, bn2=bn2, relu2=nn.ReLU(inplace=True), **head(LAST, num_classes),
    )
