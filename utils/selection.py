"""Exactly k positions as masks, highest score first, ties by position, over one tensor or several together.

Pruning keeps with it; regrowth, which wants a few positions of each tensor by itself, has `top_indices`,
built on the same threshold and the same sampling. Nothing is sorted: the k-th largest score is the threshold, all
that reach it are taken, and what is too many among its equals is dropped, highest flat index first. On the CPU, when
k is small against the number of scores, a sample gives a lower bound of the threshold, so that only the few scores
above the bound are compared; at least k scores must pass the bound, else all are, so the answer is always exact.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 14  # scores looked at to find a lower bound of the threshold
RUN = 16  # neighbours sampled together


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
    bound = _sampled_bound([flat.values for flat in flats], [flat.allowed for flat in flats], True, k)
    candidates = [_candidates(flat, bound) for flat in flats]
    if bound is not None and sum(c.size for c in candidates) < k:  # the sample misled: look at every eligible score
        candidates = [_candidates(flat, None) for flat in flats]
    threshold = kth_largest(candidates, k)
    masks = [_at_least(flat, threshold) for flat in flats]
    surplus = sum(int(np.count_nonzero(mask)) for mask in masks) - k
    marked = [flat.restore(mask) for flat, mask in zip(flats, masks, strict=True)]
    _drop_last_ties(scores, marked, float(threshold), surplus)
    return marked


def _sampled_bound(values: Sequence[np.ndarray], marks: Sequence[np.ndarray | None], free: int,
                   k: int) -> np.floating | None:
    """A score that, by a sample, a few more than k free scores of all arrays reach; None if that would not save work.

    marks: by array, of its size: a position is free where its mark equals `free`; None: everywhere.
    """
    total = sum(array.size for array in values)
    step = total // SAMPLE | 1  # odd: out of step with power-of-two shapes
    if step < 8 or k == 0:
        return None
    samples = [_every(array, step).ravel() if mark is None else _every(array, step)[_every(mark, step) == free]
               for array, mark in zip(values, marks, strict=True)]
    rank = sample_rank(k * sum(_every(array, step).size for array in values) / total)
    sample = np.concatenate(samples)
    if rank > sample.size // 4:
        return None
    sample.partition(sample.size - rank)
    return sample[sample.size - rank]


def _every(array: np.ndarray, step: int) -> np.ndarray:
    """Every step-th run of `RUN` neighbours: they come in one memory access."""
    runs = array.size // RUN
    return array[: runs * RUN].reshape(runs, RUN)[::step]


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



Indices = TypeVar("Indices", np.ndarray, Tensor)


def flat_view(tensor: Tensor) -> Tensor:
    """The tensor's own memory as a 1-D view; contiguous and channels_last tensors have one, others raise ValueError."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    raise ValueError(f"a tensor of strides {tensor.stride()} is neither contiguous nor channels_last")


def _swap(indices: Indices, rows: int | Tensor, columns: int | Tensor) -> Indices:
    """Indices into row-major blocks of (rows, columns) as indices into the same blocks transposed."""
    inside = indices % (rows * columns)
    row = inside // columns
    return indices - inside + (inside - row * columns) * rows + row


def _blocks(tensor: Tensor) -> tuple[int, int]:
    """(channels, pixels): a block that lies transposed in channels_last memory; (1, 1) for a contiguous tensor."""
    return (1, 1) if tensor.is_contiguous() else (tensor.shape[1], tensor[0, 0].numel())


def _to_memory(indices: Indices, tensor: Tensor) -> Indices:
    """Where flat indices lie in `flat_view(tensor)`."""
    return indices if tensor.is_contiguous() else _swap(indices, *_blocks(tensor))


def _from_memory(places: Indices, tensor: Tensor) -> Indices:
    """The reverse of `_to_memory`."""
    return places if tensor.is_contiguous() else _swap(places, *reversed(_blocks(tensor)))


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


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="map_tensors")


