"""AlexNet for 32x32 images.

Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks": five convolutions, three
poolings, ReLU, dropout 0.5 before the classifier. CIFAR practice: 3x3 kernels throughout, stride 2 in the first
layer, 2x2 poolings, and one linear layer on the remaining 256 maps of 2x2 pixels (to which larger ones are averaged).
No normalisation layers.
Weights start from PyTorch's default distribution.
"""
from __future__ import annotations

from torch import nn

from utils.models.layers import named


def alexnet(num_classes: int) -> nn.Sequential:
    """Build AlexNet: (B, 3, S, S) -> (B, num_classes) logits."""
    # ReLU is not in place here: it would overwrite the convolution's output under a forward hook that kept it.
    features = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(256 * 2 * 2, num_classes))
    return named(features=features, pool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten(), classifier=classifier)
