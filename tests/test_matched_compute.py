"""The matched-compute study end to end on tiny data: equal sparsity, equal epochs, paired seeds, resumable."""
from __future__ import annotations

import csv
import json

import pytest

from experiments import matched_compute as study
from utils.errors import UserError


def options(image_folder, tmp_path) -> list[str]:
    return ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
            "--precision", "fp32", "--max_epochs", "1", "--finetune_epochs", "2", "--search_budget", "2",
            "--mini_finetune_epochs", "1", "--finetune_schedule", "constant", "--num_seeds", "2", "--arms",
            "rl+saliency", "proportional+reference", "random+random"]


def test_the_study_runs_is_continued_and_compares(image_folder, tmp_path, monkeypatch, capsys):
    words, real, calls = options(image_folder, tmp_path), study.measure, []

    def stop_at_the_third(run, args, arm, seed):
        calls.append((arm, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run, args, arm, seed)
    monkeypatch.setattr(study, "measure", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        study.main(words)
    with pytest.raises(UserError, match="--resume"):
        study.main(words)
    study.main([*words, "--resume"])
    assert calls[2] == calls[3] and len(calls) == 9  # four arms, two seeds, one repeated
    folder = tmp_path / "matched_compute/resnet20"
    with open(folder / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert len({row["surviving"] for row in rows}) == 1 and {row["epochs"] for row in rows} == {"2"}
    assert {row["arm"]: row["search_epochs"] for row in rows}["rl+saliency"] != "0"
    with open(folder / "verdicts.csv") as file:
        verdicts = list(csv.DictReader(file))
    assert [row["arm"] for row in verdicts] == ["rl+saliency", "proportional+reference", "random+random"]
    assert all(row["pairs"] == "2" for row in verdicts) and (folder / "verdicts.png").stat().st_size > 1000
    assert "against one-shot" in capsys.readouterr().out
    made = [json.loads(path.read_text())["config"] for path in folder.glob("seed_0/*/*0.97.json")]
    made += [json.loads(path.read_text())["config"] for path in folder.glob("seed_0/resnet20/ckpt_after_prune/*.json")]
    assert len(made) == 5 and {config["recipe"]["schedule"] for config in made} == {"constant"}
    assert [config["mini_finetune_epochs"] for config in made if config.get("allocation") == "rl"] == [[1]]


def test_comparison_by_hand():
    rows = [{"arm": arm, "seed": seed, "test_acc": value, "search_epochs": 0}
            for arm, values in ((study.CONTROL, (80.0, 81.0)), ("rl+saliency", (80.5, 81.5)),
                                ("greedy+random", (79.0,)))
            for seed, value in enumerate(values)]
    results = study.compare(rows, [study.CONTROL, "rl+saliency", "greedy+random"])
    found = [(row["arm"], row["mean"], row["pairs"]) for row in results]
    assert found == [("rl+saliency", 0.5, 2), ("greedy+random", -1.0, 1)]


@pytest.mark.parametrize("words, said", [(["--target_sparsity", "0.99"], "not below"),
                                         (["--finetune_epochs", "1"], "without epochs")])
def test_wrong_input(words, said, image_folder, tmp_path):
    with pytest.raises(UserError, match=said):
        study.main([*options(image_folder, tmp_path), *words])
