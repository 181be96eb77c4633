"""Exactly k positions as masks, highest score first, ties by position, over one tensor or several together.

Pruning keeps with it; regrowth, which wants a few positions of each tensor by itself, has `positions.top_indices`,
built on the same threshold and the same sampling. Nothing is sorted: the k-th largest score is the threshold, all
that reach it are taken, and what is too many among its equals is dropped, highest flat index first. On the CPU, when
k is small against the number of scores, a sample gives a lower bound of the threshold, so that only the few scores
above the bound are compared; at least k scores must pass the bound, else all are, so the answer is always exact.
"""
from __future__ import annotations

import math
import operator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 13  # scores looked at to find the lower bound


def exact_k_mask(scores: Tensor, k: int, eligible: Tensor | None = None) -> Tensor:
    """Mark the k eligible positions with the highest score.

    Args:
        scores: any shape and device; higher is better. Infinite scores are allowed.
        k: how many positions to mark, 0 <= k <= number of eligible positions.
        eligible: same shape, nonzero where a position may be marked; None means everywhere.

    Returns:
        A bool tensor of the shape of `scores` with exactly k True. Equal scores are taken by position, lowest flat
        (row-major) index first, whatever the memory format.

    Raises:
        ValueError: k is negative or larger than the number of eligible positions, shapes differ, or an eligible
            score is NaN.
    """
    return exact_k_masks([scores], k, None if eligible is None else [eligible])[0]


def exact_k_masks(scores: list[Tensor], k: int, eligible: list[Tensor] | None = None) -> list[Tensor]:
    """Mark the k best eligible positions of several tensors together, as if they were concatenated.

    Args and errors are those of `exact_k_mask`, with one tensor per entry; equal scores are taken in list order, then
    by flat index. All tensors must lie on one device. Returns one bool mask per score tensor.
    """
    k = operator.index(k)
    if eligible is not None and [e.shape for e in eligible] != [s.shape for s in scores]:
        raise ValueError("scores and eligible must have the same shapes")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if not scores:
        check_count(k, 0)
        return []
    scores = [s.detach().to(common_dtype(scores)) for s in scores]
    on_cpu = all(s.device.type == "cpu" for s in scores)
    return (_host_masks if on_cpu else _device_masks)(scores, k, eligible)


def common_dtype(scores: list[Tensor]) -> torch.dtype:
    """float32 where that loses nothing, else float64."""
    exact_in_float32 = (torch.float32, torch.bfloat16, torch.float16, torch.bool)
    return torch.float32 if all(s.dtype in exact_in_float32 for s in scores) else torch.float64


def check_count(k: int, available: int) -> None:
    """Raise ValueError if more positions are asked for than are eligible."""
    if k > available:
        raise ValueError(f"k = {k} is more than the {available} eligible positions")


def sample_rank(expected: float) -> int:
    """A rank in a sample that is hardly ever too high when `expected` of the best scores are expected in it."""
    return int(expected + 4 * math.sqrt(expected) + 8)


# ---- CPU -----------------------------------------------------------------------------------------------------------


class _Flat(NamedTuple):
    """One tensor as 1-D arrays in the order of its memory, so that channels_last tensors need no copy."""

    values: np.ndarray
    allowed: np.ndarray | None  # None: every position is eligible
    shape: tuple[int, ...]
    order: list[int]  # the tensor's dimensions, outermost in memory first

    def restore(self, mask: np.ndarray) -> Tensor:
        """A flat mask as a tensor of the original shape and memory format."""
        in_memory = torch.from_numpy(mask).view([self.shape[dim] for dim in self.order])
        return in_memory.permute([self.order.index(dim) for dim in range(len(self.shape))])


def _flatten(scores: Tensor, eligible: Tensor | None) -> _Flat:
    order = sorted(range(scores.dim()), key=scores.stride, reverse=True)
    values = scores.permute(order).reshape(-1).numpy()
    allowed = None if eligible is None else eligible.detach().bool().permute(order).reshape(-1).numpy()
    if allowed is not None and allowed.all():
        allowed = None
    return _Flat(values, allowed, tuple(scores.shape), order)


