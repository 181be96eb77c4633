"""What a long job says while it runs: one line that is rewritten on a terminal, plain lines in a file or a pipe."""
from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from tqdm import tqdm

WIDTH = 80  # columns of a plain line


class Progress:
    """A job of `total` units (None: not known), as a context manager; what matters most goes to the front of a line.

    On a terminal, stderr shows the last text, the share that is done, the time and the label, in the terminal's width.
    Elsewhere each `say` is a line of its own, and nothing is ever rewritten.
    """

    def __init__(self, label: str, total: int | None, *, done: int = 0, show: bool = True, text: str = ""):
        """label: what is being done; done: units of an earlier process; text: shown on a terminal before any `say`."""
        terminal = bool(getattr(sys.stderr, "isatty", bool)())
        self.label, self.total, self.done, self._first = label, total, done, done
        self._plain, self._start = show and not terminal, time.perf_counter()
        times = "{percentage:3.0f}% {elapsed}<{remaining}" if total else "{elapsed}"
        self._bar = tqdm(total=total, initial=done, desc=text or None, disable=not (show and terminal),
                         ncols=shutil.get_terminal_size().columns - 1, mininterval=0.5,
                         bar_format=f"{{desc}}  {times}  {label.replace('{', '').replace('}', '')}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def advance(self, units: int = 1) -> None:
        """So many more units are done."""
        self.done += units
        self._bar.update(units)

    def say(self, text: str) -> None:
        """The figures so far."""
        self._bar.set_description_str(text)
        if self._plain and hasattr(sys.stderr, "write"):  # a program without a console has none
            sys.stderr.write(f"{text}  {self._left()}{self.label}"[:WIDTH] + "\n")

    def _left(self) -> str:
        """``12 min left  `` at the pace so far, empty where nothing is left or known."""
        if not self.total or not self._first < self.done < self.total:
            return ""
        pace = (time.perf_counter() - self._start) / (self.done - self._first)
        return f"{duration(pace * (self.total - self.done))} left  "


def duration(seconds: float) -> str:
    """Seconds in words of one unit: ``45 s``, ``12 min``, ``3.3 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
