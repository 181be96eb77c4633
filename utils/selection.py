"""Exactly k positions, highest score first, ties by position: of several tensors together, or of each by itself.

Pruning keeps with `exact_k_masks`; regrowth, which wants a few positions of each tensor, has `top_indices` and, at
random, `random_indices`. The k-th largest score is the threshold; what is too many among its equals is dropped, highest
flat index first. When k is small against the number of scores, a sample gives a lower bound of the threshold, so that
only the few scores above it are compared; at least k must pass the bound, else all do, so the answer is always exact.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.common import map_tensors

SAMPLE = 1 << 14  # scores looked at to find a lower bound of the threshold
RUN = 16  # neighbours sampled together


def exact_k_mask(scores: Tensor, k: int, eligible: Tensor | None = None) -> Tensor:
    """`exact_k_masks` of one tensor: a bool tensor of its shape with exactly k True."""
    return exact_k_masks([scores], k, None if eligible is None else [eligible])[0]


def exact_k_masks(scores: list[Tensor], k: int, eligible: list[Tensor] | None = None) -> list[Tensor]:
    """Mark the k eligible positions with the highest scores of several tensors together, as if they were concatenated.

    scores: any shapes, on one device, infinite ones allowed; eligible: of the same shapes, nonzero where a position may
    be marked (None: everywhere). Returns one bool mask per tensor; equal scores are taken in list order, then by flat
    (row-major) index, lowest first, whatever the memory format. Raises ValueError if shapes differ, k is negative or
    more than what is eligible, or an eligible score is NaN.
    """
    k = operator.index(k)
    if eligible is not None and [e.shape for e in eligible] != [s.shape for s in scores]:
        raise ValueError("scores and eligible must have the same shapes")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if not scores:
        _check_count(k, 0)
        return []
    dtype = _exact_dtype(scores)
    scores = [s.detach().to(dtype) for s in scores]
    on_cpu = all(s.device.type == "cpu" for s in scores)
    return (_host_masks if on_cpu else _device_masks)(scores, k, eligible)


def _exact_dtype(scores: list[Tensor]) -> torch.dtype:
    """float32 where that loses nothing, else float64."""
    exact_in_float32 = (torch.float32, torch.bfloat16, torch.float16, torch.bool)
    return torch.float32 if all(s.dtype in exact_in_float32 for s in scores) else torch.float64


def _check_count(k: int, available: int) -> None:
    if k > available:
        raise ValueError(f"k = {k} is more than the {available} eligible positions")


def _host_masks(scores: list[Tensor], k: int, eligible: list[Tensor] | None) -> list[Tensor]:
    """On the CPU, over the tensors' own memory."""
    scores = [s if _is_dense(s) else s.contiguous() for s in scores]
    values = [flat_view(s).numpy() for s in scores]
    taken = [_taken(s, e) for s, e in zip(scores, eligible or [None] * len(scores), strict=True)]
    places = _contenders(values, taken, k)
    threshold = _kth_largest([array[at] for array, at in zip(values, places, strict=True)], k)
    masks = [torch.empty_like(s, dtype=torch.bool) for s in scores]
    surplus = -k
    for mask, array, barred in zip(masks, values, taken, strict=True):
        flat = flat_view(mask).numpy()
        np.greater_equal(array, threshold, out=flat)
        if barred is not None:
            np.greater(flat, barred, out=flat)
        surplus += int(np.count_nonzero(flat))
    for score, mask in zip(reversed(scores), reversed(masks), strict=True):  # too many are equal to the threshold
        if surplus:
            ties = np.flatnonzero((mask & (score == float(threshold))).reshape(-1).numpy())[-surplus:]
            Positions(torch.from_numpy(ties)).write(mask, False)
            surplus -= len(ties)
    return masks


def _taken(scores: Tensor, eligible: Tensor | None) -> np.ndarray | None:
    """bool, True where not eligible, in the order of the scores' memory; None where every position is eligible."""
    if eligible is None:
        return None
    free = flat_view(_laid_out_as(eligible.detach(), scores)).numpy()
    return None if free.all() else np.logical_not(free)


