"""Number formats: which one `auto` means on a device, and the autocast context that applies it."""
from __future__ import annotations

import contextlib

import torch

from utils.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16")


def has_native_bf16(device: torch.device) -> bool:
    """True for GPUs that support bfloat16 and for CPUs whose units multiply it (AVX512-BF16, AMX, Arm BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        with open("/proc/cpuinfo") as file:
            words = set(next((line for line in file if line.startswith(("flags", "Features"))), "").split())
    except OSError:  # no Linux: emulated bfloat16 is slower than float32, so do not guess
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def resolve_precision(name: str, device: torch.device) -> str:
    """'fp32' or 'bf16'; 'auto' takes bf16 where the hardware multiplies it natively. UserError for another name."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision '{name}'; known: {', '.join(PRECISIONS)}")
    if name == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    return name


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Context in which convolutions and matrix products run in `precision` ('fp32' or 'bf16'); weights stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
