"""The sparse file: what every bit of it says, exact round trips, and what is refused."""
from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.read_sparse_file import read
from tests.conftest import REPOSITORY
from utils import sparse_file
from utils.checkpoint import load_checkpoint
from utils.common import UserError
from utils.model_loader import model_loader
from utils.pruning import weight_pruner_loader
from utils.sparse_file import FLOATS, HEADER, MAGIC, decode, decode_positions, encode, encode_positions


def random_state(seed: int) -> dict[str, torch.Tensor]:
    """Masked weights of all densities, a bare one, and tensors of other kinds, with names and shapes at random."""
    dice = torch.Generator().manual_seed(seed)
    state = {"bn.weight": torch.randn(7, generator=dice), "bn.num": torch.tensor(2**40), "none": torch.zeros(0, 3),
             "flags": torch.rand(5, generator=dice) < 0.5, "bytes": torch.arange(3, dtype=torch.uint8),
             "short": torch.tensor([[-7]]).short()}
    for number, density in enumerate((0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0)):
        shape = torch.randint(1, 12, (4,), generator=dice).tolist()
        weight, mask = torch.randn(shape, generator=dice), (torch.rand(shape, generator=dice) < density).float()
        if number % 2:  # as models have them
            weight, mask = (value.to(memory_format=torch.channels_last) for value in (weight, mask))
        state |= {f"layer{number}.weight_orig": weight * mask, f"layer{number}.weight_mask": mask}
    return {**state, "last.weight": torch.randn(3, 4, generator=dice)}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_bit_for_bit_by_both_readers(seed, tmp_path):
    state = random_state(seed)
    content = encode(state)
    assert_same(decode(content), state)
    assert encode(decode(content)) == content
    (tmp_path / "a.sparse").write_bytes(content)
    assert_same(load_checkpoint(tmp_path / "a.sparse"), state)
    plain = read(str(tmp_path / "a.sparse"))
    assert list(plain) == [key.removesuffix("_orig") for key in state if not key.endswith("_mask")]
    for key, value in state.items():
        if not key.endswith("_mask"):
            np.testing.assert_array_equal(plain[key.removesuffix("_orig")], value.numpy())


def test_every_byte_of_a_small_file_by_hand():
    weight = torch.zeros(2, 20)
    weight[0, 3], weight[0, 4], weight[1, 19] = 1.5, -2.0, 0.25  # flat 3, 4, 39: gaps 3, 0, 34
    content = encode({"a.weight_orig": weight, "a.weight_mask": (weight != 0).float(), "b": torch.tensor([5, -1])})
    magic, version, size, checksum = HEADER.unpack_from(content)
    assert (magic, version, len(content[:48])) == (MAGIC, 1, HEADER.size)
    assert checksum == hashlib.sha256(content[48:]).digest()
    # bits for shift 0..5: 3 s + 3 + sum(g >> s) in bytes: 0+5, 1+3, 1+2, 2+1, 2+1, 2+1: the first of the smallest is 2
    assert json.loads(zlib.decompress(content[48:48 + size])) == [
        {"name": "a.weight", "shape": [2, 20], "dtype": "float32", "kept": 3, "shift": 2, "unary": 2},
        {"name": "b", "shape": [2], "dtype": "int64"}]
    values = np.array([1.5, -2.0, 0.25], "<f4").tobytes()
    low = bytes([0b10_00_11])  # 3 = 0*4 + 3, 0 = 0*4 + 0, 34 = 8*4 + 2, from the right
    unary = bytes([0b00000011, 0b00000100])  # 1, 1, then eight zeros and 1
    assert content[48 + size:] == values + low + unary + np.array([5, -1], "<i8").tobytes()


def test_a_dense_layer_has_its_mask_and_no_low_bits():
    mask = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1], np.uint8)
    gaps = encode_positions(np.flatnonzero(mask))
    assert (gaps.shift, len(gaps.low)) == (0, 0)
    np.testing.assert_array_equal(np.unpackbits(gaps.unary, bitorder="little")[:10], mask)
    assert encode_positions(np.arange(0))[0] == 0 and len(encode_positions(np.arange(0)).unary) == 0


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 0.97])
def test_positions_take_little_more_than_their_entropy(density):
    positions = np.flatnonzero(np.random.RandomState(0).rand(200_000) < density)
    gaps = encode_positions(positions)
    np.testing.assert_array_equal(decode_positions(gaps, len(positions), 200_000), positions)
    entropy = -200_000 * (density * np.log2(density) + (1 - density) * np.log2(1 - density))
    size = 8 * (len(gaps.low) + len(gaps.unary))
    assert size <= 200_008 and (density > 0.4 or size <= 1.06 * entropy)


