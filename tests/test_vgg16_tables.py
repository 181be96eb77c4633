"""The published tables beside ours: every setting runs on tiny data, is continued, and prints only what ran."""
from __future__ import annotations

import csv

import pytest

from experiments import vgg16_tables as tables
from utils.common import UserError


def test_rows_by_name():
    assert tables.chosen_entries(["R", "A:0.64", "B:0.999"]) == \
        ["B:0.999", "A:0.64", "R:0.98", "R:0.97", "R:0.96", "R:0.95"]
    assert len(tables.chosen_entries(["A", "B", "R"])) == 10 + 7 + 4
    with pytest.raises(UserError, match="B:0.5 is no row"):
        tables.chosen_entries(["B:0.5"])


def test_an_option_of_the_search_is_refused_without_one():
    assert tables.parse_args(["--allocation", "proportional"]).search_budget == 60
    with pytest.raises(UserError, match="--allocation proportional does without"):
        tables.parse_args(["--allocation", "proportional", "--search_budget", "5"])


def test_published_iterations_are_forty_per_cent_each():
    for number, sparsity in enumerate(tables.PUBLISHED["A"], start=1):
        assert sparsity == pytest.approx(1 - 0.6**number, abs=6e-4)


def test_comparison_by_hand():
    rows = [{"row": "B:0.95", "seed": seed, "test_acc": value} for seed, value in enumerate((92.4, 92.6, 92.5))]
    rows += [{"row": "R:0.98", "seed": 0, "test_acc": 92.0}, {"row": "A:0.4", "seed": 0, "test_acc": 91.0}]
    one_shot, iterative, regrown = tables.beside_published(rows, "vgg16")
    assert one_shot["mean"] == pytest.approx(92.5) and one_shot["std"] == pytest.approx(0.1)
    assert one_shot["difference"] == pytest.approx(0.07) and one_shot["within_published_spread"] == 1
    assert iterative["within_published_spread"] == 0 and iterative["std"] == ""
    assert regrown["difference"] == pytest.approx(-0.33) and regrown["within_published_spread"] == ""
    other = tables.beside_published(rows, "resnet20")
    assert [row["published"] for row in other] == ["", "", ""] and other[0]["mean"] == one_shot["mean"]


def test_every_setting_runs_and_is_continued(image_folder, tmp_path, monkeypatch, capsys):
    words = ["--m_name", "resnet20", "--rows", "B:0.95", "A:0.64", "R:0.98", "--seeds", "0", "1", "--max_epochs", "1",
             "--iterative_epochs", "1", "--finetune_epochs", "1", "--allocation", "proportional", "--data_dir",
             str(image_folder), "--root", str(tmp_path), "--device", "cpu", "--precision", "fp32"]
    real, calls = tables.measure, []

    def stop_at_the_third(run, args, entry):
        calls.append((entry, run.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run, args, entry)
    monkeypatch.setattr(tables, "measure", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tables.main(words)
    with pytest.raises(UserError, match="--resume"):
        tables.main(words)
    tables.main([*words, "--resume"])
    assert calls[2] == calls[3] and len(calls) == 7  # three rows, two seeds, one repeated
    folder = tmp_path / "vgg16_tables/resnet20"
    with open(folder / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["row"]: row["epochs"] for row in rows} == {"B:0.95": "1", "A:0.64": "2", "R:0.98": "2"}  # since dense
    surviving = {row["row"]: row["surviving"] for row in rows}
    assert surviving == {label: str(round((1 - sparsity) * 270_896))
                         for label, sparsity in (("B:0.95", 0.95), ("A:0.64", 0.64), ("R:0.98", 0.98))}
    before = {path: path.stat().st_mtime_ns for path in (folder / "seed_0").rglob("*.pth")}
    tables.main([*words, "--seeds", "0", "--overwrite", "--finetune_lr", "0.001"])  # anew, also with other arguments
    after = {path: path.stat().st_mtime_ns for path in (folder / "seed_0").rglob("*.pth")}
    assert before and before.keys() == after.keys() and all(after[path] > before[path] for path in before)
    out = capsys.readouterr().out
    assert "B:0.95" in out and "B:0.96" not in out and (folder / "tables.png").stat().st_size > 1000


def test_a_search_that_cannot_be_is_refused_before_anything_is_trained():
    with pytest.raises(UserError, match="does not pay one batch"):
        tables.parse_args(["--search_budget", "1"])
    assert tables.parse_args(["--search_budget", "1", "--rows", "B"]).search_budget == 1
