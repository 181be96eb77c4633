"""The matched-compute study end to end on tiny data: equal sparsity, equal epochs, paired seeds, resumable."""
from __future__ import annotations

import csv
import json

import pytest
import torch

from experiments import matched_compute as study
from utils.checkpoint import read_csv
from utils.common import UserError
from utils.mask_schedule import plan_fields
from utils.stage1 import Outcome
from utils.statistics import compare_arms
from utils.training import Trainer


def options(image_folder, tmp_path) -> list[str]:
    return ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
            "--precision", "fp32", "--max_epochs", "1", "--finetune_epochs", "2", "--search_budget", "2",
            "--mini_finetune_epochs", "1", "--finetune_schedule", "constant", "--num_seeds", "2", "--arms",
            "rl+saliency", "proportional+reference", "random+random", "proportional+saliency+reference"]


MOVING = ["gradual", "rigl", "acdc", "bidirectional", "bidirectional+random+erk"]


def test_the_study_runs_is_continued_and_compares(image_folder, tmp_path, monkeypatch, capsys):
    words, real, calls = options(image_folder, tmp_path), study.measure, []

    def stop_at_the_third(run, args, arm, sparsity):
        calls.append((arm, run.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run, args, arm, sparsity)
    monkeypatch.setattr(study, "measure", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        study.main(words)
    with pytest.raises(UserError, match="--resume"):
        study.main(words)
    study.main([*words, "--resume"])
    assert calls[2] == calls[3] and len(calls) == 11  # five arms, two seeds, one repeated
    folder = tmp_path / "matched_compute/resnet20"
    with open(folder / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert len({row["surviving"] for row in rows}) == 1 and {row["epochs"] for row in rows} == {"2"}
    assert {row["arm"]: row["search_epochs"] for row in rows}["rl+saliency"] != "0"
    with open(folder / "verdicts.csv") as file:
        verdicts = list(csv.DictReader(file))
    assert [row["arm"] for row in verdicts] == ["rl+saliency", "proportional+saliency+reference",
                                                "proportional+reference", "random+random"]
    assert all(row["pairs"] == "2" for row in verdicts) and (folder / "verdicts_0.97.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "against one-shot" in said and "arm random+random, target 0.97, seed 1 (10 of 10)" in said
    made = [json.loads(path.read_text())["config"] for path in folder.glob("seed_0/*/*0.97.json")]
    made += [json.loads(path.read_text())["config"] for path in folder.glob("seed_0/one-shot_*/*/*/*.json")]
    assert len(made) == 6 and {config["recipe"]["schedule"] for config in made} == {"constant"}
    values = [(config["allocation"], config["selection"], config["init_strategy"]) for config in made
              if config.get("method") == "saliency"]
    assert sorted(values) == [("proportional", "saliency", "reference"), ("random", "random", "reference"),
                              ("rl", "saliency", "zero")]
    assert [config["mini_finetune_epochs"] for config in made if config.get("allocation") == "rl"] == [[1]]
    table = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(table[:-1]).replace("image folder (PNG)", "torchvision"))
    with pytest.raises(UserError, match=r"rows of other data: cifar10, torchvision, and this run reads .*PNG"):
        study.main([*words, "--resume"])


def test_a_default_that_is_spelled_out_is_the_default():
    """So that a table goes on with it."""
    words = ["--m_name", "resnet20"]
    assert study.parse_args([*words, "--pruner", "magnitude"]).pruner == study.parse_args(words).pruner


def test_schedules_are_arms_at_every_sparsity_with_one_number_of_steps(image_folder, tmp_path):
    words = options(image_folder, tmp_path)[:-7]
    study.main([*words, "--num_seeds", "1", "--sparsity", "0.97", "0.99", "--recipe", "short", "--arms", *MOVING,
                "proportional+random"])
    folder = tmp_path / "matched_compute/resnet20"
    with open(folder / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    arms = {target: {row["arm"] for row in rows if row["target"] == target} for target in ("0.97", "0.99")}
    assert arms["0.99"] == {"one-shot", *MOVING} and arms["0.97"] == arms["0.99"] | {"proportional+random"}
    assert {(row["target"], row["surviving"]) for row in rows} == {("0.97", "8127"), ("0.99", "2709")}
    assert all(float(row["seconds"]) > 0 for row in rows) and (folder / "verdicts_0.99.png").stat().st_size > 1000
    cards = [json.loads(path.read_text()) for path in folder.glob("seed_0/*_2/resnet20/ckpt_after_prune/*.json")]
    assert len(cards) == 12 and len({json.dumps(card["config"]["recipe"]) for card in cards}) == 1
    masks = {(card["config"]["mask"]["regrow_rule"], card["config"]["mask"]["regrow_allocation"])
             for card in cards if card["config"]["schedule"] == "bidirectional"}
    assert masks == {("gradient", "layer"), ("random", "erk")}
    assert {card["epochs"] for card in cards} == {2}


def test_the_control_and_the_arms_see_the_images_in_the_same_order(image_folder, tmp_path, monkeypatch):
    orders, real = [], Trainer._train_epoch

    def watch(trainer, bar):
        orders.append((trainer.recipe.batch_size, trainer.train_loader.generator.get_state()))
        return real(trainer, bar)
    monkeypatch.setattr(Trainer, "_train_epoch", watch)
    study.main([*options(image_folder, tmp_path)[:-4], "gradual", "proportional+random", "uniform+reference",
                "--num_seeds", "1"])
    _, start, control, middle, *others = orders  # after the epoch of pretraining
    assert len(others) == 4  # both epochs of the schedule, then that of each arm that regrows
    for order, expected in zip((start, *others), (control, control, middle, middle, middle), strict=True):
        assert order[0] == expected[0] and torch.equal(order[1], expected[1])
    assert not torch.equal(control[1], middle[1])


def test_an_arm_is_an_allocation_a_selection_and_perhaps_values():
    assert study.REGROWN["proportional+saliency"] == ("proportional", "saliency", "zero")
    assert study.REGROWN["proportional+saliency+reference"] == ("proportional", "saliency", "reference")
    assert study.REGROWN["rl+random"] == ("rl", "random", "reference")
    assert study.MOVING["gradual"] == {"schedule": "gradual", "update_every": 40, "update_until": 0.6}
    assert study.MOVING["rigl+saliency"]["regrow_rule"] == "saliency"
    assert study.MOVING["rigl+saliency"]["regrow_allocation"] == "layer"
    assert "gradual+saliency" not in study.ARMS and "acdc+random" not in study.ARMS
    words = ["--m_name", "resnet20", "--arms", "uniform+saliency+zero", "greedy+gradient+kaiming", "one-shot",
             "rl+reference+reference"]
    assert study.parse_args(words).arms == ["one-shot", "rl+reference", "uniform+saliency", "greedy+gradient+kaiming"]
    assert set(study.DEFAULT_ARMS) - {study.CONTROL} <= set(study.ARMS)


@pytest.mark.parametrize("arm", ["rl", "rl+", "best+saliency", "rl+best", "rl+saliency+dense", "rl+saliency+zero+zero",
                                 "gradual+saliency", "fixed", "bidirectional+saliency+best"])
def test_an_unknown_arm_is_one_line(arm, capsys):
    with pytest.raises(SystemExit):
        study.parse_args(["--m_name", "resnet20", "--arms", arm])
    error = capsys.readouterr().err
    assert f"'{arm}' is not one-shot, schedule" in error and len(error) < 600 and error.count("\n") == 1


def test_comparison_by_hand():
    rows = [{"arm": arm, "target": target, "seed": seed, "test_acc": value, "search_epochs": 0, "seconds": 10 * value}
            for target, arm, values in ((0.97, study.CONTROL, (80.0, 81.0)), (0.97, "rl+saliency", (80.5, 81.5)),
                                        (0.97, "gradual", (79.0,)), (0.99, study.CONTROL, (70.0,)),
                                        (0.99, "gradual", (74.0, 75.0)), (0.99, "rigl", ()),
                                        (0.99, "renamed+b", (69.0,)), (0.99, "renamed+a", (68.0,)))
            for seed, value in enumerate(values)]
    results = compare_arms(rows, study.CONTROL, study.ARMS)
    found = [(row["target"], row["arm"], row["mean"], row["pairs"], row["seconds"]) for row in results]
    assert found == [(0.97, "gradual", -1.0, 1, 790.0), (0.97, "rl+saliency", 0.5, 2, 810.0),
                     (0.99, "gradual", 4.0, 1, 740.0), (0.99, "renamed+a", -2.0, 1, 680.0),
                     (0.99, "renamed+b", -1.0, 1, 690.0)]  # arms that are no longer there come last


def test_verdicts_against_another_arm_have_files_of_their_own(tmp_path, monkeypatch, capsys):
    configs = []
    rows = [{"arm": arm, "target": 0.97, "seed": seed, "test_acc": value + seed, "search_epochs": 0, "seconds": 1.0}
            for arm, value in ((study.CONTROL, 78.0), ("gradual", 81.0), ("bidirectional", 82.0)) for seed in (0, 1)]

    def make(args, folder, config, keys, groups, *_):
        configs.append(config)
        assert ("gradual", 0.97, args.seed) in [key for group in groups for key in group]
        return rows
    monkeypatch.setattr(study, "make_rows", make)
    labels, draw = [], study.plots.plot_differences
    monkeypatch.setattr(study.plots, "plot_differences", lambda *args: labels.append(args[-1]) or draw(*args))
    words = ["--m_name", "resnet20", "--save_dir", str(tmp_path), "--arms", "gradual", "bidirectional"]
    study.main(words)
    study.main([*words[:-2], "bidirectional", "--against", "gradual", "--seed", "3"])
    assert configs[0] == configs[1] and labels == ["one-shot pruning", "gradual"]  # both are of one table
    assert {path.name for path in tmp_path.iterdir()} == {
        f"verdicts{against}{end}" for against in ("", "_against_gradual") for end in (".csv", "_0.97.png")}
    assert [(row["arm"], row["mean"]) for row in read_csv(tmp_path / "verdicts_against_gradual.csv", {})] == [
        ("one-shot", "-3"), ("bidirectional", "1")]
    assert "+1.00 points against gradual: " in capsys.readouterr().out


def test_a_model_without_a_run_card_makes_no_row(tmp_path, monkeypatch):
    lost = Outcome(None, tmp_path / "pruned.pth", {})
    monkeypatch.setattr(study, "pruned_model", lambda *_: lost)
    with pytest.raises(UserError, match="pruned.pth has no run card"):
        study.measure(None, study.parse_args(["--m_name", "resnet20"]), "one-shot", 0.97)


@pytest.mark.parametrize("words, said", [(["--target_sparsity", "0.99"], "not below"),
                                         (["--sparsity", "0.995", "0.99"], "makes a model denser"),
                                         (["--finetune_epochs", "1"], "without epochs")])
def test_wrong_input(words, said, image_folder, tmp_path):
    with pytest.raises(UserError, match=said):
        study.main([*options(image_folder, tmp_path), *words])


@pytest.mark.parametrize("share, epochs, before", [("0.29", "100", 29), ("0.55", "5", 3)])  # 28.999..., 2.75
def test_the_epochs_before_regrowth_are_rounded_to_the_nearest(share, epochs, before, monkeypatch):
    class Stop(Exception):
        """Nothing is to be trained."""

    def stop(run, args, arm, sparsity, epochs_before):
        assert epochs_before == before
        raise Stop
    monkeypatch.setattr(study, "regrown_models", stop)
    args = study.parse_args(["--m_name", "resnet20", "--before_share", share, "--finetune_epochs", epochs])
    with pytest.raises(Stop):
        study.measure(None, args, "proportional+reference", 0.97)


def test_a_table_of_schedules_with_other_defaults_is_not_continued(image_folder, tmp_path, monkeypatch):
    words = [*options(image_folder, tmp_path)[:-7], "--num_seeds", "1", "--sparsity", "0.97", "--arms", "gradual"]
    study.main(words)
    monkeypatch.setitem(study.MOVING, "late", {**plan_fields("late"), "update_until": 0.4})
    study.main([*words, "late", "--resume"])  # a schedule that it has no row of may have any default, or be new
    table = tmp_path / "matched_compute/resnet20/runs.json"
    assert {name: plan["update_until"] for name, plan in json.loads(table.read_text())["config"]["schedules"].items()
            } == {"gradual": 0.6, "late": 0.4}
    monkeypatch.setitem(study.MOVING, "gradual", {**plan_fields("gradual"), "update_until": 0.5})
    with pytest.raises(UserError, match="update_until 0.6 .asked: 0.5."):
        study.main([*words, "--resume"])


def test_all_arms_prune_by_the_rule_asked_for(image_folder, tmp_path):
    words = [*options(image_folder, tmp_path)[:-7], "--num_seeds", "1", "--arms", "gradual", "proportional+random"]
    study.main([*words, "--pruner", "erk"])
    cards = [json.loads(path.read_text())["config"] for path in tmp_path.glob("**/ckpt_after_prune/*.json")]
    assert [config["pruner"] for config in cards] == ["erk"] * 3
    with pytest.raises(UserError, match=r"pruner erk \(asked: None\)"):
        study.main([*words, "--resume"])


@pytest.mark.parametrize("words, said", [
    (["--search_budget", "1", "--mini_finetune_epochs", "1"], "does not pay one batch"),
    (["--mini_finetune_epochs", "3", "1"], "increas"),
    (["--pruner", "unifplus", "--sparsity", "0.999", "--arms", "gradual"], "reaches a sparsity of at most"),
    (["--pruner", "unifplus", "--start_sparsity", "0.999", "--sparsity", "0.9"], "reaches a sparsity of at most"),
    (["--finetune_padding", "32"], "a padding of 32 pixels is too much"),
])
def test_what_a_row_would_refuse_is_refused_before_anything_is_trained(words, said, image_folder, tmp_path):
    with pytest.raises(UserError, match=said):
        study.main([*options(image_folder, tmp_path), *words])
    assert not list(tmp_path.rglob("*.pth"))