def _host_masks(scores: list[Tensor], k: int, eligible: list[Tensor] | None) -> list[Tensor]:
    flats = [_flatten(s, e) for s, e in zip(scores, eligible or [None] * len(scores), strict=True)]
    bound = _lower_bound(flats, k)
    candidates = [_candidates(flat, bound) for flat in flats]
    if bound is not None and sum(c.size for c in candidates) < k:  # the sample misled: look at every eligible score
        candidates = [_candidates(flat, None) for flat in flats]
    threshold = kth_largest(candidates, k)
    masks = [_at_least(flat, threshold) for flat in flats]
    surplus = sum(int(np.count_nonzero(mask)) for mask in masks) - k
    marked = [flat.restore(mask) for flat, mask in zip(flats, masks, strict=True)]
    _drop_last_ties(scores, marked, float(threshold), surplus)
    return marked


def _lower_bound(flats: list[_Flat], k: int) -> np.floating | None:
    """A score that, by a strided sample, a few more than k eligible scores reach; None if that would not save work."""
    step = sum(flat.values.size for flat in flats) // SAMPLE | 1  # odd: out of step with power-of-two shapes
    if step < 8 or k == 0:
        return None
    sample = np.concatenate(
        [f.values[::step] if f.allowed is None else f.values[::step][f.allowed[::step]] for f in flats]
    )
    rank = sample_rank(k / step)
    if rank > sample.size // 4:
        return None
    sample.partition(sample.size - rank)
    return sample[sample.size - rank]


def _candidates(flat: _Flat, bound: np.floating | None) -> np.ndarray:
    """The eligible scores not below the bound (None: all). NaN counts as above, so that it is found."""
    if bound is None:
        return flat.values if flat.allowed is None else flat.values[flat.allowed]
    mask = flat.values < bound
    np.logical_not(mask, out=mask)
    if flat.allowed is not None:
        mask &= flat.allowed
    return flat.values[np.flatnonzero(mask)]  # few are True: 2x faster than indexing by the mask


def kth_largest(candidates: list[np.ndarray], k: int) -> np.floating:
    """The k-th largest score (infinity for k = 0). Raises ValueError on NaN or fewer than k scores."""
    pool = np.concatenate(candidates)
    check_count(k, pool.size)
    if k:
        pool.partition(pool.size - k)
    top = pool[pool.size - k :] if k else pool.max(initial=-np.inf, keepdims=True)
    if np.isnan(top).any():  # NaN sorts above everything
        raise ValueError("scores contain NaN")
    return top[0] if k else pool.dtype.type(np.inf)


def _at_least(flat: _Flat, threshold: np.floating) -> np.ndarray:
    mask = flat.values >= threshold
    return mask if flat.allowed is None else np.logical_and(mask, flat.allowed, out=mask)


def _drop_last_ties(scores: list[Tensor], masks: list[Tensor], threshold: float, surplus: int) -> None:
    """Unmark the last `surplus` positions, by flat index, whose score equals the threshold; changes the masks."""
    for score, mask in zip(reversed(scores), reversed(masks), strict=True):
        if surplus == 0:
            return
        ties = np.flatnonzero((mask & (score == threshold)).reshape(-1).numpy())
        dropped = ties[max(0, len(ties) - surplus) :]
        stays = np.ones(mask.numel(), dtype=bool)
        stays[dropped] = False
        mask &= torch.from_numpy(stays).view(mask.shape)
        surplus -= len(dropped)


# ---- accelerator ---------------------------------------------------------------------------------------------------


def _device_masks(scores: list[Tensor], k: int, eligible: list[Tensor] | None) -> list[Tensor]:
    """The same in PyTorch operations, for tensors on a GPU; the checks cost its only host synchronisation."""
    values = torch.cat([s.reshape(-1) for s in scores])
    allowed = torch.ones_like(values, dtype=torch.bool)
    if eligible is not None:
        allowed = torch.cat([e.detach().reshape(-1).bool() for e in eligible])
        values = torch.where(allowed, values, -torch.inf)
    has_nan, available = torch.stack([values.isnan().any().long(), allowed.sum()]).tolist()
    if has_nan:
        raise ValueError("scores contain NaN")
    check_count(k, available)
    chosen = torch.zeros_like(allowed)
    if k:
        threshold = torch.topk(values, k, sorted=False).values.amin()
        chosen = values > threshold
        ties = (values == threshold) & allowed
        chosen |= ties & (ties.cumsum(0) <= k - chosen.sum())
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]
