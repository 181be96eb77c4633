"""How many weights each layer gets: allocation rules on plain numbers, apart from scores and masks."""
from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def apportion(shares: Sequence[float], total: int, capacity: Sequence[int]) -> list[int]:
    """Divide a whole number among layers in proportion to their shares, none above its capacity.

    A layer whose part would exceed its capacity is filled, and the rest is divided anew among the others. Parts are
    rounded by largest remainder (Hamilton's method), equal remainders by position. A layer with share zero gets
    something only when all others are full; such layers then share in proportion to their capacity. The arithmetic
    is exact (rational), so equal shares are equal.

    Args:
        shares: non-negative, any scale, one per layer.
        total: what is divided, >= 0.
        capacity: the most each layer takes, >= 0.

    Returns:
        One integer per layer, in all min(total, sum(capacity)).

    Raises:
        ValueError: lengths differ; a share is negative or not finite; total or a capacity is negative.
    """
    if len(shares) != len(capacity):
        raise ValueError(f"{len(shares)} shares for {len(capacity)} capacities")
    if any(not math.isfinite(share) or share < 0 for share in shares):
        raise ValueError(f"shares must be finite and not negative: {list(shares)}")
    if total < 0 or any(limit < 0 for limit in capacity):
        raise ValueError("total and capacity must not be negative")
    parts = _fill([Fraction(float(share)) for share in shares], total, capacity)
    left = total - sum(parts)
    if left > 0 and any(share == 0 for share in shares):
        room = [limit - part for limit, part in zip(capacity, parts, strict=True)]
        extra = _fill([Fraction(free) for free in room], left, room)
        parts = [part + more for part, more in zip(parts, extra, strict=True)]
    return parts


def _fill(shares: list[Fraction], total: int, capacity: Sequence[int]) -> list[int]:
    """`apportion` among the layers with a positive share only."""
    parts = [0] * len(shares)
    open_ = [i for i, share in enumerate(shares) if share > 0]
    left = int(total)
    while open_:
        scale = left / sum(shares[i] for i in open_)
        full = [i for i in open_ if shares[i] * scale >= capacity[i]]
        if not full:
            return _round(parts, {i: shares[i] * scale for i in open_}, left)
        for i in full:
            parts[i] = int(capacity[i])
        left -= sum(parts[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    return parts


def _round(parts: list[int], exact: dict[int, Fraction], total: int) -> list[int]:
    """Fill in the integers that sum to total, floor first, then one more by largest remainder."""
    for i, value in exact.items():
        parts[i] = math.floor(value)
    spare = total - sum(parts[i] for i in exact)
    by_remainder = sorted(exact, key=lambda i: parts[i] - exact[i])  # stable: ties stay by position
    for i in by_remainder[:spare]:
        parts[i] += 1
    return parts