def test_float16_rounds_weights_alone_and_refuses_what_it_cannot_hold():
    state = {"w.weight_orig": torch.tensor([[1 / 3, 0.0], [0.0, 1e-9]]), "bias": torch.tensor([1 / 3]),
             "w.weight_mask": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    loaded = decode(encode(state, "float16"))
    assert torch.equal(loaded["w.weight_orig"], state["w.weight_orig"].half().float())
    assert torch.equal(loaded["w.weight_mask"], state["w.weight_mask"]), "a weight that becomes 0 is not pruned"
    assert torch.equal(loaded["bias"], state["bias"])
    with pytest.raises(ValueError, match="65504"):
        encode({"w.weight": torch.tensor([[70_000.0]])}, "float16")


def test_float64_is_rounded_and_what_float32_cannot_hold_is_refused():
    third = torch.full((1, 1), 1 / 3, dtype=torch.float64)
    loaded = decode(encode({"w.weight": third, "w.bias": third[0]}))
    assert torch.equal(loaded["w.weight"], third.float()) and torch.equal(loaded["w.bias"], third[0].float())
    for value in (third.new_tensor([[1e300, 0.0]]), third.new_tensor([-1e300])):
        for dtype in FLOATS:
            with pytest.raises(ValueError, match="b has values up to 1e\\+300, and float"):
                encode({"a": torch.ones(2), "b": value}, dtype)


@pytest.mark.parametrize("limit, make, largest, said", [
    ("LARGEST_MODEL", lambda size: {"a": torch.ones(40), "b": torch.ones(size)}, 60, "its tensors would have more"),
    ("LARGEST_INDEX", lambda size: {size * "a": torch.ones(1)}, 57, "its index has too many bytes"),
])
def test_what_could_never_be_read_is_not_written(limit, make, largest, said, monkeypatch):
    monkeypatch.setattr(sparse_file, limit, 100)
    assert_same(decode(encode(make(largest))), make(largest))
    for size in range(largest + 1, 100):
        with pytest.raises(ValueError, match=f"^a sparse file cannot hold it: {said}"):
            encode(make(size))


def test_masks_of_other_values_are_refused():
    for mask in (torch.tensor([[0.5, 1.0]]), torch.ones(2, 1), torch.tensor([[float("nan"), 1.0]])):
        with pytest.raises(ValueError, match="mask of w.weight_orig"):
            encode({"w.weight_orig": torch.ones(1, 2), "w.weight_mask": mask})


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content() -> bytes:
    return encode(random_state(0))


def refused(content: bytes, folder: Path) -> str:
    """The one line with which a file is refused."""
    path = folder / "bad.sparse"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and str(path) in text
    return text


def test_truncated_lengthened_or_changed_files_are_refused(content, tmp_path):
    for end in [*range(len(MAGIC), 60), *np.linspace(60, len(content) - 1, 60).astype(int)]:
        assert "not a readable sparse file" in refused(content[:end], tmp_path)
    assert "checksum" in refused(content + b"\0", tmp_path)
    for place in np.linspace(len(MAGIC), len(content) - 1, 150).astype(int):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        refused(bytes(changed), tmp_path)
    assert "version 2" in refused(content[:8] + b"\2" + content[9:], tmp_path)
    for number in range(len(MAGIC)):
        refused(content[:number], tmp_path)


def forged(index: object, data: bytes = b"", packed: bytes | None = None) -> bytes:
    """A file whose checksum fits its content, whatever that is."""
    packed = zlib.compress(json.dumps(index).encode()) if packed is None else packed
    body = packed + data
    return HEADER.pack(MAGIC, 1, len(packed), hashlib.sha256(body).digest()) + body


DENSE = {"name": "a", "shape": [2], "dtype": "float32"}
MASKED = {"name": "a.weight", "shape": [4, 4], "dtype": "float32", "kept": 1, "shift": 0, "unary": 1}
ONE = np.ones(1, "<f4").tobytes()
HOSTILE = {
    "no list": forged({"a": 1}),
    "nothing": forged([]),
    "a name that is a number": forged([{**DENSE, "name": 3}], bytes(8)),
    "a name twice": forged([DENSE, DENSE], bytes(16)),
    "the name of a mask": forged([MASKED, {**DENSE, "name": "a.weight_mask"}], ONE + b"\1" + bytes(8)),
    "a type of objects": forged([{**DENSE, "dtype": "object"}], bytes(16)),
    "a type that is a list": forged([{**DENSE, "dtype": ["float32"]}], bytes(8)),
    "a negative side": forged([{**DENSE, "shape": [-2, -1]}], bytes(8)),
    "a side that is true": forged([{**DENSE, "shape": [True, 2]}], bytes(8)),
    "a side of 2**200": forged([{**DENSE, "shape": [2**200]}]),
    "many sides": forged([{**DENSE, "shape": [1] * 99}], bytes(4)),
    "other fields": forged([{**DENSE, "code": "import os"}], bytes(8)),
    "a tensor that is not there": forged([{**DENSE, "shape": [10**7]}]),
    "empty tensors without end": forged([{**MASKED, "name": f"{number}", "shape": [2**27], "kept": 0, "unary": 0}
                                         for number in range(100)]),
    "an empty tensor too large": forged([{**MASKED, "shape": [2**28, 2**28], "kept": 0, "unary": 0}]),
    "more kept than there are": forged([{**MASKED, "kept": 17, "unary": 3}], ONE * 17 + b"\xff\xff\1"),
    "a shift of 99": forged([{**MASKED, "shift": 99}], ONE + bytes(13) + b"\1"),
    "unary without end": forged([{**MASKED, "unary": 1000}], ONE + bytes(999) + b"\1"),
    "too few positions": forged([MASKED], ONE + b"\0"),
    "too many positions": forged([MASKED], ONE + b"\3"),
    "a position outside": forged([{**MASKED, "shape": [2, 2]}], ONE + b"\x80"),
    "floats as positions": forged([{**MASKED, "kept": 1.0}], ONE + b"\1"),
    "an index that is no JSON": forged(None, packed=zlib.compress(b"os.system('x')")),
    "an index that is not compressed": forged(None, packed=b"[]"),
    "an index without end": forged(None, packed=zlib.compress(b" " * 10**8)),
    "brackets without end": forged(None, packed=zlib.compress(b"[" * 10**5)),
    "half an index": forged(None, packed=zlib.compress(json.dumps([DENSE]).encode())[:-5]),
    "an index and more": forged(None, packed=zlib.compress(json.dumps([DENSE]).encode()) + bytes(8)),
    "an index longer than the file": HEADER.pack(MAGIC, 1, 2**32 - 1, hashlib.sha256(b"").digest()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_anything_large_is_made(name, tmp_path, monkeypatch):
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(sparse_file.torch, "zeros", lambda *shape: made.append(shape) or zeros(*shape))
    assert "not a readable sparse file" in refused(HOSTILE[name], tmp_path)
    assert all(np.prod(shape) <= 100 for shape in made)


def test_want_of_memory_is_not_called_damage(tmp_path, monkeypatch):
    def no_memory(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    (tmp_path / "a.sparse").write_bytes(forged([MASKED], ONE + b"\2"))
    monkeypatch.setattr(sparse_file.torch, "zeros", no_memory)
    with pytest.raises(UserError, match="not enough memory"):
        load_checkpoint(tmp_path / "a.sparse")


def test_the_forger_can_write_a_right_file():
    assert_same(decode(forged([MASKED], ONE + b"\2")), {
        "a.weight_orig": torch.eye(16)[1].view(4, 4), "a.weight_mask": torch.eye(16)[1].view(4, 4)})


@pytest.mark.filterwarnings("ignore:no weight is left")
@pytest.mark.parametrize("name, bar", [("resnet20", 30_000), ("vgg16", 1_200_000)])
def test_a_model_at_99_percent_takes_no_more_than_its_bar(name, bar):
    model = model_loader(name, seed=0)
    weight_pruner_loader("magnitude")(model, 0.99)
    assert len(encode(model.state_dict())) <= bar


@pytest.mark.parametrize("words", [(), ("none.sparse",), ("README.md",), ("README.md", "README.md"), ("damaged",)])
def test_the_example_for_other_programs_says_in_a_line_what_it_cannot_read(words, tmp_path):
    (tmp_path / "damaged").write_bytes(encode(random_state(0))[:300])
    words = [str(tmp_path / word) if word == "damaged" else word for word in words]
    process = subprocess.run([sys.executable, "experiments/read_sparse_file.py", *words], cwd=REPOSITORY, text=True,
                             capture_output=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: cannot read ") and process.stderr.count("\n") == 1
