#!/usr/bin/env python
"""Reads a sparse file (`inspect_checkpoint.py --export sparse`) with NumPy alone: an example for other programs.

`utils/sparse_file.py` describes the layout, and checks what this example takes on trust.
"""
import json
import math
import sys
import zlib

import numpy as np


def read(path: str) -> dict[str, np.ndarray]:
    """Tensors by name; pruned weights are 0. ValueError and the like for another or a damaged file."""
    with open(path, "rb") as file:
        content = file.read()
    if content[:12] != b"\x93SPARSE\n\x01\x00\x00\x00":
        raise ValueError("it is no sparse file of version 1")
    start = 48 + int.from_bytes(content[12:16], "little")
    tensors = {}
    for entry in json.loads(zlib.decompress(content[48:start])):
        count = entry.get("kept", math.prod(entry["shape"]))
        values = np.frombuffer(content, np.dtype(entry["dtype"]).newbyteorder("<"), count, start)
        start += values.nbytes
        if "kept" in entry:
            shift, low_bytes = entry["shift"], (count * entry["shift"] + 7) // 8
            bits = np.unpackbits(np.frombuffer(content, np.uint8, low_bytes + entry["unary"], start), bitorder="little")
            start += low_bytes + entry["unary"]
            low = bits[:count * shift].reshape(count, shift) @ (1 << np.arange(shift))
            high = np.diff(np.flatnonzero(bits[8 * low_bytes:]), prepend=-1) - 1
            weight = np.zeros(math.prod(entry["shape"]), values.dtype)
            weight[np.cumsum((high << shift) + low + 1) - 1] = values
            values = weight
        tensors[entry["name"]] = values.reshape(entry["shape"])
    return tensors


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) == 2 else "FILE.sparse"
    try:
        found = read(file)
    except (OSError, ValueError, LookupError, zlib.error) as error:
        print(f"error: cannot read {file}: {error}; give one file of inspect_checkpoint.py --export sparse",
              file=sys.stderr)
        sys.exit(2)
    for name, tensor in found.items():
        print(f"{name:<40} {tensor.dtype!s:<8} {tensor.shape}, {np.count_nonzero(tensor):,} not 0")
