"""How many weights each layer gets: allocation rules on plain numbers, apart from scores and masks."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch

from utils.common import UserError, needs


def apportion(shares: Sequence[float], total: int, capacity: Sequence[int]) -> list[int]:
    """Divide a whole number among layers in proportion to their shares, none above its capacity.

    A layer whose part would exceed its capacity is filled, and the rest is divided anew among the others. Parts are
    rounded by largest remainder (Hamilton's method), equal remainders by position. A layer with share zero gets
    something only when all others are full; such layers then share in proportion to their capacity. The arithmetic
    is exact (rational), so equal shares are equal. Returns one integer per layer, in all min(total, sum(capacity)).
    Raises ValueError where lengths differ, a share is negative or not finite, or another number negative.
    """
    if len(shares) != len(capacity):
        raise ValueError(f"{len(shares)} shares for {len(capacity)} capacities")
    if any(not math.isfinite(share) or share < 0 for share in shares):
        raise ValueError(f"shares must be finite and not negative: {list(shares)}")
    if total < 0 or any(limit < 0 for limit in capacity):
        raise ValueError("total and capacity must not be negative")
    parts = _fill([Fraction(float(share)) for share in shares], total, capacity)
    if left := total - sum(parts):  # all layers with a share are full
        room = [limit - part for limit, part in zip(capacity, parts, strict=True)]
        extra = _fill([Fraction(free) for free in room], left, room)
        parts = [part + more for part, more in zip(parts, extra, strict=True)]
    return parts


def _fill(shares: list[Fraction], total: int, capacity: Sequence[int]) -> list[int]:
    """`apportion` among the layers with a positive share only."""
    parts = [0] * len(shares)
    open_ = [i for i, share in enumerate(shares) if share > 0]
    left = total
    while open_:
        scale = left / sum(shares[i] for i in open_)
        full = [i for i in open_ if shares[i] * scale >= capacity[i]]
        if not full:
            exact = {i: shares[i] * scale for i in open_}
            parts = [math.floor(exact.get(i, part)) for i, part in enumerate(parts)]
            by_remainder = sorted(open_, key=lambda i: parts[i] - exact[i])  # stable: ties stay by position
            for i in by_remainder[:left - sum(parts[i] for i in open_)]:
                parts[i] += 1
            break
        for i in full:
            parts[i] = int(capacity[i])
        left -= sum(parts[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    return parts


@dataclass(frozen=True)
class AllocationProblem:
    """Where a budget of weights may return: one entry per layer, in the order of priority.

    Raises ValueError for entries that do not fit together, so that no allocator needs to.
    """

    layers: tuple[str, ...]  # names, lowest SSIM (most drift) first
    capacities: tuple[int, ...]  # pruned weights, the most that can return
    budget: int  # weights to regrow, K
    sizes: tuple[int, ...]  # weights, pruned or not
    fan: tuple[int, ...]  # sum of the dimensions of the weight tensor (for ERK)
    drift: tuple[float, ...] | None = None  # SSIM, increasing; None when it was not measured
    lacking: tuple[int, ...] | None = None  # of `utils.pruning.lacking_weights`; None when they were not counted

    def __post_init__(self) -> None:
        columns = [self.capacities, self.sizes, self.fan]
        columns += [column for column in (self.drift, self.lacking) if column is not None]
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be distinct and at least one: {self.layers}")
        if any(len(column) != len(self.layers) for column in columns):
            raise ValueError(f"{len(self.layers)} layers, but columns of {[len(column) for column in columns]}")
        if self.budget < 0 or min(self.fan) <= 0:
            raise ValueError("the budget must not be negative and every fan must be positive")
        if any(not 0 <= capacity <= size for capacity, size in zip(self.capacities, self.sizes, strict=True)):
            raise ValueError("a capacity must be between 0 and the size of its layer")
        if self.drift is not None and not all(low <= high for low, high in pairwise((*self.drift, math.inf))):
            raise ValueError(f"layers must be in the order of priority, lowest SSIM first: {self.drift}")

    @property
    def spend(self) -> int:
        """What every allocation sums to: the budget, or the total capacity if that is less."""
        return min(self.budget, sum(self.capacities))


def spend_ratio(ratio: float, capacity: int, remaining: int) -> int:
    """The ratio in [0, 1] of min(capacity, remaining), to the nearest whole weight, halves up."""
    return math.floor(ratio * min(capacity, remaining) + 0.5)


def ratios_to_allocation(ratios: Sequence[float], capacities: Sequence[int], budget: int) -> tuple[int, ...]:
    """Spend a budget layer by layer, each layer taking its ratio of what it could take.

    In order of priority a layer gets `spend_ratio` of its capacity and of what is left. What no layer took is handed
    to the layers in order of priority, each filled up, so that every allocation spends the same: in all exactly
    min(budget, sum(capacities)). Raises ValueError where lengths differ, a ratio is outside [0, 1] or a number below 0.
    """
    if len(ratios) != len(capacities):
        raise ValueError(f"{len(ratios)} ratios for {len(capacities)} capacities")
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios must be between 0 and 1: {list(ratios)}")
    if budget < 0 or any(capacity < 0 for capacity in capacities):
        raise ValueError("budget and capacities must not be negative")
    parts, remaining = [], budget
    for ratio, capacity in zip(ratios, capacities, strict=True):
        parts.append(spend_ratio(ratio, capacity, remaining))
        remaining -= parts[-1]
    for i, capacity in enumerate(capacities):
        extra = min(capacity - parts[i], remaining)
        parts[i] += extra
        remaining -= extra
    return tuple(parts)


def shares_near(problem: AllocationProblem, allocation: Sequence[int], distance: float) -> list[float]:
    """Each layer's share of an allocation, moved by `distance` in (0, 1] of the way to its share of the capacity.

    In all 1, and positive for every layer with capacity; 1 gives the proportional shares.
    """
    capacity, given = max(1, sum(problem.capacities)), max(1, sum(allocation))
    return [distance * limit / capacity + (1 - distance) * part / given
            for limit, part in zip(problem.capacities, allocation, strict=True)]


def proportional(problem: AllocationProblem, _generator: torch.Generator) -> tuple[int, ...]:
    """The same fraction of every layer's capacity."""
    return tuple(apportion(problem.capacities, problem.budget, problem.capacities))


def uniform(problem: AllocationProblem, _generator: torch.Generator) -> tuple[int, ...]:
    """The same number for every layer; what a full layer cannot take is divided equally among the others."""
    return tuple(apportion([1] * len(problem.layers), problem.budget, problem.capacities))


@needs("drift")
def greedy(problem: AllocationProblem, _generator: torch.Generator) -> tuple[int, ...]:
    """Lowest SSIM first: every layer is filled to capacity before the next gets anything."""
    return ratios_to_allocation([1.0] * len(problem.layers), problem.capacities, problem.budget)


def erk(problem: AllocationProblem, _generator: torch.Generator) -> tuple[int, ...]:
    """ERK (Evci et al. 2020): a layer's fraction ∝ (sum of the tensor's dims) / size, so its number ∝ the sum."""
    return tuple(apportion(problem.fan, problem.budget, problem.capacities))


@needs("lacking")
def magnitude(problem: AllocationProblem, _generator: torch.Generator) -> tuple[int, ...]:
    """In proportion to `lacking`, so that layers end with about the counts that global magnitude pruning of the
    reference to the final sparsity gives; in proportion to capacity where that is None."""
    return tuple(apportion(problem.lacking or problem.capacities, problem.budget, problem.capacities))


def random(problem: AllocationProblem, generator: torch.Generator) -> tuple[int, ...]:
    """A control: shares uniform on the simplex (flat Dirichlet); what exceeds a capacity is divided anew."""
    shares = torch.empty(len(problem.layers), dtype=torch.float64).exponential_(generator=generator)
    return tuple(apportion(shares.tolist(), problem.budget, problem.capacities))


# Rules declare optional fields of `AllocationProblem` they read by `@needs`; mask schedules compute only those
ALLOCATORS: dict[str, Callable[[AllocationProblem, torch.Generator], tuple[int, ...]]] = {
    "proportional": proportional, "uniform": uniform, "greedy": greedy, "erk": erk, "magnitude": magnitude,
    "random": random,
}


def allocate(name: str, problem: AllocationProblem, generator: torch.Generator) -> tuple[int, ...]:
    """What the rule of `ALLOCATORS` gives each layer. UserError where that is not `problem.spend` within capacities."""
    counts = tuple(ALLOCATORS[name](problem, generator))
    if len(counts) != len(problem.layers) or sum(counts) != problem.spend or any(
            not 0 <= count <= capacity for count, capacity in zip(counts, problem.capacities, strict=True)):
        raise UserError(f"allocation {name} is wrong: it gives {list(counts)}, where {len(problem.layers)} layers with "
                        f"room for {list(problem.capacities)} are to get {problem.spend} in all; `apportion` does that")
    return counts
