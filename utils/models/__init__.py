"""Image classifiers for RGB images of 32x32 and other sizes, one file per architecture family.

`MODELS` maps a name to a function of `num_classes` that builds the network; it also feeds the scripts' `choices`.
Layer names, shapes and order are those of the published checkpoints. Adding a model takes a file and one line here.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from utils.models.alexnet import alexnet
from utils.models.densenet import densenet
from utils.models.effnet import effnet
from utils.models.googlenet import googlenet
from utils.models.resnet import cifar_resnet, resnet18
from utils.models.shufflenetv2 import shufflenetv2
from utils.models.vgg import vgg16

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": partial(cifar_resnet, 20),
    "resnet32": partial(cifar_resnet, 32),
    "resnet44": partial(cifar_resnet, 44),
    "resnet56": partial(cifar_resnet, 56),
    "resnet18": resnet18,
    "vgg16": vgg16,
    "alexnet": alexnet,
    "densenet": densenet,
    "googlenet": googlenet,
    "effnet": effnet,
    "shufflenetv2": shufflenetv2,
}