def _device_masks(scores: list[Tensor], k: int, eligible: list[Tensor] | None) -> list[Tensor]:
    """On an accelerator, in PyTorch operations; the checks cost its only host synchronisation."""
    values = torch.cat([s.reshape(-1) for s in scores])
    allowed = torch.ones_like(values, dtype=torch.bool)
    if eligible is not None:
        allowed = torch.cat([e.detach().reshape(-1).bool() for e in eligible])
        values = torch.where(allowed, values, -torch.inf)
    has_nan, available = torch.stack([values.isnan().any().long(), allowed.sum()]).tolist()
    if has_nan:
        raise ValueError("scores contain NaN")
    _check_count(k, available)
    threshold = torch.topk(values, k, sorted=False).values.amin() if k else values.new_tensor(torch.inf)
    chosen = values > threshold
    ties = (values == threshold) & allowed
    chosen |= ties & (ties.cumsum(0) <= k - chosen.sum())
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


# ---- the threshold, on the CPU -------------------------------------------------------------------------------------


def _contenders(values: list[np.ndarray], taken: list[np.ndarray | None], k: int) -> list[np.ndarray | slice]:
    """By array, where the free scores lie that may be among the k largest of all arrays: at least k, if so many are.

    values: flat. taken: of the same sizes, 0 where a position is free; None: everywhere.
    """
    bound = _sampled_bound(values, taken, k)
    places = [_places(*pair, bound) for pair in zip(values, taken, strict=True)]
    if bound is not None and sum(len(at) for at in places) < k:  # the sample misled: look at every free score
        places = [_places(*pair, None) for pair in zip(values, taken, strict=True)]
    return places


def _sampled_bound(values: list[np.ndarray], taken: list[np.ndarray | None], k: int) -> np.floating | None:
    """A score that, by a sample, a few more than k free ones reach; None if that would not save work."""
    total = sum(array.size for array in values)
    step = total // SAMPLE | 1  # odd: out of step with power-of-two shapes
    if step < 8 or k == 0:
        return None
    looked_at = [_every(array, step) for array in values]
    sample = np.concatenate([array.ravel() if barred is None else array[_every(barred, step) == 0]
                             for array, barred in zip(looked_at, taken, strict=True)])
    rank = _sample_rank(k * sum(array.size for array in looked_at) / total)
    if rank > sample.size // 4:
        return None
    sample.partition(sample.size - rank)
    return sample[sample.size - rank]


def _sample_rank(expected: float) -> int:
    """Sample rank whose score rarely exceeds the threshold, given the `expected` number of top scores in the sample."""
    return int(expected + 4 * math.sqrt(expected) + 8)


def _every(array: np.ndarray, step: int) -> np.ndarray:
    """Every step-th run of `RUN` neighbours: they come in one memory access."""
    runs = array.size // RUN
    return array[: runs * RUN].reshape(runs, RUN)[::step]


def _places(values: np.ndarray, taken: np.ndarray | None, bound: np.floating | None) -> np.ndarray | slice:
    """Where the free scores lie that are not below the bound; NaN counts as above, so that it is found."""
    if bound is None:
        return slice(None) if taken is None else np.flatnonzero(taken == 0)
    mask = values < bound
    np.logical_not(mask, out=mask)
    places = np.flatnonzero(mask)
    return places if taken is None else places[taken[places] == 0]


def _kth_largest(scores: list[np.ndarray], k: int) -> np.floating:
    """The k-th largest score (infinity for k = 0). Raises ValueError on NaN or fewer than k scores."""
    pool = np.concatenate(scores)
    _check_count(k, pool.size)
    if np.isnan(pool.max(initial=-np.inf)):
        raise ValueError("scores contain NaN")
    if k == 0:
        return pool.dtype.type(np.inf)
    pool.partition(pool.size - k)
    return pool[pool.size - k]


# ---- the best ------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """How the positions of one tensor rank."""

    scores: Tensor  # higher is better
    taken: Tensor  # same shape; nonzero where a position may not be chosen


