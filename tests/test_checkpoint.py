"""Saving whole or not at all, equal bytes for equal content, and loading that never executes anything."""
from __future__ import annotations

import errno
import json
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from utils import checkpoint
from utils.errors import UserError


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


def test_missing_truncated_and_foreign_files_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_checkpoint(tmp_path / "none.pth")
    whole = tmp_path / "whole.pth"
    checkpoint.save_checkpoint({"net": {"w": torch.ones(1000)}}, whole)
    content = whole.read_bytes()
    for number, damaged in enumerate([b"", b"hello", content[:100], content[:len(content) // 2], content[:-1],
                                      b"\x00" * 500]):
        path = tmp_path / f"damaged_{number}.pth"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable PyTorch checkpoint") as error:
            checkpoint.load_checkpoint(path)
        assert "\n" not in str(error.value)


def test_numpy_values_of_published_checkpoints_load(tmp_path):
    torch.save({"acc": np.float64(91.5), "allocation": np.array([1, 2], dtype=np.int64)}, tmp_path / "old.pth")
    loaded = checkpoint.load_checkpoint(tmp_path / "old.pth")
    assert loaded["acc"] == 91.5 and loaded["allocation"].tolist() == [1, 2]


def test_a_card_counts_only_for_the_very_bytes_it_describes(tmp_path):
    artifact = tmp_path / "a.pth"
    checkpoint.save_checkpoint({"a": 1}, artifact)
    assert checkpoint.read_card(artifact) is None
    checkpoint.save_json({"sha256": checkpoint.file_digest(artifact), "x": 1}, checkpoint.card_path(artifact))
    assert checkpoint.read_card(artifact)["x"] == 1
    checkpoint.save_checkpoint({"a": 2}, artifact)
    assert checkpoint.read_card(artifact) is None
    checkpoint.card_path(artifact).write_text("{not json")
    assert checkpoint.read_card(artifact) is None


def test_model_state_is_found_in_every_layout():
    state = {"w": torch.ones(1)}
    for loaded in (state, {"net": state, "acc": 1.0}, {"state_dict": state}, {"model": state, "epoch": 3}):
        assert checkpoint.model_state(loaded, "x")["w"] is state["w"]
    with pytest.raises(UserError, match="no model weights"):
        checkpoint.model_state({"allocation": [1, 2]}, "x.pth")


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
