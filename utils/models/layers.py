"""Pieces that several architectures share."""
from __future__ import annotations

from torch import nn


def named(**children: nn.Module) -> nn.Sequential:
    """Run `children` one after the other under their keyword names, which become the state-dict prefixes."""
    model = nn.Sequential()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def head(width: int, num_classes: int) -> dict[str, nn.Module]:
    """Return global average pooling and the linear classifier: (B, width, H, W) -> (B, num_classes) logits."""
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(width, num_classes)}


def kaiming_init_(model: nn.Module) -> nn.Module:
    """Draw every convolution from N(0, 2 / fan_out), zero its bias, in place; return the model.

    He et al. 2015 (arXiv 1502.01852), eq. 14: keeps the gradient's variance through a stack of ReLU layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