def top_indices(rankings: Sequence[Callable[[], Ranking | None]], counts: Sequence[int],
                device: torch.device) -> list[Tensor | None]:
    """The best free positions of each tensor by itself: counts[i] of tensor i, or all if fewer are free.

    rankings: called by `map_tensors` on the CPU, so that few of their temporary tensors exist at a time. Returns
    ascending int64 flat indices; None where the ranking is None. Equal scores are taken by position, lowest flat index
    first. On an accelerator all are served together. Raises ValueError if a score in question is NaN.
    """
    if device.type == "cpu":
        return map_tensors(_host_top, device, rankings, counts)
    found = [ranking() for ranking in rankings]
    known = [(_checked(ranking), count) for ranking, count in zip(found, counts, strict=True) if ranking is not None]
    best = iter(_device_top(*zip(*known, strict=True)) if known else ())
    return [None if ranking is None else next(best) for ranking in found]


def _checked(ranking: Ranking) -> Ranking:
    """With scores in float32 or float64, without a graph."""
    scores, taken = (tensor.detach() for tensor in ranking)
    if scores.shape != taken.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)} instead of {tuple(taken.shape)}")
    return Ranking(scores.to(_exact_dtype([scores])), taken)


def _host_top(rank: Callable[[], Ranking | None], count: int) -> Tensor | None:
    ranking = rank()
    if ranking is None:
        return None
    scores, tensor = _checked(ranking)
    values, taken = flat_view(_laid_out_as(scores, tensor)).numpy(), flat_view(tensor).numpy()
    places = _contenders([values], [taken], count)[0]
    found, count = values[places], min(count, places.size)
    threshold = _kth_largest([found], count)
    above = _from_memory(places[found > threshold], tensor)
    tied = _from_memory(places[found == threshold], tensor)
    tied.sort(kind="stable")  # fast on what is nearly in order
    chosen = np.concatenate([above, tied[: count - above.size]])
    chosen.sort(kind="stable")
    return torch.from_numpy(chosen)


def _device_top(rankings: Sequence[Ranking], counts: Sequence[int]) -> list[Tensor]:
    """`top_indices` in PyTorch operations over all tensors at once: the number of kernels hardly grows with them."""
    values = torch.cat([ranking.scores.reshape(-1) for ranking in rankings])
    taken = torch.cat([ranking.taken.reshape(-1) for ranking in rankings]) != 0
    sizes = [ranking.scores.numel() for ranking in rankings]
    places, owner, found = _device_places(values, taken, sizes, _device_bounds(values, taken, sizes, counts))
    if any(here < count for here, count in zip(found, counts, strict=True)):  # the sample misled, or too few are free
        unbounded = values.new_full((len(sizes),), -torch.inf)
        places, owner, found = _device_places(values, taken, sizes, unbounded)
    best = values[places].sort(descending=True, stable=True).indices  # places ascend: equal scores stay by position
    best = best[owner[best].sort(stable=True).indices]
    parts = zip(places[best].split(found), counts, strict=True)
    chosen = torch.cat([part[:count] for part, count in parts]).sort().values
    lengths = [min(here, count) for here, count in zip(found, counts, strict=True)]
    starts = [0, *accumulate(sizes)][:-1]
    return [part - start for part, start in zip(chosen.split(lengths), starts, strict=True)]


def _device_bounds(values: Tensor, taken: Tensor, sizes: list[int], counts: Sequence[int]) -> Tensor:
    """`_sampled_bound` of every tensor, shape (tensors,); -infinity where it would not save work."""
    size = torch.tensor(sizes, device=values.device)[:, None]
    places = size.cumsum(0) - size + torch.arange(SAMPLE, device=values.device) * size // SAMPLE
    ranked = torch.where(taken[places], -torch.inf, values[places]).sort(dim=1, descending=True).values
    ranks = [_sample_rank(SAMPLE * count / size) for count, size in zip(counts, sizes, strict=True)]
    known = [[min(rank, SAMPLE - 1), rank < SAMPLE] for rank in ranks]
    column, useful = torch.tensor(known, device=values.device).T
    return torch.where(useful.bool(), ranked.gather(1, column[:, None])[:, 0], -torch.inf)


