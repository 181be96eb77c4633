"""Where artifacts lie, how they are saved (whole or not at all) and how they are loaded (never executing anything)."""
from __future__ import annotations

import codecs
import csv
import errno
import hashlib
import io
import json
import math
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import sparse_file
from utils.common import UserError, write_atomic

# --- paths ---------------------------------------------------------------------------------------------------------


def format_sparsity(sparsity: float) -> str:
    """Sparsity as it stands in file names: four decimals without trailing zeros (0.99, 0.9899, 0.4).

    Where fewer than 0.01 % of the weights are left, as many as show two digits of what is left (0.99996, 0.999942).
    """
    left = 1.0 - sparsity
    decimals = max(4, 1 - math.floor(math.log10(left))) if 0 < left < 0.99995e-4 else 4
    return f"{sparsity:.{decimals}f}".rstrip("0").rstrip(".")


def rounded_sparsity(sparsity: float) -> float:
    """The number in `format_sparsity`: what tables and figures call one sparsity."""
    return float(format_sparsity(sparsity))


def dense_path(root: Path, m_name: str) -> Path:
    """The pretrained dense model."""
    return root / m_name / "checkpoint" / "ckpt.pth"


def pruned_path(root: Path, m_name: str, sparsity: float) -> Path:
    """The pruned and finetuned model of one sparsity."""
    return root / m_name / "ckpt_after_prune" / f"pruned_finetuned_mask_{format_sparsity(sparsity)}.pth"


def card_path(artifact: Path) -> Path:
    """The run card beside an artifact: ``a.json`` of ``a.pth``, ``a.onnx.json`` of ``a.onnx``."""
    return artifact.with_suffix(".json" if artifact.suffix in (".pth", "") else f"{artifact.suffix}.json")


def progress_path(artifact: Path) -> Path:
    """The unfinished stage that will become `artifact`."""
    return artifact.with_suffix(".progress.pth")


def training_log_path(artifact: Path) -> Path:
    """One CSV row for each epoch of the training that made `artifact`."""
    return artifact.with_name(f"{artifact.stem}_training.csv")


# --- saving --------------------------------------------------------------------------------------------------------


def ensure_writable(directory: Path, option: str = "--root") -> None:
    """Proves that files can be written into `directory`, or that it can be made; leaves nothing behind.

    UserError otherwise, naming the `option` that chooses the place.
    """
    try:
        existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}); choose another place with "
                        f"{option}") from error


def _canonical(value: Any) -> Any:
    """The same content in freshly built containers, so that equal content always pickles to equal bytes.

    A pickle depends on which strings and containers are the same object; that differs between a run that was resumed
    and one that was not.
    """
    if isinstance(value, Tensor):  # contiguous, whatever the memory format it is trained in: view(-1) works on it
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_canonical(item) for item in value])
    return value


def checkpoint_bytes(value: Any) -> bytes:
    """A checkpoint file of nested dicts, lists, tensors and plain values; equal content gives equal bytes."""
    buffer = io.BytesIO()
    torch.save(_canonical(value), buffer)
    return buffer.getvalue()


def save_checkpoint(value: Any, path: Path) -> None:
    """Saves `checkpoint_bytes` atomically."""
    write_atomic(path, checkpoint_bytes(value))


def save_json(value: Any, path: Path) -> None:
    """Saves a run card (or another JSON value) atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def save_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Saves rows as a CSV with a header, atomically; floats to six significant digits, empty what a row lacks."""
    rows = list(rows)
    text = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in rows for key in row)  # rows of earlier versions may have fewer
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{item:.6g}" if isinstance(item, (float, np.floating)) else item
                         for key, item in row.items()})
    write_atomic(path, text.getvalue().encode(errors="backslashreplace"))  # a folder's name may be no UTF-8


