"""Saving whole or not at all, equal bytes for equal content, and loading that never executes anything."""
from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import REPOSITORY
from utils import checkpoint
from utils.common import RunFailed, UserError
from utils.run import ArgumentParser


def test_sparsity_in_file_names():
    assert [checkpoint.format_sparsity(s) for s in (0.99, 0.4, 0.98991, 0.9, 0.87040, 1 - 0.01)] == \
        ["0.99", "0.4", "0.9899", "0.9", "0.8704", "0.99"]


def test_paths(tmp_path):
    artifact = checkpoint.pruned_path(tmp_path, "vgg16", 0.98)
    assert artifact == tmp_path / "vgg16/ckpt_after_prune/pruned_finetuned_mask_0.98.pth"
    assert checkpoint.card_path(artifact).name == "pruned_finetuned_mask_0.98.json"
    assert checkpoint.progress_path(artifact).name == "pruned_finetuned_mask_0.98.progress.pth"
    assert checkpoint.dense_path(tmp_path, "vgg16") == tmp_path / "vgg16/checkpoint/ckpt.pth"


def test_round_trip_and_equal_bytes_whatever_objects_the_content_is_made_of(tmp_path):
    name = "".join(["wei", "ght"])  # a string object of its own
    one = OrderedDict({"net": {"weight": torch.arange(4.0)[::2]}, "names": ["weight", "weight"], "epoch": 3})
    two = {"net": {name: torch.tensor([0.0, 2.0])}, "names": [name, "".join(["we", "ight"])], "epoch": 3}
    checkpoint.save_checkpoint(one, tmp_path / "one.pth")
    checkpoint.save_checkpoint(two, tmp_path / "two.pth")
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()
    checkpoint.save_checkpoint(checkpoint.load_checkpoint(tmp_path / "one.pth"), tmp_path / "three.pth")
    assert (tmp_path / "three.pth").read_bytes() == (tmp_path / "one.pth").read_bytes()


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pth"
    checkpoint.save_checkpoint({"a": 1}, path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        checkpoint.save_checkpoint({"a": 2}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


class Hostile:
    """Pickles to a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_hostile_checkpoint_is_refused_and_nothing_runs(tmp_path):
    witness = tmp_path / "witness"
    torch.save({"net": Hostile(f"touch {witness}")}, tmp_path / "new.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(f"touch {witness}")))
    for name in ("new.pth", "plain.pth"):
        with pytest.raises(UserError, match="nothing was executed|not a readable") as error:
            checkpoint.load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not witness.exists()


def test_no_pytorch_is_installed_that_runs_what_is_in_a_crafted_file():
    """`weights_only` does so before 2.6 (CVE-2025-32434)."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    floors = dict(line.split(">=") for line in lines)
    assert [int(floors[name].split(".")[1]) for name in ("torch", "torchvision")] == [6, 21]
    assert floors["torch"].startswith("2.") and floors["torchvision"].startswith("0.")


def test_bytes_load(tmp_path):
    torch.save({"b": b"\xff\x00"}, tmp_path / "a.pth")
    assert checkpoint.load_checkpoint(tmp_path / "a.pth") == {"b": b"\xff\x00"}


def test_missing_truncated_and_foreign_files_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        checkpoint.load_checkpoint(tmp_path)
    whole = tmp_path / "whole.pth"
    checkpoint.save_checkpoint({"net": {"w": torch.ones(1000)}}, whole)
    content = whole.read_bytes()
    (tmp_path / "nothing.pth").touch()
    with pytest.raises(UserError, match="nothing.pth is empty"):
        checkpoint.load_checkpoint(tmp_path / "nothing.pth")
    for number, damaged in enumerate([b"name,val_acc", b"hello", content[:100], content[:len(content) // 2],
                                      content[:-1], b"\x00" * 500]):
        path = tmp_path / f"damaged_{number}.pth"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable PyTorch checkpoint") as error:
            checkpoint.load_checkpoint(path)
        assert "\n" not in str(error.value) and "Error" not in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in np.typecodes["All"] if kind not in "OV"])
def test_numpy_values_of_every_plain_dtype_load(kind, tmp_path):
    values = np.array([1, 0, 1]).astype("M8[s]" if kind == "M" else kind)
    torch.save({"acc": values[0], "allocation": values}, tmp_path / "old.pth")
    loaded = checkpoint.load_checkpoint(tmp_path / "old.pth")
    assert loaded["acc"] == values[0] and loaded["allocation"].dtype == values.dtype
    assert loaded["allocation"].tolist() == values.tolist()


@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_numpy_values_load_whatever_numpy_wrote_them(package, tmp_path):
    buffer = io.BytesIO()
    torch.save({"acc": np.float64(91.5), "a": np.arange(3)}, buffer, _use_new_zipfile_serialization=False)
    here = np.zeros(1).__reduce__()[0].__module__.rpartition(".")[0].encode()  # numpy.core before NumPy 2
    assert here + b".multiarray" in buffer.getvalue()
    (tmp_path / "a.pth").write_bytes(buffer.getvalue().replace(here + b".multiarray", package + b".multiarray"))
    loaded = checkpoint.load_checkpoint(tmp_path / "a.pth")
    assert loaded["acc"] == 91.5 and loaded["a"].tolist() == [0, 1, 2]


def test_an_error_that_is_not_damage_is_not_called_damage(tmp_path, monkeypatch):
    path = tmp_path / "whole.pth"
    torch.save({"net": nn.Linear(2, 2)}, path)
    with pytest.raises(UserError, match=r"holds torch.nn.modules.linear.Linear, a Python object.* refused") as error:
        checkpoint.load_checkpoint(path)
    assert "damaged" not in str(error.value)

    def fail(*_, **__):
        raise AttributeError("module 'torch' has no attribute 'new'")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="AttributeError: module 'torch' has no attribute 'new'") as error:
        checkpoint.load_checkpoint(path)
    assert "damaged" not in str(error.value)
    with pytest.raises(UserError, match="cannot read .*: File name too long"):
        checkpoint.load_checkpoint(tmp_path / ("x" * 300))

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="cannot read .*: Permission denied"):
        checkpoint.load_checkpoint(path)