def map_tensors(function: Callable[..., Any], device: torch.device, *columns: Iterable[Any]) -> list[Any]:
    """`map` without gradients over columns that do not depend on each other.

    On the CPU as many threads work as PyTorch may use: NumPy and PyTorch let go of the interpreter while they compute.
    The calling thread takes jobs from the end, so that it never waits for a helper that has not been woken yet.
    """
    function = torch.no_grad()(function)  # grad mode is each thread's own
    jobs, helpers = list(zip(*columns, strict=True)), torch.get_num_threads() - 1
    if device.type != "cpu" or helpers == 0:
        return [function(*job) for job in jobs]
    futures = [_helpers(helpers).submit(function, *job) for job in jobs]
    try:
        pairs = zip(reversed(jobs), reversed(futures), strict=True)
        return [function(*job) if future.cancel() else future.result() for job, future in pairs][::-1]
    finally:  # after an error, leave nothing running
        wait([future for future in futures if not future.cancel()])


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
    first. On an accelerator all are served together, with two host synchronisations in all.
    Raises ValueError if a score in question is NaN.
    """
    if device.type == "cpu":
        return map_tensors(_host_top, device, rankings, counts)
    known = [(number, ranking()) for number, ranking in enumerate(rankings)]
    known = [(number, _aligned(ranking)) for number, ranking in known if ranking is not None]
    found = _device_top([ranking for _, ranking in known], [counts[number] for number, _ in known]) if known else []
    by_number = {number: indices for (number, _), indices in zip(known, found, strict=True)}
    return [by_number.get(number) for number in range(len(rankings))]


def _aligned(ranking: Ranking) -> Ranking:
    """Scores in float32 or float64 and in the memory format of `taken`."""
    scores, taken = (tensor.detach() for tensor in ranking)
    if scores.shape != taken.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)} instead of {tuple(taken.shape)}")
    scores = scores.to(common_dtype([scores]))
    if scores.stride() != taken.stride():
        scores = torch.empty_like(taken, dtype=scores.dtype).copy_(scores)
    return Ranking(scores, taken)


def _host_top(rank: Callable[[], Ranking | None], count: int) -> Tensor | None:
    ranking = rank()
    if ranking is None:
        return None
    scores, tensor = _aligned(ranking)
    values, taken = flat_view(scores).numpy(), flat_view(tensor).numpy()
    bound = _sampled_bound([values], [taken], 0, count)
    places = _free_places(values, taken, bound)
    if bound is not None and places.size < count:  # the sample misled: look at every free score
        places = _free_places(values, taken, None)
    found, count = values.take(places), min(count, places.size)
    threshold = kth_largest([found], count)
    above = _from_memory(places[found > threshold], tensor)
    tied = _from_memory(places[found == threshold], tensor)
    tied.sort(kind="stable")  # fast on what is nearly in order
    chosen = np.concatenate([above, tied[: count - above.size]])
    chosen.sort(kind="stable")
    return torch.from_numpy(chosen)


def _free_places(values: np.ndarray, taken: np.ndarray, bound: np.floating | None) -> np.ndarray:
    """Free positions (in memory order) with a score not below the bound; NaN counts as above, so that it is found."""
    if bound is None:
        return np.flatnonzero(taken == 0)
    mask = values < bound
    np.logical_not(mask, out=mask)
    places = np.flatnonzero(mask)
    return places[taken.take(places) == 0]


def _device_top(rankings: list[Ranking], counts: list[int]) -> list[Tensor]:
    """`top_indices` in PyTorch operations over all tensors at once: the number of kernels hardly grows with them."""
    values = torch.cat([flat_view(ranking.scores) for ranking in rankings])
    taken = torch.cat([flat_view(ranking.taken) for ranking in rankings]) != 0
    sizes = [ranking.scores.numel() for ranking in rankings]
    starts = [0, *accumulate(sizes)][:-1]
    places, owner, found = _device_places(values, taken, sizes, _device_bounds(values, taken, starts, sizes, counts))
    if any(here < count for here, count in zip(found, counts, strict=True)):  # the sample misled, or too few are free
        unbounded = values.new_full((len(sizes),), -torch.inf)
        places, owner, found = _device_places(values, taken, sizes, unbounded)
    flat, order = _device_from_memory(places, owner, rankings, starts).sort()  # so that stable sorts keep ties in order
    best = values[places[order]].sort(descending=True, stable=True).indices
    best = best[owner[best].sort(stable=True).indices]
    parts = zip(flat[best].split(found), counts, strict=True)
    chosen = torch.cat([part[:count] for part, count in parts]).sort().values
    lengths = [min(here, count) for here, count in zip(found, counts, strict=True)]
    return [part - start for part, start in zip(chosen.split(lengths), starts, strict=True)]


def _device_bounds(values: Tensor, taken: Tensor, starts: list[int], sizes: list[int], counts: list[int]) -> Tensor:
    """`_sampled_bound` of every tensor, shape (tensors,); -infinity where it would not save work."""
    first, size = torch.tensor([starts, sizes], device=values.device)[:, :, None]
    places = first + torch.arange(SAMPLE, device=values.device) * size // SAMPLE
    ranked = torch.where(taken[places], -torch.inf, values[places]).sort(dim=1, descending=True).values
    ranks = [sample_rank(SAMPLE * count / size) for count, size in zip(counts, sizes, strict=True)]
    known = [[min(rank, SAMPLE - 1), rank < SAMPLE] for rank in ranks]
    column, useful = torch.tensor(known, device=values.device).T
    return torch.where(useful.bool(), ranked.gather(1, column[:, None])[:, 0], -torch.inf)


def _device_places(values: Tensor, taken: Tensor, sizes: list[int],
                   bounds: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Free positions with a score not below their tensor's bound, the tensor of each, and how many each tensor has."""
    lengths = torch.tensor(sizes, device=values.device)
    limit = bounds.repeat_interleave(lengths, output_size=len(values))
    places = ((values >= limit) & ~taken).nonzero()[:, 0]
    owner = torch.bucketize(places, lengths.cumsum(0), right=True)
    is_nan = (values.isnan() & ~taken).any()
    *found, has_nan = torch.cat([owner.bincount(minlength=len(sizes)), is_nan[None]]).tolist()
    if has_nan:
        raise ValueError("scores contain NaN")
    return places, owner, found


def _device_from_memory(places: Tensor, owner: Tensor, rankings: list[Ranking], starts: list[int]) -> Tensor:
    """`_from_memory` for positions in the concatenation of all tensors."""
    layout = [(start, *reversed(_blocks(r.taken))) for r, start in zip(rankings, starts, strict=True)]
    start, rows, columns = torch.tensor(layout, device=places.device)[owner].unbind(1)
    return start + _swap(places - start, rows, columns)


# ---- at random -----------------------------------------------------------------------------------------------------


def random_indices(taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` free positions (where `taken` is 0) drawn from a CPU generator, every subset equally likely.

    Returns ascending int64 flat indices on the device of `taken`; they depend on which positions are free and on the
    generator, not on device or memory format. Raises ValueError if fewer are free.
    """
    free = flat_view(taken.detach()).cpu().numpy() == 0
    available = int(np.count_nonzero(free))
    check_count(count, available)
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
    return torch.from_numpy(chosen).to(taken.device)
