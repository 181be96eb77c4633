"""Residual networks: He et al. 2016, "Deep residual learning for image recognition" (arXiv 1512.03385).

`cifar_resnet` is the 6n+2 family of the paper's section 4.2, `resnet18` its ImageNet network with the stem cut down
for 32x32 images (3x3 convolution of stride 1, no max pooling). Every shortcut that changes shape is a 1x1
convolution with batch normalisation (the paper's option B), as the published checkpoints have it.
Convolutions start from Kaiming's normal distribution, the classifier from PyTorch's default.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from utils.models.layers import head, kaiming_init_, named


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a size-keeping convolution (but for the stride) and the normalisation that follows it."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Build the block; the shortcut is the identity unless the shape changes."""
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs, 3, 1)
        same_shape = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*(() if same_shape else conv_bn(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + shortcut(x))."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def resnet(width: int, blocks: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build a stem of `width` channels and one stage per entry of `blocks`; a stage halves H and W, doubles the width.

    (B, 3, S, S) -> (B, num_classes) logits. The first stage keeps the stem's size and width.
    """
    conv1, bn1 = conv_bn(3, width, 3, 1)
    stages = {}
    inputs = width
    for stage, count in enumerate(blocks):
        outputs = width << stage
        first = BasicBlock(inputs, outputs, stride=1 if stage == 0 else 2)
        stages[f"layer{stage + 1}"] = nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(1, count)))
        inputs = outputs
    model = named(conv1=conv1, bn1=bn1, relu=nn.ReLU(inplace=True), **stages, **head(inputs, num_classes))
    return kaiming_init_(model)


def cifar_resnet(depth: int, num_classes: int) -> nn.Sequential:
    """Build the CIFAR network of `depth` = 6n+2 layers: three stages of n blocks, 16, 32 and 64 channels.

    Raises ValueError for a depth that is not 6n+2.
    """
    count, rest = divmod(depth - 2, 6)
    if rest or count < 1:
        raise ValueError(f"a CIFAR ResNet has 6n+2 layers, not {depth}")
    return resnet(16, [count] * 3, num_classes)


def resnet18(num_classes: int) -> nn.Sequential:
    """Build ResNet-18: four stages of two blocks, 64 to 512 channels."""
    return resnet(64, [2] * 4, num_classes)
