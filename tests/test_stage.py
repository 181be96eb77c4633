"""Stages on disk: reuse, refusal, interruption at any point, and the same final bytes."""
from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import main
from utils import checkpoint, finetuning, stage1, stage2
from utils import stage as stage_module
from utils.analysis_utils import clone_model
from utils.common import UserError
from utils.stage import FolderLock, ResumableTable, Stage, differences, hold_folder
from utils.training import Recipe, Trainer

RECIPE = Recipe("sgd", lr=0.05, epochs=4, batch_size=32, schedule="cosine", weight_decay=5e-4)
CONFIG = {"stage": "test", "seed": 0, "recipe": RECIPE.as_dict()}


@pytest.fixture(autouse=True)
def save_after_every_epoch(monkeypatch):
    """However short the epochs are."""
    monkeypatch.setattr(stage_module, "SAVE_SHARE", float("inf"))


def run_stage(artifact, model, loaders, **kwargs) -> Stage:
    """Trains a copy of `model` into `artifact`, or continues."""
    stage = Stage(artifact, CONFIG, **kwargs)
    if not stage.finished:
        trainer = Trainer(clone_model(model), loaders[0], loaders[1], RECIPE, seed=0)
        result = stage.fit(trainer, "test")
        state = trainer.state_dict()
        stage.finish({"net": trainer.model.state_dict(), "acc": result.accuracy, "optimizer": state["optimizer"],
                      "loader": state["loader"]}, {"val_acc": result.accuracy})
    return stage


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the code may catch it."""


def die_at_write(monkeypatch, number: int) -> None:
    """Lets the process 'die' in the middle of its `number`-th file: after the temporary file, before the rename."""
    real, writes = os.replace, []

    def replace_or_die(source, target):
        writes.append(target)
        if len(writes) == number:
            raise Killed
        real(source, target)
    monkeypatch.setattr(os, "replace", replace_or_die)


@pytest.mark.parametrize("write", range(1, 11))
def test_killed_at_any_write_and_resumed_gives_the_same_bytes(write, tmp_path, small_cnn, tiny_loaders, monkeypatch):
    run_stage(tmp_path / "whole.pth", small_cnn, tiny_loaders)
    with monkeypatch.context() as patch:  # four epochs write a CSV and a progress file each, then artifact and card
        die_at_write(patch, write)
        with pytest.raises(Killed):
            run_stage(tmp_path / "killed.pth", small_cnn, tiny_loaders)
    assert not checkpoint.card_path(tmp_path / "killed.pth").exists()
    stage = run_stage(tmp_path / "killed.pth", small_cnn, tiny_loaders, resume=True)
    assert (tmp_path / "killed.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()
    assert not stage.progress.exists() and stage.card["config"] == CONFIG
    rows = (tmp_path / "killed_training.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3", "4"]


def test_a_finished_stage_is_reused_only_for_the_same_arguments(tmp_path, small_cnn, tiny_loaders):
    artifact = tmp_path / "a.pth"
    run_stage(artifact, small_cnn, tiny_loaders)
    assert Stage(artifact, CONFIG).finished
    other = {**CONFIG, "seed": 1, "recipe": replace(RECIPE, epochs=9).as_dict()}
    with pytest.raises(UserError, match=r"seed 0 \(asked: 1\), recipe epochs 4 \(asked: 9\).*--resume.*--overwrite"):
        Stage(artifact, other)
    taken = Stage(artifact, other, resume=True)
    assert taken.card["config"] == CONFIG
    assert taken.reuse_note().endswith("made with other arguments: seed 0 (asked: 1), recipe epochs 4 (asked: 9)")
    assert "other arguments" not in Stage(artifact, CONFIG).reuse_note()
    assert not Stage(artifact, other, overwrite=True).finished


def test_an_interrupted_stage_needs_resume_and_the_same_arguments(tmp_path, small_cnn, tiny_loaders, monkeypatch):
    artifact = tmp_path / "a.pth"
    with monkeypatch.context() as patch:
        die_at_write(patch, 4)
        with pytest.raises(Killed):
            run_stage(artifact, small_cnn, tiny_loaders)
    with pytest.raises(UserError, match="--resume to continue"):
        Stage(artifact, CONFIG)
    with pytest.raises(UserError, match=r"seed 0 \(asked: 5\)"):
        Stage(artifact, {**CONFIG, "seed": 5}, resume=True)
    assert not Stage(artifact, CONFIG, resume=True).finished
    checkpoint.save_checkpoint([1], checkpoint.progress_path(artifact))
    with pytest.raises(UserError, match="interrupted stage .* other arguments"):
        Stage(artifact, CONFIG, resume=True)


def test_an_interrupted_overwrite_loses_nothing(tmp_path, small_cnn, tiny_loaders, monkeypatch):
    artifact = tmp_path / "a.pth"
    run_stage(artifact, small_cnn, tiny_loaders)
    before = artifact.read_bytes(), checkpoint.card_path(artifact).read_bytes()
    with monkeypatch.context() as patch:
        die_at_write(patch, 5)
        with pytest.raises(Killed):
            run_stage(artifact, small_cnn, tiny_loaders, overwrite=True)
    assert (artifact.read_bytes(), checkpoint.card_path(artifact).read_bytes()) == before


def test_ctrl_c_loses_no_finished_epoch_though_saving_is_throttled(tmp_path, small_cnn, tiny_loaders, monkeypatch):
    run_stage(tmp_path / "whole.pth", small_cnn, tiny_loaders)
    monkeypatch.setattr(stage_module, "SAVE_SHARE", 1e-9)  # after the first epoch, nothing until the end
    real, epochs = Trainer._train_epoch, []

    def interrupted_in_the_fourth(trainer, bar):
        result = real(trainer, bar)
        epochs.append(trainer.epoch)
        if len(epochs) == 4:  # the weights have moved on since the end of the third
            raise KeyboardInterrupt
        return result
    monkeypatch.setattr(Trainer, "_train_epoch", interrupted_in_the_fourth)
    artifact = tmp_path / "stopped.pth"
    with pytest.raises(KeyboardInterrupt):
        run_stage(artifact, small_cnn, tiny_loaders)
    assert checkpoint.load_checkpoint(checkpoint.progress_path(artifact))["trainer"]["epoch"] == 3
    run_stage(artifact, small_cnn, tiny_loaders, resume=True)
    assert epochs == [0, 1, 2, 3, 3] and artifact.read_bytes() == (tmp_path / "whole.pth").read_bytes()


def test_a_checkpoint_without_a_card_is_taken_only_when_asked(tmp_path):
    artifact = tmp_path / "published.pth"
    checkpoint.save_checkpoint({"net": {"w": torch.ones(1)}}, artifact)
    with pytest.raises(UserError, match="without a run card"):
        Stage(artifact, CONFIG)
    assert Stage(artifact, CONFIG, resume=True).card == {}


def test_a_file_that_its_card_does_not_describe_is_never_taken(tmp_path):
    artifact = tmp_path / "a.pth"
    stage = Stage(artifact, CONFIG)
    stage.finish({"net": {"w": torch.ones(9)}}, {})
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"a.pth is not the file that a.json .* damaged or replaced.* --overwrite"):
            Stage(artifact, CONFIG, resume=resume)
    assert not Stage(artifact, CONFIG, overwrite=True).finished and artifact.read_bytes() == content
    checkpoint.card_path(artifact).unlink()
    assert Stage(artifact, CONFIG, resume=True).card == {}


@pytest.mark.parametrize("card", [{"config": None}, {"config": {}, "input": [1]}])
def test_a_card_that_says_nothing_is_one_of_other_arguments(card, tmp_path):
    artifact = tmp_path / "a.pth"
    checkpoint.save_checkpoint({"net": {"w": torch.ones(1)}}, artifact)
    checkpoint.save_json({"sha256": checkpoint.file_digest(artifact), **card}, checkpoint.card_path(artifact))
    with pytest.raises(UserError, match="was made with other arguments: stage None"):
        Stage(artifact, CONFIG)
    taken = Stage(artifact, CONFIG, resume=True).card
    assert taken["config"] == {} and not taken.get("input")


def test_the_artifact_of_another_parent_is_never_taken(tmp_path, small_cnn, tiny_loaders, monkeypatch):
    artifact = tmp_path / "a.pth"
    monkeypatch.setitem(CONFIG, "parent", "old")
    run_stage(artifact, small_cnn, tiny_loaders)
    with pytest.raises(UserError, match="made from another parent model.*Remove it"):
        Stage(artifact, {**CONFIG, "parent": "new"}, resume=True)
    assert Stage(artifact, {**CONFIG, "seed": 9}, resume=True).finished


def test_what_an_interrupted_overwrite_left_goes_with_the_reuse(tmp_path, small_cnn, tiny_loaders, monkeypatch):
    artifact = tmp_path / "a.pth"
    run_stage(artifact, small_cnn, tiny_loaders)
    with monkeypatch.context() as patch:
        die_at_write(patch, 4)
        with pytest.raises(Killed):
            run_stage(artifact, small_cnn, tiny_loaders, overwrite=True)
    assert checkpoint.progress_path(artifact).exists()
    assert Stage(artifact, CONFIG, resume=True).finished and not checkpoint.progress_path(artifact).exists()


def test_what_was_left_of_other_arguments_or_is_damaged_stays_beside_a_finished_stage(tmp_path, small_cnn,
                                                                                      tiny_loaders):
    artifact, other = tmp_path / "a.pth", {**CONFIG, "seed": 5}
    run_stage(artifact, small_cnn, tiny_loaders)
    progress = checkpoint.progress_path(artifact)
    for content in (checkpoint.checkpoint_bytes({"config": other, "trainer": {}}), checkpoint.checkpoint_bytes([1]),
                    b"x"):
        progress.write_bytes(content)
        assert Stage(artifact, CONFIG).finished and progress.read_bytes() == content


def test_a_continued_overwrite_takes_only_what_is_newer_and_of_these_arguments(tmp_path, small_cnn, tiny_loaders):
    artifact, other, since = tmp_path / "a.pth", {**CONFIG, "seed": 5}, {"resume": True, "overwrite": 1000.0}
    run_stage(artifact, small_cnn, tiny_loaders)
    progress = checkpoint.progress_path(artifact)
    for age, made in ((999, False), (1000, True)):
        os.utime(artifact, (age, age))
        assert Stage(artifact, CONFIG, **since).finished == made and not Stage(artifact, other, **since).finished
        assert not Stage(artifact, CONFIG, resume=True, overwrite=True).finished
    os.utime(artifact, (999, 999))
    for content, age, goes_on in (({"config": CONFIG}, 999, False), ({"config": CONFIG}, 1000, True),
                                  ({"config": other}, 1000, False), ([1], 1000, False)):
        checkpoint.save_checkpoint(content, progress)
        os.utime(progress, (age, age))
        stage = Stage(artifact, CONFIG, **since)
        assert not stage.finished and (stage._state is not None) == goes_on and progress.exists()


def test_a_killed_overwrite_goes_on_in_its_own_epochs(tmp_path, small_cnn, tiny_loaders, monkeypatch, capsys):
    artifact = tmp_path / "a.pth"
    run_stage(artifact, small_cnn, tiny_loaders)
    whole = artifact.read_bytes()
    os.utime(artifact, (1000, 1000))
    since = {"resume": True, "overwrite": 2000.0}
    with monkeypatch.context() as patch:  # twice
        for write in (5, 2):
            die_at_write(patch, write)
            with pytest.raises(Killed):
                run_stage(artifact, small_cnn, tiny_loaders, **since)
    assert artifact.stat().st_mtime == 1000
    run_stage(artifact, small_cnn, tiny_loaders, **since)
    assert capsys.readouterr().out.count("continuing after epoch") == 2
    assert artifact.read_bytes() == whole and artifact.stat().st_mtime > 2000
    assert run_stage(artifact, small_cnn, tiny_loaders, **since).finished


def test_a_table_that_is_overwritten_takes_no_old_row_though_killed_before_its_first(tmp_path, monkeypatch):
    path, since = tmp_path / "t.csv", {"resume": True, "overwrite": 2000.0}
    ResumableTable(path, ("seed",), {"lr": 1}, resume=False, overwrite=False).add({"seed": 0, "acc": 10.0}, {})
    os.utime(path, (1000, 1000))
    for config in ({"lr": 1}, {"lr": 2}):  # nothing was written
        assert ResumableTable(path, ("seed",), config, **since).rows == []
    with monkeypatch.context() as patch:
        die_at_write(patch, 2)  # between card and rows
        with pytest.raises(Killed):
            ResumableTable(path, ("seed",), {"lr": 2}, resume=False, overwrite=True).add({"seed": 0, "acc": 20.0}, {})
    table = ResumableTable(path, ("seed",), {"lr": 2}, **since)
    assert table.rows == []
    table.add({"seed": 1, "acc": 30.0}, {})
    assert ResumableTable(path, ("seed",), {"lr": 2}, **since).rows == [{"seed": 1, "acc": 30}]
    assert ResumableTable(path, ("seed",), {"lr": 3}, **since).rows == []


def test_differences_in_words():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}, "e": 0}) == "b c 2 (asked: 5)"
    assert differences({"a": 1}, {"a": 1, "e": 0}) == "e None (asked: 0)"
    assert differences({"n": 2, "r": {"n": 100}}, {"r": {"n": 100}}) == "n 2 (asked: None)"


def test_a_table_goes_on_when_there_is_an_option_more_that_is_not_given(tmp_path):
    table = ResumableTable(tmp_path / "t.csv", ("seed",), {"lr": 0.1, "gone": None}, resume=False, overwrite=False)
    table.add({"seed": 0, "acc": 50.0}, {})
    again = ResumableTable(tmp_path / "t.csv", ("seed",), {"lr": 0.1, "padding": None}, resume=True, overwrite=False)
    assert again.has(0)
    with pytest.raises(UserError, match=r"padding None \(asked: 2\)"):
        ResumableTable(tmp_path / "t.csv", ("seed",), {"lr": 0.1, "padding": 2}, resume=True, overwrite=False)


def test_a_table_of_an_earlier_version_goes_on_with_a_column_more(tmp_path):
    """Its rows count as made without the new option; the new column is filled from then on."""
    path = tmp_path / "t.csv"
    table = ResumableTable(path, ("lr",), {}, resume=False, overwrite=False)
    table.add({"lr": 0.1, "acc": 50.0}, {})
    again = ResumableTable(path, ("lr", "ramp"), {}, resume=True, overwrite=False)
    assert again.has(0.1, "") and not again.has(0.1, 0.4)
    again.add({"lr": 0.1, "ramp": 0.4, "acc": 60.0}, {})
    assert path.read_text() == "lr,acc,ramp\n0.1,50,\n0.1,60,0.4\n"
    last = ResumableTable(path, ("lr", "ramp"), {}, resume=True, overwrite=False)
    assert last.has(0.1, "") and last.has(0.1, 0.4) and json.loads(path.with_suffix(".json").read_text())[
        "columns"] == {"lr": "number", "acc": "number", "ramp": "text"}


def test_a_table_takes_no_rows_of_other_data(tmp_path):
    table = ResumableTable(tmp_path / "t.csv", ("seed",), {}, resume=False, overwrite=False)
    table.check_data("mine, image folder (PNG)", "1f")  # no row yet
    table.add({"seed": 0, "dataset": "mine, image folder (PNG)"}, {})
    again = ResumableTable(tmp_path / "t.csv", ("seed",), {}, resume=True, overwrite=False)
    again.check_data("mine, image folder (PNG)", "1f")
    with pytest.raises(UserError, match=r"rows of other data: mine, image folder \(PNG\), and this run reads yours"):
        again.check_data("yours, image folder (PNG)", "1f")
    with pytest.raises(UserError, match=r"other data: mine, image folder \(PNG\), which has changed since"):
        again.check_data("mine, image folder (PNG)", "2f")  # another folder of this name, or other images in it


def test_words_that_look_like_numbers_stay_words(tmp_path):
    """Layers of a plain Sequential are called 0, 1, ..."""
    path = tmp_path / "t.csv"
    for seed in (0, 1):
        table = ResumableTable(path, ("layer", "seed"), {}, resume=True, overwrite=False)
        assert not table.has("3", seed)
        table.add({"layer": "3", "seed": seed, "back": "" if seed else 7}, {})
    rows = ResumableTable(path, ("layer", "seed"), {}, resume=True, overwrite=False).rows
    assert rows == [{"layer": "3", "seed": 0, "back": 7}, {"layer": "3", "seed": 1, "back": ""}]


# --- two runs in one folder ----------------------------------------------------------------------------------------

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on there since noon: main.py --seed 1")
file.flush()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold_elsewhere():
    """Lets another process hold a folder; returns that process."""
    processes = []

    def hold(folder) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        processes.append(subprocess.Popen([sys.executable, "-c", HOLDER, folder / ".lock"], stdin=subprocess.PIPE,
                                          stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "ready\n"
        return processes[-1]
    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_holds_is_refused_until_that_is_killed(tmp_path, hold_elsewhere, capsys):
    folder = tmp_path / "run"
    process = hold_elsewhere(folder)
    with pytest.raises(UserError, match="run is in use by process 7 on there since noon: main.py --seed 1. Wait"):
        hold_folder(folder)
    process.kill()
    process.wait()
    lock = hold_folder(folder)
    assert "was left by process 7 on there since noon: main.py --seed 1, which was killed" in capsys.readouterr().err
    assert hold_folder(folder / ".." / "run") is lock  # this process may
    assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    del lock
    gc.collect()
    assert not list(folder.iterdir())
    hold_folder(folder)
    assert capsys.readouterr().err == ""  # it was not killed


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = hold_folder(tmp_path)
    assert isinstance(lock, FolderLock) and not list(tmp_path.iterdir())
    assert "at a time would not be noticed (No locks available)" in capsys.readouterr().err


def test_every_flow_holds_its_folder(tmp_path, image_folder, hold_elsewhere, monkeypatch):
    hold_elsewhere(tmp_path / "resnet20")
    with pytest.raises(UserError, match="resnet20 is in use by process 7"):
        main.main(["--m_name", "resnet20", "--root", str(tmp_path), "--data_dir", str(image_folder)])
    hold_elsewhere(tmp_path / "out")
    with pytest.raises(UserError, match="out is in use by process 7"):
        ResumableTable(tmp_path / "out" / "t.csv", ("seed",), {}, resume=False, overwrite=False)
    monkeypatch.setattr(stage1, "load_models", lambda *_: (SimpleNamespace(model=None), None))
    run, args = SimpleNamespace(held=set()), SimpleNamespace(save_dir=tmp_path / "out", regrow_iterations=1)
    with pytest.raises(UserError, match="out is in use by process 7"):
        stage2.regrow(run, args)
    monkeypatch.setattr(finetuning, "phases", lambda *_: ())
    monkeypatch.setattr(finetuning, "load_source", lambda *_: None)
    with pytest.raises(UserError, match="out is in use by process 7"):
        finetuning.finetune(run, None, args)
