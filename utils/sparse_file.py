r"""The sparse file of a model: of pruned layers only what survived, with positions in few bits; all else as it is.

Layout, numbers little-endian:

    magic       8 bytes, ``\x93SPARSE\n``
    version     uint32, 1
    index size  uint32, bytes
    checksum    32 bytes, SHA-256 of all that follows
    index       JSON compressed by zlib: a list with an object for each tensor, in order: name, shape, dtype and, where
                the tensor has a mask, kept, shift, unary
    data        of each tensor in turn, without gaps

The data of a tensor without a mask are its values in C order. Of one with a mask `kept` values are left, at the flat
positions p_1 < p_2 < ... (C order), written as gaps g_i = p_i - p_{i-1} - 1, p_0 = -1, by Golomb-Rice coding (Rice,
JPL 79-22, 1979). Bits fill bytes from the lowest up, and zeros fill each of the three parts up to whole bytes:

    values      `kept` numbers
    low bits    the lowest `shift` bits of every gap, lowest first
    unary       `unary` bytes: for every gap g >> shift zeros and then a one

With shift 0 there are no low bits, and `unary` is the mask itself, a bit for each weight up to the last that survived.
The shift is the one that takes the fewest bytes, so that dense layers have a bit mask and sparse ones coded gaps.

Floating-point tensors are float32 or, of two and more dimensions and where asked for, float16. Surviving values of
float32 come back bit for bit; the values under the mask, which no forward pass reads, come back as 0.
"""
from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC = b"\x93SPARSE\n"
VERSION = 1
HEADER = struct.Struct("<8sII32s")  # magic, version, bytes of the index, checksum
FLOATS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
DTYPES = {**FLOATS, **{name: np.dtype(name).newbyteorder("<")
                       for name in ("int64", "int32", "int16", "int8", "uint8", "bool")}}
ENTRY, MASKED_ENTRY = {"name", "shape", "dtype"}, {"name", "shape", "dtype", "kept", "shift", "unary"}
LARGEST_INDEX = 2**20  # bytes
LARGEST_MODEL = 2**28  # elements of all tensors together
LARGEST_SHIFT = 30


class Gaps(NamedTuple):
    """The positions of a mask's ones, coded: `low` and `unary` bits as bytes (uint8)."""

    shift: int
    low: np.ndarray
    unary: np.ndarray


# --- writing -------------------------------------------------------------------------------------------------------


def encode(state: Mapping[str, Tensor], dtype: str = "float32") -> bytes:
    """The sparse file of a state dict, as `utils.checkpoint.model_state` gives it; equal content gives equal bytes.

    dtype: 'float32' or 'float16', of tensors with two and more dimensions; float64 is rounded. Raises ValueError where
    a mask holds anything but 0 and 1, a value is too large for its dtype, or the file is one that `decode` refuses.
    """
    index, data = [], []
    masks = {key: f"{key.removesuffix('_orig')}_mask" for key in state if key.endswith("weight_orig")}
    for key in [key for key in state if key not in masks.values()]:
        entry, parts = _encode_tensor(key, state[key], state.get(masks.get(key, "")), dtype)
        index.append(entry)
        data += parts
    packed = zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
    try:
        _read_index(packed)
    except ValueError as error:
        raise ValueError(f"a sparse file cannot hold it: {error}") from error
    body = b"".join([packed, *(part.tobytes() for part in data)])
    return HEADER.pack(MAGIC, VERSION, len(packed), hashlib.sha256(body).digest()) + body


def _encode_tensor(key: str, value: Tensor, mask: Tensor | None, dtype: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The tensor's object in the index, and the parts of its data."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_floating_point():
        kind = dtype if value.dim() > 1 else "float32"
    entry = {"name": key, "shape": list(value.shape), "dtype": kind}
    flat = value.detach().cpu().to(getattr(torch, kind)).reshape(-1)
    if kind in FLOATS and bool((flat.isinf() & value.detach().cpu().reshape(-1).isfinite()).any()):
        largest = torch.finfo(flat.dtype).max
        raise ValueError(f"{key} has values up to {value.abs().max():.3g}, and {kind} ends at {largest:.6g}")
    if mask is None:
        return entry, [flat.numpy().astype(DTYPES[kind])]
    if mask.shape != value.shape or bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"the mask of {key} is not of 0 and 1 in the weight's shape")
    positions = mask.detach().cpu().reshape(-1).nonzero().reshape(-1).numpy()
    gaps = encode_positions(positions)
    entry |= {"name": key.removesuffix("_orig"), "kept": len(positions), "shift": gaps.shift,
              "unary": len(gaps.unary)}
    return entry, [flat.numpy()[positions].astype(DTYPES[kind]), gaps.low, gaps.unary]


