"""The sweep over recipes on tiny data: one row per combination, resumable, only validation read."""
from __future__ import annotations

import csv
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import main
from experiments import recipe_sweep as sweep
from utils import checkpoint
from utils.analysis_utils import count_pruned_params, get_masks
from utils.common import UserError
from utils.data_loader import TestLoader
from utils.model_loader import model_loader
from utils.run import open_run


def options(image_folder, tmp_path) -> list[str]:
    return ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
            "--precision", "fp32", "--epochs", "1"]


def rows_of(tmp_path) -> list[dict[str, str]]:
    with open(tmp_path / "recipe_sweep/resnet20/sweep.csv") as file:
        return list(csv.DictReader(file))


def test_every_combination_is_a_row_and_none_is_trained_again(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TestLoader, "__iter__", lambda loader: pytest.fail("the test set was read"))
    words = [*options(image_folder, tmp_path), "--lr", "0.1", "0.05"]
    sweep.main([*words, "--optimizer", "muon"])
    with pytest.raises(UserError, match="--resume"):
        sweep.main([*words, "--optimizer", "muon"])
    trained, real = [], sweep.train
    monkeypatch.setattr(sweep, "train", lambda run, asked, _: trained.append(asked["optimizer"]) or real(run, asked, _))
    sweep.main([*words, "--optimizer", "muon", "nesterov", "--resume"])
    assert trained == ["nesterov", "nesterov"]
    assert [(row["optimizer"], row["lr"]) for row in rows_of(tmp_path)] == [
        ("muon", "0.1"), ("muon", "0.05"), ("nesterov", "0.1"), ("nesterov", "0.05")]
    assert {row["surviving"] for row in rows_of(tmp_path)} == {"270896"}


def test_finetuning_starts_from_the_dense_model_and_ends_at_the_sparsity(image_folder, tmp_path, monkeypatch):
    def save_dense(seed: int) -> None:
        dense = {"net": model_loader("resnet20", seed=seed).state_dict(), "acc": 10.0, "epoch": 1}
        checkpoint.save_checkpoint(dense, checkpoint.dense_path(tmp_path, "resnet20"))
    words = [*options(image_folder, tmp_path), "--sparsity", "0.97", "--mask_schedule", "fixed", "bidirectional"]
    with pytest.raises(UserError, match="ckpt.pth"):
        sweep.main(words)
    save_dense(seed=0)
    sweep.main([*words, "--resume"])
    fixed, moving = rows_of(tmp_path)
    assert [(row["mask_schedule"], row["surviving"]) for row in (fixed, moving)] == [
        ("fixed", "8127"), ("bidirectional", "8127")]
    assert fixed["came_back"] == "" and 0 <= int(moving["came_back"]) <= 8127
    monkeypatch.setattr(sweep, "train", lambda run, *_: {"val_acc": 50.0, "dataset": run.data_label})
    more = [*options(image_folder, tmp_path), "--resume", "--sparsity", "0.98"]
    sweep.main(options(image_folder, tmp_path) + ["--resume"])  # pretraining starts from no dense model
    sweep.main([*more, "--lr", "0.3"])
    save_dense(seed=1)
    with pytest.raises(UserError, match=r"rows of seed 0 that start from another dense model than .*ckpt\.pth"):
        sweep.main([*more, "--lr", "0.4"])


def test_a_table_is_not_continued_in_another_precision(image_folder, tmp_path, monkeypatch):
    words = [word for word in options(image_folder, tmp_path) if word not in ("--precision", "fp32")]
    monkeypatch.setattr(sweep, "train", lambda run, *_: {"val_acc": 50.0, "dataset": run.data_label})
    monkeypatch.setattr(sweep, "resolve_precision", lambda name, device: "bf16")
    sweep.main(words)
    monkeypatch.setattr(sweep, "resolve_precision", lambda name, device: "fp32")
    with pytest.raises(UserError, match=r"precision bf16 \(asked: fp32\)"):
        sweep.main([*words, "--resume", "--lr", "0.3"])


def test_an_option_of_the_mask_schedules_multiplies_only_those_that_read_it(image_folder, tmp_path):
    words = [*options(image_folder, tmp_path), "--sparsity", "0.9", "--mask_schedule", "fixed", "gradual",
             "bidirectional"]
    found = sweep.combinations(sweep.parse_args([*words, "--exchange", "0.1", "0.3", "--padding", "2", "4"]))
    assert [(row["mask_schedule"], row["exchange"], row["padding"]) for row in found] == [
        ("fixed", "", 2), ("fixed", "", 4), ("gradual", "", 2), ("gradual", "", 4), ("bidirectional", 0.1, 2),
        ("bidirectional", 0.1, 4), ("bidirectional", 0.3, 2), ("bidirectional", 0.3, 4)]
    assert {row["update_until"] for row in found} == {"", 0.6}
    with pytest.raises(UserError, match="--exchange does nothing"):
        sweep.parse_args([*words[:-1], "--exchange", "0.1"])
    found = sweep.combinations(sweep.parse_args([*words, "--pruner", "magnitude", "lamp"]))
    assert [(row["pruner"], row["mask_schedule"]) for row in found] == [
        (pruner, name) for pruner in ("magnitude", "lamp") for name in ("fixed", "gradual", "bidirectional")]
    (pretraining,) = sweep.combinations(sweep.parse_args(options(image_folder, tmp_path)))
    assert (pretraining["pruner"], pretraining["mask_schedule"]) == ("", "fixed")
    with pytest.raises(UserError, match="--pruner"):
        sweep.parse_args([*options(image_folder, tmp_path), "--pruner", "lamp"])