def test_no_message_is_longer_than_600_characters_and_the_end_stays(capsys):
    message = str(UserError("a.pth does not fit: " + "layer.weight\n" * 2000 + "; use another file"))
    assert len(f"error: {message}") < 600 and "\n" not in message
    assert message.startswith("a.pth does not fit: ") and message.endswith("; use another file")
    left_out = int(re.search(r"\[\.\.\. ([\d,]+) characters left out \.\.\.\]", message)[1].replace(",", ""))
    assert left_out + 540 == len("a.pth does not fit: ") + 2000 * 13 + len("; use another file")
    assert str(RunFailed("x" * 590)) == "x" * 590
    with pytest.raises(SystemExit):
        ArgumentParser().parse_args(["x" * 5000])
    assert len(capsys.readouterr().err) < 600


def test_saved_tensors_are_contiguous_whatever_they_were_trained_in(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    checkpoint.save_checkpoint({"net": model.state_dict()}, tmp_path / "a.pth")
    loaded = checkpoint.load_checkpoint(tmp_path / "a.pth")["net"]["weight"]
    assert torch.equal(loaded.view(-1), model.weight.detach().contiguous().view(-1))


def test_a_card_counts_only_for_the_very_bytes_it_describes(tmp_path):
    artifact = tmp_path / "a.pth"
    checkpoint.save_checkpoint({"a": 1}, artifact)
    assert checkpoint.read_card(artifact) is None
    checkpoint.save_json({"sha256": checkpoint.file_digest(artifact), "x": 1}, checkpoint.card_path(artifact))
    assert checkpoint.read_card(artifact)["x"] == 1
    checkpoint.save_checkpoint({"a": 2}, artifact)
    assert checkpoint.read_card(artifact) is None
    for damaged in ("{not json", '{"config": ' + "[" * 100_000):
        checkpoint.card_path(artifact).write_text(damaged)
        assert checkpoint.read_card(artifact) is None


def test_csv_and_json(tmp_path):
    checkpoint.save_csv([{"a": 1, "b": 0.123456789}, {"a": 2, "b": ""}], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,0.123457\n2,\n"
    checkpoint.save_json({"a": [1]}, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == {"a": [1]}


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--root"):
        checkpoint.ensure_writable(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="--save_dir"):
        checkpoint.ensure_writable(tmp_path / "file" / "below", "--save_dir")


def test_proving_a_folder_writable_leaves_nothing_behind(tmp_path):
    checkpoint.ensure_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sparsity, name", [
    (0.99, "0.99"), (0.98996, "0.99"), (0.4, "0.4"), (0.9999, "0.9999"), (1 - 1e-4, "0.9999"), (0.99996, "0.99996"),
    (0.999942, "0.999942"), (1 - 3.2e-6, "0.9999968"), (0.0, "0"), (1.0, "1"), (0.99992999, "0.99993")])
def test_names_tell_the_highest_sparsities_apart(sparsity, name):
    assert checkpoint.format_sparsity(sparsity) == name
