"""Timing that can be trusted: warm-up, device synchronisation, repeats, median and spread, peak memory."""
from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds over the repeats of one measurement."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        """For JSON and CSV: seconds."""
        return {"median_s": self.median, "fastest_s": self.fastest, "slowest_s": self.slowest, "repeats": self.repeats}


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all it was given (nothing to wait for on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(work: Callable[..., Any], device: torch.device, *, repeats: int = 5, warmup: int = 1,
            prepare: Callable[[], Any] | None = None) -> Timing:
    """Times ``work(prepare())`` (or ``work()`` without `prepare`, which is not timed) `repeats` times after a warm-up.

    Raises ValueError unless repeats >= 1.
    """
    if repeats < 1:
        raise ValueError("need at least one repeat")
    seconds = []
    for _ in range(warmup + repeats):
        arguments = [] if prepare is None else [prepare()]
        synchronise(device)
        start = time.perf_counter()
        work(*arguments)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return summarise(seconds[warmup:])


def summarise(seconds: Sequence[float]) -> Timing:
    """Median and extremes of one measurement's repeats. Raises ValueError (statistics) for none."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


class StageClock:
    """Seconds of the named stages of one pass; the device is waited for at the ends of each."""

    def __init__(self, device: torch.device):
        """A clock without stages."""
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what runs inside; a name used twice adds up."""
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def measure_in_turn(works: Sequence[Callable[..., Any]], device: torch.device, *, repeats: int = 5, warmup: int = 1,
                    prepare: Callable[[], Any] | None = None) -> list[Timing]:
    """`measure` for several versions of one thing, in turn (A B A B ...), so that a machine whose speed drifts treats
    them alike. Returns a `Timing` for each."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(warmup + repeats):
        for mine, work in zip(seconds, works):
            once = measure(work, device, repeats=1, warmup=0, prepare=prepare)
            mine.extend([once.median] if number >= warmup else [])
    return [summarise(mine) for mine in seconds]


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: allocated on a GPU, resident for the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
