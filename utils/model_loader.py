"""Build a model by name."""
from __future__ import annotations

import torch
from torch import nn

from utils.common import UserError
from utils.models import MODELS


def model_loader(
    m_name: str, device: str | torch.device = "cpu", num_classes: int = 10, seed: int | None = None
) -> nn.Module:
    """Return a new network `m_name` in training mode on `device`, its weights in channels_last memory format.

    It maps normalised images (B, 3, S, S), made for S = 32, to logits (B, num_classes). With `seed`, the initial
    weights are a function of the seed alone, the same on every device, and no global random state moves; without, they
    come from the global generator. Raises UserError for an unknown name.
    """
    if m_name not in MODELS:
        raise UserError(f"unknown model {m_name!r}; known models: {', '.join(MODELS)}")
    # Weights are drawn on the CPU: fork and seed its generator alone (torch.manual_seed would move the GPUs' too).
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = MODELS[m_name](num_classes)
    return model.to(device=device, memory_format=torch.channels_last)


def check_image_size(m_name: str, size: int) -> None:
    """UserError when the network `m_name` cannot take images of size x size pixels, naming the least it takes."""
    model = model_loader(m_name, seed=0).to("meta").eval()

    def runs(side: int) -> bool:
        try:
            model(torch.empty(1, 3, side, side, device="meta"))
        except RuntimeError:
            return False
        return True

    if not runs(size):
        least = next((f"; the smallest it takes are {side}x{side}" for side in range(size, 257) if runs(side)), "")
        raise UserError(f"--image_size {size}: {m_name} cannot take images of {size}x{size} pixels{least}")
