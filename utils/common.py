"""Shared helpers: errors and notes, atomic file writes, seeds, work on many tensors, precision, progress."""
from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

SIDE = 32  # pixels, the side of an image unless asked otherwise
LONGEST = 590  # characters of a message; with "error: " before it, it stays under 600


def one_line(text: str) -> str:
    """The text without line breaks; of one longer than `LONGEST` the middle is left out, and is said to be."""
    text = " ".join(text.splitlines())
    if len(text) <= LONGEST:
        return text
    return f"{text[:380]} [... {len(text) - 540:,} characters left out ...] {text[-160:]}"


class UserError(Exception):
    """The user's input cannot be used; the message says what is wrong and what would be right.

    Scripts print it as ``error: <message>`` and exit with `exit_code`. It is one line of at most `LONGEST` characters.
    """

    exit_code = 2

    def __init__(self, message: str):
        """message: shortened by `one_line` where it is too long."""
        super().__init__(one_line(message))


class RunFailed(UserError):
    """The input was fine but the run could not go on (a diverged training, say); exit code 1."""

    exit_code = 1


@cache
def note(text: str) -> None:
    """Prints ``note: <text>`` on stderr, each text once in a process."""
    print(one_line(f"note: {text}"), file=sys.stderr)


def flattened(nested: Mapping[str, Any], joint: str = " ") -> dict[str, Any]:
    """The entries of nested mappings in one, their keys joined: ``{"a": {"b": 1}}`` to ``{"a b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{joint}{name}": item for name, item in flattened(value, joint).items()}
        else:
            flat[str(key)] = value
    return flat


def needs(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares what a rule reads besides the weights; only that is computed, before the rule is called.

    kinds: of `Evidence.KINDS`; of an allocation 'drift' and 'lacking', fields of `AllocationProblem`.
    """
    def mark(rule: Callable[..., Any]) -> Callable[..., Any]:
        rule.needs = kinds
        return rule
    return mark


def needed(rule: Callable[..., Any]) -> tuple[str, ...]:
    """What a rule is marked to look at; nothing for most."""
    return getattr(rule, "needs", ())


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


def numbers(scalars: Iterable[Tensor]) -> list[Any]:
    """The values of tensors of one element and one device, by one transfer for all."""
    scalars = list(scalars)
    return torch.stack(scalars).tolist() if scalars else []


def move_all(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on a device, by one transfer for all; those that are all there already come as they are."""
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: temporary file, flush to disk, rename.

    Raises UserError when the disk is full or the folder is not writable; what stood at `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = "no space left on the device" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"cannot write {path}: {reason}; what stood there before is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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


PRECISIONS = ("auto", "fp32", "bf16")


def has_native_bf16(device: torch.device) -> bool:
    """True for GPUs that support bfloat16 and for CPUs whose units multiply it (AVX512-BF16, AMX, Arm BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = cpu_info("flags", "Features").split()
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"}.intersection(units))


def cpu_info(*keys: str) -> str:
    """What Linux says of the processor under one of these keys, such as 'model name'; elsewhere nothing."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(keys)), "")
    except OSError:
        return ""


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
        # a bar of no width, since older versions of tqdm cut only lines with a bar to ncols
        self._bar = tqdm(total=total, initial=done, desc=text or None, disable=not (show and terminal),
                         ncols=shutil.get_terminal_size().columns - 1, mininterval=0.5,
                         bar_format=f"{{desc}}  {times}  {label.replace('{', '').replace('}', '')}{{bar:0}}")

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


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: allocated on a GPU, resident for the whole process on a CPU; 0 on Windows, which
    does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` that `accepts` allows; the error says what was `wanted`."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            meant = f"; did you mean {value / 100:.10g}?" if value and value > 1 and accepts(value / 100) else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}{meant}")
        return value
    return parse


def _whole_or_not(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)  # whole ones stay whole, as in records


fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1 (both excluded)")
unit_interval = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_int = _number(int, lambda value: value > 0, "a whole number above 0")
count = _number(int, lambda value: value >= 0, "a whole number, 0 or more")
epoch_count = _number(_whole_or_not, lambda value: 0 < value < float("inf"), "a number above 0")
steps_or_share = _number(_whole_or_not, lambda value: 0 < value < 1 or isinstance(value, int) and value > 0,
                         "a whole number above 0, or a fraction below 1")
not_negative = _number(float, lambda value: 0 <= value < float("inf"), "a number, 0 or more")
positive_float = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
