"""VGG16 with batch normalisation for 32x32 images.

Simonyan and Zisserman 2015, "Very deep convolutional networks for large-scale image recognition" (arXiv 1409.1556),
configuration D. CIFAR practice: batch normalisation after every convolution, and one linear layer in place of the
three of the paper (the five poolings leave 512 maps of one pixel; of larger images the mean of several), without
dropout.
Convolutions start from Kaiming's normal distribution, the classifier from PyTorch's default.
"""
from __future__ import annotations

from torch import nn

from utils.models.layers import kaiming_init_, named

STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


def vgg16(num_classes: int) -> nn.Sequential:
    """Build VGG16: (B, 3, S, S) -> (B, num_classes) logits."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in STAGES:
        for width in stage:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    model = named(features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                  classifier=nn.Linear(inputs, num_classes))
    return kaiming_init_(model)
