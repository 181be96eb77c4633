"""Where artifacts lie, how they are saved (whole or not at all) and how they are loaded (never executing anything)."""
from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

# --- paths ---------------------------------------------------------------------------------------------------------


def format_sparsity(sparsity: float) -> str:
    """Sparsity as it stands in file names: four decimals without trailing zeros (0.99, 0.9899, 0.4)."""
    return f"{sparsity:.4f}".rstrip("0").rstrip(".")


def dense_path(root: Path, m_name: str) -> Path:
    """The pretrained dense model."""
    return root / m_name / "checkpoint" / "ckpt.pth"


def pruned_path(root: Path, m_name: str, sparsity: float) -> Path:
    """The pruned and finetuned model of one sparsity."""
    return root / m_name / "ckpt_after_prune" / f"pruned_finetuned_mask_{format_sparsity(sparsity)}.pth"


def card_path(artifact: Path) -> Path:
    """The run card beside an artifact."""
    return artifact.with_suffix(".json")


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
        there = next(path for path in (directory, *directory.resolve().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}); choose another place with "
                        f"{option}") from error


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


def _canonical(value: Any) -> Any:
    """The same content in freshly built containers, so that equal content always pickles to equal bytes.

    A pickle depends on which strings and containers are the same object; that differs between a run that was resumed
    and one that was not.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_canonical(item) for item in value])
    return value


def save_checkpoint(value: Any, path: Path) -> None:
    """Saves nested dicts, lists, tensors and plain values atomically; equal content gives equal bytes."""
    buffer = io.BytesIO()
    torch.save(_canonical(value), buffer)
    write_atomic(path, buffer.getvalue())


def save_json(value: Any, path: Path) -> None:
    """Saves a run card (or another JSON value) atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def save_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Saves rows with equal keys as a CSV with a header, atomically; floats to six significant digits."""
    rows = list(rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{item:.6g}" if isinstance(item, float) else item for key, item in row.items()})
    write_atomic(path, text.getvalue().encode(errors="backslashreplace"))  # a folder's name may be no UTF-8


# --- loading -------------------------------------------------------------------------------------------------------

def _safe_globals() -> list[Any]:
    """What numpy scalars and arrays in already published checkpoints are made of; none of it can run code."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    old_names = [(scalar, "numpy.core.multiarray.scalar"), (rebuild, "numpy.core.multiarray._reconstruct")]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "b1")]
    return [np.ndarray, np.dtype, scalar, rebuild, *old_names, *kinds]


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Loads a checkpoint without executing anything in it (``weights_only=True``).

    Raises UserError in one line when the file is missing, is no checkpoint, is truncated, or holds anything but
    tensors, numpy values and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it in one line
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported global" in str(error):
            raise UserError(f"{path} holds Python objects that would run code when loaded; refused, nothing was "
                            "executed. Only checkpoints of tensors and plain values can be read") from error
        raise UserError(f"{path} is not a readable PyTorch checkpoint (damaged or of another kind)") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a readable PyTorch checkpoint (truncated, damaged or of another kind)") \
            from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_card(artifact: Path) -> dict[str, Any] | None:
    """The run card of an artifact, or None when there is none that belongs to these very bytes."""
    try:
        card = json.loads(card_path(artifact).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(card, dict) or not artifact.is_file() or card.get("sha256") != file_digest(artifact):
        return None
    return card


def model_state(loaded: Any, source: str | Path) -> dict[str, Tensor]:
    """The state dict inside a loaded checkpoint: the value itself, or its `net`, `state_dict` or `model` entry.

    Raises UserError when there is none.
    """
    candidates = [loaded] + [loaded[key] for key in ("net", "state_dict", "model")
                             if isinstance(loaded, Mapping) and key in loaded]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return dict(candidate)
    raise UserError(f"{source} holds no model weights (expected a state dict, or a dict with 'net')")