def encode_positions(positions: np.ndarray) -> Gaps:
    """Rice coding of ascending flat positions (n,), by the shift that takes the fewest bytes."""
    gaps = np.diff(positions, prepend=-1) - 1
    shifts = range(min(int(gaps.max(initial=0)).bit_length(), LARGEST_SHIFT) + 1)
    shift = min(shifts, key=lambda s: _bytes(len(gaps) * s) + _bytes(len(gaps) + int((gaps >> s).sum())))  # low, unary
    low = (gaps[:, None] >> np.arange(shift)) & 1
    ends = np.cumsum((gaps >> shift) + 1) - 1
    unary = np.zeros(ends[-1] + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    return Gaps(shift, *(np.packbits(bits.astype(np.uint8), bitorder="little") for bits in (low, unary)))


def _bytes(bits: int) -> int:
    return -(-bits // 8)


# --- reading -------------------------------------------------------------------------------------------------------


def decode(content: bytes) -> dict[str, Tensor]:
    """The state dict in a sparse file, on the CPU; masked weights as `weight_orig` and `weight_mask`, floats float32.

    Raises ValueError, which says what is wrong, for a damaged file. Nothing is made for the tensors before all that the
    index says of their sizes agrees with the size of the file.
    """
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise ValueError("it has no whole header")
    _, version, size, checksum = HEADER.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"it is of version {version}, and this program reads version {VERSION}")
    if hashlib.sha256(memoryview(content)[HEADER.size:]).digest() != checksum:
        raise ValueError("its checksum does not fit")
    index, start = _read_index(content[HEADER.size:HEADER.size + size]), HEADER.size + size
    if start + sum(sum(_part_sizes(entry)) for entry in index) != len(content):
        raise ValueError("its size is not what its index says")
    state: dict[str, Tensor] = {}
    for entry in index:
        parts = []
        for length in _part_sizes(entry):
            parts.append(np.frombuffer(content, np.uint8, length, start))
            start += length
        state |= _decode_tensor(entry, *parts)
    return state


def _read_index(packed: bytes) -> list[dict[str, Any]]:
    """The index, each entry checked by itself, and names and elements over all; ValueError if anything is wrong."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, LARGEST_INDEX)
        index = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        problem = "has too many bytes" if unpacker.unconsumed_tail else "cannot be read"
        raise ValueError(f"its index {problem}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("its index is not of the size that the header says, or too large")
    if not (isinstance(index, list) and index and all(map(_is_sound, index))):
        raise ValueError("its index is wrong")
    names = [name for entry in index for name in _names(entry)]
    if len(set(names)) < len(names):
        raise ValueError("its index has a name twice")
    if sum(math.prod(entry["shape"]) for entry in index) > LARGEST_MODEL:
        raise ValueError(f"its tensors would have more than {LARGEST_MODEL:,} elements")
    return index


def _is_sound(entry: Any) -> bool:
    """Whether an object of the index has the right fields, each of the right kind and within its limits."""
    if not (isinstance(entry, dict) and set(entry) in (ENTRY, MASKED_ENTRY)):
        return False
    shape, masked = entry["shape"], set(entry) == MASKED_ENTRY
    if not (isinstance(entry["name"], str) and isinstance(shape, list) and len(shape) <= 8
            and all(type(side) is int and 0 <= side <= LARGEST_MODEL for side in shape)
            and isinstance(entry["dtype"], str) and entry["dtype"] in (FLOATS if masked else DTYPES)):
        return False
    if not masked:
        return True
    kept, shift, unary = (entry[field] for field in ("kept", "shift", "unary"))
    elements = math.prod(shape)
    return (all(type(number) is int and number >= 0 for number in (kept, shift, unary)) and kept <= elements
            and shift <= LARGEST_SHIFT and unary <= _bytes(kept + (elements >> shift)))


def _names(entry: Mapping[str, Any]) -> list[str]:
    """Names in the state dict."""
    return [f"{entry['name']}_orig", f"{entry['name']}_mask"] if "kept" in entry else [entry["name"]]


def _part_sizes(entry: Mapping[str, Any]) -> list[int]:
    """Bytes of the parts of a tensor's data: values and, with a mask, low bits and unary."""
    itemsize = DTYPES[entry["dtype"]].itemsize
    if "kept" not in entry:
        return [math.prod(entry["shape"]) * itemsize]
    return [entry["kept"] * itemsize, _bytes(entry["kept"] * entry["shift"]), entry["unary"]]


def _decode_tensor(entry: Mapping[str, Any], data: np.ndarray, *coded: np.ndarray) -> dict[str, Tensor]:
    kind = DTYPES[entry["dtype"]]
    values = data != 0 if kind.kind == "b" else data.view(kind).astype(np.float32 if kind.kind == "f" else kind.name)
    if "kept" not in entry:
        return {entry["name"]: torch.from_numpy(values).reshape(entry["shape"])}
    positions = torch.from_numpy(decode_positions(Gaps(entry["shift"], *coded), entry["kept"],
                                                  math.prod(entry["shape"])))
    weight, mask = (torch.zeros(entry["shape"]) for _ in range(2))
    weight.view(-1)[positions] = torch.from_numpy(values)
    mask.view(-1)[positions] = 1
    return dict(zip(_names(entry), (weight, mask), strict=True))


def decode_positions(gaps: Gaps, kept: int, elements: int) -> np.ndarray:
    """Ascending flat positions, int64 (kept,), below `elements`; ValueError unless the bits say exactly so many."""
    ends = np.flatnonzero(np.unpackbits(gaps.unary, bitorder="little"))
    if len(ends) != kept:
        raise ValueError("its positions are not as many as its values")
    low = np.unpackbits(gaps.low, count=kept * gaps.shift, bitorder="little").reshape(kept, gaps.shift)
    high = np.diff(ends, prepend=-1) - 1
    positions = np.cumsum((high << gaps.shift) + low @ (1 << np.arange(gaps.shift)) + 1) - 1
    if kept and positions[-1] >= elements:
        raise ValueError("its positions lie outside of their tensor")
    return positions
