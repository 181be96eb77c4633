"""GoogLeNet for 32x32 images.

Szegedy et al. 2015, "Going deeper with convolutions" (arXiv 1409.4842), table 1. CIFAR practice: a 3x3 stem of
stride 1, batch normalisation after every convolution, the 5x5 branch as two 3x3 convolutions (Szegedy et al. 2016,
arXiv 1512.00567), neither auxiliary classifiers nor dropout.
Weights start from PyTorch's default distribution.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.models.layers import head, named

# Maps of each branch: 1x1; 3x3 (reduced, final); 5x5 (reduced, final); pooled.
INCEPTIONS = {
    "a3": (64, 96, 128, 16, 32, 32), "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64), "b4": (160, 112, 224, 24, 64, 64), "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64), "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128), "b5": (384, 192, 384, 48, 128, 128),
}


def conv_bn_relu(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Return a convolution that keeps H and W, its normalisation and its activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class Inception(nn.Module):
    """Four branches side by side: (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, n1: int, reduce3: int, n3: int, reduce5: int, n5: int, pooled: int) -> None:
        """Build the branches; `outputs` is the number of maps they make together."""
        super().__init__()
        self.outputs = n1 + n3 + n5 + pooled
        self.b1 = nn.Sequential(*conv_bn_relu(inputs, n1, 1))
        self.b2 = nn.Sequential(*conv_bn_relu(inputs, reduce3, 1), *conv_bn_relu(reduce3, n3, 3))
        self.b3 = nn.Sequential(
            *conv_bn_relu(inputs, reduce5, 1), *conv_bn_relu(reduce5, n5, 3), *conv_bn_relu(n5, n5, 3)
        )
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *conv_bn_relu(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' maps, concatenated."""
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1)


def googlenet(num_classes: int) -> nn.Sequential:
    """Build GoogLeNet: (B, 3, S, S) -> (B, num_classes) logits."""
    width = 192
    children: dict[str, nn.Module] = {"pre_layers": nn.Sequential(*conv_bn_relu(3, width, 3))}
    for name, plan in INCEPTIONS.items():
        if name in ("a4", "a5"):
            children[f"{name}_pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        children[name] = Inception(width, *plan)
        width = children[name].outputs
    return named(**children, **head(width, num_classes))