def _device_places(values: Tensor, taken: Tensor, sizes: list[int], bounds: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Free positions with a score not below their tensor's bound, the tensor of each, and how many each tensor has."""
    limit = torch.cat([bound.expand(size) for bound, size in zip(bounds, sizes, strict=True)])
    ends = torch.tensor([*accumulate(sizes)], device=values.device)
    places = ((values >= limit) & ~taken).nonzero()[:, 0]
    owner = torch.bucketize(places, ends, right=True)
    is_nan = (values.isnan() & ~taken).any()
    *upto, has_nan = torch.cat([torch.searchsorted(places, ends), is_nan[None]]).tolist()
    if has_nan:
        raise ValueError("scores contain NaN")
    return places, owner, [after - before for before, after in pairwise([0, *upto])]


# ---- at random -----------------------------------------------------------------------------------------------------


def random_indices(taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` free positions (where `taken` is 0), every subset equally likely; all three are on the CPU.

    Returns ascending int64 flat indices; they depend on which positions are free and on the generator, not on the
    memory format. Raises ValueError if fewer are free.
    """
    free = flat_view(taken.detach()).numpy() == 0
    available = int(np.count_nonzero(free))
    _check_count(count, available)
    complement = count > available // 2  # draw the smaller part: what is chosen or what is left out
    wanted = missing = available - count if complement else count
    drawn = np.zeros(free.size, dtype=bool)
    while missing:  # draws with replacement until `wanted` distinct ones are there, never more
        draws = torch.randint(free.size, (math.ceil(missing * free.size / available),), generator=generator).numpy()
        drawn[draws[free[_to_memory(draws, taken)]][:missing]] = True
        missing = wanted - int(np.count_nonzero(drawn))
    chosen = np.flatnonzero(drawn)
    if complement:
        everything = np.sort(_from_memory(np.flatnonzero(free), taken))
        chosen = everything[~drawn[everything]]
    return torch.from_numpy(chosen)


# ---- where flat indices lie in memory ------------------------------------------------------------------------------


def flat_view(tensor: Tensor) -> Tensor:
    """The tensor's own memory as a 1-D view; contiguous and channels_last tensors have one, others raise ValueError."""
    if not _is_dense(tensor):
        raise ValueError(f"a tensor of strides {tensor.stride()} is neither contiguous nor channels_last")
    return (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).view(-1)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _laid_out_as(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory format of another one of its shape."""
    return tensor if tensor.stride() == model.stride() else torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def _to_memory(indices: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Where flat indices lie in `flat_view(tensor)`."""
    return indices if tensor.is_contiguous() else _transposed(indices, tensor.shape[1], tensor[0, 0].numel())


def _from_memory(places: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The reverse of `_to_memory`."""
    return places if tensor.is_contiguous() else _transposed(places, tensor[0, 0].numel(), tensor.shape[1])


def _transposed(indices: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Indices into row-major blocks of (rows, columns) as indices into the same blocks transposed."""
    inside = indices % (rows * columns)
    row = inside // columns
    return indices - inside + (inside - row * columns) * rows + row


class Positions:
    """Distinct flat indices into tensors of one shape, in any memory format; reads and writes values there."""

    def __init__(self, indices: Tensor):
        """indices: int64 (n,), on the device of the tensors to come."""
        self.indices = indices
        self._places: dict[tuple[int, ...], Tensor] = {}  # strides -> where the indices lie in that memory

    def read(self, tensor: Tensor) -> Tensor:
        """The values there, (n,), detached."""
        tensor = tensor.detach()
        if tensor.device.type != "cpu":
            return tensor.take(self.indices)
        return flat_view(tensor).index_select(0, self._in_memory(tensor))  # 9x faster than `take` of channels_last

    def write(self, tensor: Tensor, values: Tensor | float) -> None:
        """Put values (n,), or one for all, there, in place and unseen by autograd."""
        tensor = tensor.detach()
        if not isinstance(values, Tensor):
            values = torch.full(self.indices.shape, values, device=tensor.device)
        if tensor.device.type != "cpu":
            tensor.put_(self.indices, values.to(tensor))
        else:
            flat_view(tensor).index_copy_(0, self._in_memory(tensor), values.to(tensor))

    def _in_memory(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return self.indices
        if tensor.stride() not in self._places:
            self._places[tensor.stride()] = torch.from_numpy(_to_memory(self.indices.numpy(), tensor))
        return self._places[tensor.stride()]
