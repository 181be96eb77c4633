"""Seeds: one generator per purpose, all derived from the one seed the user gives."""
from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive_seed(0, 'loader')``; different purposes are independent."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator seeded for one purpose (see `derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def global_rng_state() -> dict[str, torch.Tensor]:
    """State of torch's global generators (dropout draws from them), to be put into a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_global_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restores what `global_rng_state` returned; a CUDA state is ignored where there is no CUDA."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