def test_the_average_begins_in_the_last_third_and_forgets_by_its_decay(monkeypatch):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleNamespace(model=model, optimizer=optimizer, step=0, total_steps=10,
                              train_loader=None, val=None, precision=None)
    average = sweep.WeightAverage(trainer, 0.75)
    for _ in range(10):  # the weight is 1 after the first step, 2 after the second
        model.weight.grad = -torch.ones(1, 1)
        trainer.optimizer.step()
        trainer.step += 1
        if trainer.step == 6:
            assert average.model is None
    monkeypatch.setattr(sweep, "accuracy_with_new_statistics", lambda read, *_: read.weight.item())
    assert model.weight.item() == 10
    assert average.accuracy() == pytest.approx(7 * 0.75**3 + 0.25 * (8 * 0.75**2 + 9 * 0.75 + 10))


@pytest.mark.parametrize("words", [["late", "--update_until", "0.65"],
                                   ["gradual", "--update_every", "1", "--update_until", "0.65"]])
def test_the_average_is_as_sparse_as_what_was_trained(image_folder, tmp_path, monkeypatch, words):
    """The mask moves for the last time in the step before the average begins, or in its first."""
    main.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
               "--precision", "fp32", "--max_epochs", "1", "--pruner", "none"])
    survivors = []
    monkeypatch.setattr(sweep, "accuracy_with_new_statistics",
                        lambda model, *_: survivors.append(count_pruned_params(model).surviving) or 0.0)
    sweep.main([*options(image_folder, tmp_path), "--average", "0.9", "--sparsity", "0.9", "--epochs", "3",
                "--mask_schedule", *words])
    assert survivors == [27_090]


def test_a_sparsity_that_leaves_no_weight_is_refused_before_any_row(image_folder, tmp_path, monkeypatch):
    main.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
               "--precision", "fp32", "--max_epochs", "1", "--pruner", "none"])
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("a row was trained"))
    for schedule in ("fixed", "gradual"):
        with pytest.raises(UserError, match="--sparsity 0.999999 would leave 0 of 270,896 weights"):
            sweep.main([*options(image_folder, tmp_path), "--sparsity", "0.9", "0.999999", "--mask_schedule", schedule])


def test_an_averaged_model_is_a_row_of_its_own(image_folder, tmp_path):
    words = [*options(image_folder, tmp_path), "--average", "0.5"]
    sweep.main(words[:-2])
    sweep.main([*words, "--resume"])
    plain, averaged = rows_of(tmp_path)
    assert (plain["average"], averaged["average"]) == ("", "0.5")
    assert averaged["last_val_acc"] == plain["last_val_acc"] and 0 <= float(averaged["val_acc"]) <= 100
    with pytest.raises(UserError, match="--update_until 0.6"):  # rigl's mask moves until 0.75
        sweep.combinations(sweep.parse_args([*words, "--sparsity", "0.9", "--mask_schedule", "rigl"]))


def test_random_pruning_follows_the_seed_as_everywhere(image_folder, tmp_path, monkeypatch):
    run = open_run(sweep.parse_args(options(image_folder, tmp_path)))
    dense, masks = SimpleNamespace(model=model_loader("resnet20")), []
    monkeypatch.setattr(sweep.Trainer, "run", lambda trainer, _: masks.append(get_masks(trainer.model)) or sys.exit())
    asked = {**sweep.combinations(sweep.parse_args([*options(image_folder, tmp_path), "--sparsity", "0.9", "--pruner",
                                                    "random"]))[0]}
    for seed in (0, 1, 0):
        with pytest.raises(SystemExit):
            sweep.train(replace(run, seed=seed), asked, dense)
    first, other, again = (mask["conv1"] for mask in masks)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_wrong_number_of_a_recipe_is_one_line(image_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main([*options(image_folder, tmp_path), "--label_smoothing", "5"])
    assert error.value.code == 2 and "'5' is not a number from 0 to 1" in capsys.readouterr().err


def test_a_mask_schedule_needs_a_sparsity(image_folder, tmp_path):
    with pytest.raises(UserError, match="give a --sparsity"):
        sweep.main([*options(image_folder, tmp_path), "--mask_schedule", "gradual"])


def test_the_dense_model_of_one_seed_lies_under_the_root_or_in_a_folder_of_the_seed(tmp_path):
    args = SimpleNamespace(root=tmp_path, m_name="resnet20", seed=1, num_seeds=2)
    assert sweep.roots_of(args) == {1: tmp_path, 2: tmp_path / "seed_2"}
    checkpoint.save_checkpoint({}, checkpoint.dense_path(tmp_path / "seed_1", "resnet20"))
    assert sweep.roots_of(args) == {1: tmp_path / "seed_1", 2: tmp_path / "seed_2"}


def test_a_missing_dense_model_of_a_later_seed_is_found_before_any_training(image_folder, tmp_path, monkeypatch):
    checkpoint.save_checkpoint({}, checkpoint.dense_path(tmp_path, "resnet20"))
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(UserError, match="no dense model at .*seed_1"):
        sweep.main([*options(image_folder, tmp_path), "--sparsity", "0.9", "--num_seeds", "2"])