# --- loading -------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def _allow_numpy() -> None:
    """Lets PyTorch load NumPy scalars and arrays of plain dtypes, written under NumPy 1 or 2; none can run code."""
    kinds = [type(np.dtype(kind)) for kind in np.typecodes["All"] if kind not in "OV"]
    makers = [(maker, f"{package}.multiarray.{maker.__name__}") for package in ("numpy.core", "numpy._core")
              for maker in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])]
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, *makers, *kinds])


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Loads a checkpoint without executing anything in it (``weights_only=True``), or the state dict of a sparse file.

    Raises UserError in one line that names the reason when the file is missing, may not be read, is no checkpoint, is
    truncated, or holds anything but tensors, numpy values and plain containers.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.peek()
            compact = file.read() if start.startswith(sparse_file.MAGIC) else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no checkpoint at {path}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name a file in it") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise UserError(f"{path} is empty")
    if compact:
        return _sparse_state(compact, path, device)
    _allow_numpy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it in one line
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} {_load_problem(error)}") from error


def _sparse_state(content: bytes, path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        state = sparse_file.decode(content)
    except ValueError as error:
        raise UserError(f"{path} is not a readable sparse file (truncated or damaged): {error}") from error
    except (MemoryError, RuntimeError) as error:  # what PyTorch raises
        raise UserError(f"{path} holds tensors for which there is not enough memory") from error
    return {key: value.to(device) for key, value in state.items()}


def _load_problem(error: Exception) -> str:
    """Why PyTorch could not load a file; called damage only where the file itself cannot be taken apart."""
    text = str(error).split("WeightsUnpickler error: ")[-1]
    if isinstance(error, pickle.UnpicklingError) and (refused := re.search(r"GLOBAL (\S+)", text)):
        return (f"holds {refused[1]}, a Python object that could run code when loaded; refused, nothing was executed. "
                "Save tensors and plain values only, as torch.save(model.state_dict(), FILE) does")
    kinds = (EOFError, pickle.UnpicklingError, LookupError, ValueError)
    if isinstance(error, kinds) or "PytorchStreamReader" in text or getattr(error, "errno", None) == errno.EINVAL:
        return "is not a readable PyTorch checkpoint: it is truncated, damaged or of another kind"
    reason = f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else 'no details'}"
    return f"is not a readable PyTorch checkpoint: {reason[:200]}"


def read_csv(path: Path, columns: Mapping[str, str], remedy: str = "Restore it") -> list[dict[str, str]]:
    """The cells of a CSV of this project as text, also after a spreadsheet has saved it: with a byte order mark, as
    UTF-16, with ``;`` or tabs between columns and then commas in numbers.

    columns: those that must be there -> 'number' or 'text'. UserError, with what is wrong and the remedy, for a file
    that has others, rows of another length, or cells that are no numbers where there should be one.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        header, *lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        if lacking := [name for name in columns if header.count(name) != 1]:
            raise ValueError(f"it has no column '{lacking[0]}'")
        rows = []
        for number, cells in enumerate(filter(any, lines), start=1):
            if len(cells) != len(header):
                raise ValueError(f"row {number} has {len(cells)} cells instead of {len(header)}")
            if delimiter != ",":
                cells = [re.sub(r"^(-?\d+),(\d+(e[+-]?\d+)?)$", r"\1.\2", cell, flags=re.I) for cell in cells]
            rows.append(dict(zip(header, cells)))
            for name, kind in columns.items():
                if kind == "number" and not _is_number(rows[-1][name]):
                    raise ValueError(f"'{rows[-1][name][:40]}' in row {number}, column {name}, is no number")
    except (ValueError, csv.Error) as error:
        reason = "it is no text in UTF-8 or UTF-16" if isinstance(error, UnicodeError) else error
        raise UserError(f"{path} is damaged: {reason if content else 'it is empty'}. {remedy}") from error
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def was_changed(artifact: Path) -> bool:
    """Whether an artifact has a run card, of other bytes: it was damaged or replaced since."""
    try:
        digest = json.loads(card_path(artifact).read_bytes())["sha256"]
    except (OSError, ValueError, RecursionError, TypeError, LookupError):
        return False
    return artifact.is_file() and digest != file_digest(artifact)


def read_card(artifact: Path) -> dict[str, Any] | None:
    """The run card of an artifact, or None when there is none that belongs to these very bytes; what it says of
    arguments and input is a mapping, empty where it was none."""
    try:
        card = json.loads(card_path(artifact).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(card, dict) or not artifact.is_file() or card.get("sha256") != file_digest(artifact):
        return None
    return {**card, **{key: {} for key in ("config", "input") if not isinstance(card.get(key, {}), dict)}}
