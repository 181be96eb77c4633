"""The single-layer study: statistics by hand, verdicts that follow the numbers, and the script with resume."""
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import single_layer_regrowth_analysis as study
from tests.test_regrowth_scripts import BACK, make_start
from utils import checkpoint
from utils.common import UserError
from utils.stage import ResumableTable
from utils.statistics import correlate, verdict


def test_correlations_by_hand():
    found = correlate([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert found["pearson"] == pytest.approx(1) and found["spearman"] == pytest.approx(1)
    assert found["pearson_p"] == pytest.approx(2 / 120, abs=0.005)  # the identity and its mirror among 5! orders
    found = correlate([1, 2, 3, 4], [1, 8, 27, 1000])
    assert found["spearman"] == pytest.approx(1) and found["pearson"] < 0.9
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2], [1, 2])):
        found = correlate(x, y)
        assert found["pearson_p"] == 1.0 and np.isnan(found["spearman"])
        assert verdict(found, "a", "b") == f"too few different points ({len(x)}) to say whether a predicts b"


def test_false_positives_are_as_rare_as_promised():
    random = np.random.RandomState(0)
    hits = sum(correlate(random.rand(12), random.rand(12))["pearson_p"] < 0.05 for _ in range(100))
    assert hits <= 11  # 5 expected; more than 11 has a chance of 1 %


@pytest.mark.parametrize("numbers, words", [
    ((-0.8, 0.001, -0.7, 0.01), "higher SSIM goes with lower gain"),
    ((0.8, 0.001, 0.7, 0.01), "higher SSIM goes with higher gain"),
    ((0.8, 0.001, 0.1, 0.6), "weak evidence only"), ((-0.8, 0.01, 0.7, 0.01), "weak evidence only"),
    ((0.2, 0.4, 0.1, 0.6), "no evidence")])
def test_the_verdict_follows_the_numbers(numbers, words):
    result = dict(zip(("pearson", "pearson_p", "spearman", "spearman_p"), numbers), n=19)
    assert verdict(result, "SSIM", "gain").startswith(words)


def test_gains_are_means_over_seeds_above_the_control_of_the_same_seed():
    base = {"capacity": 5, "regrown": 5, "capped": 0}
    rows = [{"layer": layer, "seed": seed, "ssim": ssim, **base, "immediate_gain": immediate,
             "immediate_gain_as_is": immediate - 30, "final_gain": final}
            for layer, seed, ssim, immediate, final in (
                (study.CONTROL, 0, 1.0, 0.0, 1.0), (study.CONTROL, 1, 1.0, 0.0, 2.0),
                ("b", 0, 0.9, -1.0, 2.0), ("b", 1, 0.9, -3.0, 2.0),
                ("a", 0, 0.2, 4.0, 6.0), ("a", 1, 0.2, 4.0, 4.0))]
    layers = study.by_layer(rows)
    assert [(row["layer"], row["immediate_gain"], row["final_gain"]) for row in layers] == \
        [("a", 4.0, 3.5), ("b", -2.0, 0.5)]
    assert [row["immediate_gain_as_is"] for row in layers] == [-26.0, -32.0]


def test_layers_that_took_the_whole_budget_are_correlated_by_themselves():
    layers = [{"ssim": ssim, "capped": capped, "regrown": regrown, "immediate_gain": 0.0, "final_gain": gain}
              for ssim, capped, regrown, gain in ((-0.4, 0, 1000, 2.0), (-0.3, 0, 1000, 1.0), (-0.2, 0, 1000, 3.0),
                                                  (0.8, 1, 10, 0.1), (0.9, 1, 10, 0.0))]
    found = {(row["gain"], row["unit"]): row for row in study.correlations(layers)}
    assert len(found) == 6
    whole = found["final_gain", "points, uncapped layers only"]
    assert whole["n"] == 3 and whole["pearson"] == pytest.approx(0.5)  # of (1, 2, 3) and (2, 1, 3)
    assert found["final_gain", "points"]["pearson"] < -0.7  # the small layers make it look as if SSIM told
    assert found["final_gain", "points per 1,000 weights"]["n"] == 5
    assert np.isnan(found["immediate_gain", "points"]["pearson"])


def test_a_table_can_be_continued_but_not_mixed(tmp_path):
    path = tmp_path / "t.csv"
    table = ResumableTable(path, ("name", "seed"), {"epochs": 3}, resume=False, overwrite=False)
    table.add({"name": "a", "seed": 0, "value": 1 / 3}, {})
    again = ResumableTable(path, ("name", "seed"), {"epochs": 3}, resume=True, overwrite=False)
    assert again.rows == table.rows == [{"name": "a", "seed": 0, "value": 0.333333}]
    assert again.has("a", 0) and not again.has("a", 1)
    with pytest.raises(UserError, match="--resume"):
        ResumableTable(path, ("name", "seed"), {"epochs": 3}, resume=False, overwrite=False)
    with pytest.raises(UserError, match=r"epochs 3 \(asked: 4\)"):
        ResumableTable(path, ("name", "seed"), {"epochs": 4}, resume=True, overwrite=False)


@pytest.mark.parametrize("name, content", [("t.json", '{"config": {"epo'), ("t.json", "[]"),
                                           ("t.csv", 'name,v\na,"open'), ("t.csv", "name,v\na\n")])
def test_a_damaged_table_is_said_to_be_so(name, content, tmp_path):
    path = tmp_path / "t.csv"
    ResumableTable(path, ("name",), {"epochs": 3}, resume=False, overwrite=False).add({"name": "a", "v": "b"}, {})
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged.*remove t.csv and t.json and use --resume"):
        ResumableTable(path, ("name",), {"epochs": 3}, resume=True, overwrite=False)


ROWS = [{"name": "a,b", "seed": 0, "value": 0.125, "note": "x"}, {"name": "ü", "seed": 1, "value": -2e-05, "note": ""}]
PLAIN = 'name,seed,value,note\n"a,b",0,0.125,x\nü,1,-2e-05,\n'
GERMAN = "name;seed;value;note\r\na,b;0;0,125;x\r\nü;1;-2,0E-05;\r\n;;;\r\n"


def saved_table(folder: Path) -> Path:
    path = folder / "t.csv"
    table = ResumableTable(path, ("name", "seed"), {}, resume=False, overwrite=False)
    for row in ROWS:
        table.add(row, {})
    assert path.read_text(encoding="utf-8") == PLAIN
    return path


@pytest.mark.parametrize("text, encoding", [
    (PLAIN, "utf-8"), (PLAIN, "utf-8-sig"), (PLAIN.replace("\n", "\r\n"), "utf-16"), (GERMAN, "utf-8-sig"),
    (GERMAN.replace(";", "\t"), "utf-16"), (PLAIN.replace("note\n", "note,mine\n").replace("x\n", "x,?\n").replace(
        "-05,\n", "-05,,\n"), "utf-8")])
def test_a_table_that_a_spreadsheet_saved_is_read_where_that_is_safe(text, encoding, tmp_path):
    path = saved_table(tmp_path)
    path.write_bytes(text.encode(encoding))
    again = ResumableTable(path, ("name", "seed"), {}, resume=True, overwrite=False)
    assert again.rows == ROWS
    again.add({"name": "c", "seed": 2, "value": 1.5, "note": "y"}, {})
    assert path.read_text(encoding="utf-8") == PLAIN + "c,2,1.5,y\n"


@pytest.mark.parametrize("old, new, said", [
    ("value", "Value", "it has no column 'value'"), ("0.125", "1. Dez", "'1. Dez' in row 1, column value, is no"),
    ("0.125", "", "'' in row 1, column value"), (",x", "", "row 1 has 3 cells instead of 4"),
    (PLAIN, "", "it is empty"),
    ("ü", "\udcfc", "it is no text in UTF-8 or UTF-16")])
def test_a_table_that_a_spreadsheet_changed_is_called_damaged(old, new, said, tmp_path):
    path = saved_table(tmp_path)
    path.write_bytes(PLAIN.replace(old, new).encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"t.csv is damaged: {said}.*remove t.csv and t.json"):
        ResumableTable(path, ("name", "seed"), {}, resume=True, overwrite=False)
    assert path.read_bytes() == before


def test_the_script_measures_every_layer_and_continues_after_a_stop(tmp_path, image_folder, monkeypatch, capsys):
    make_start(tmp_path)
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
             "--precision", "fp32", "--layers", "layer1.*", "linear", "--finetune_epochs", "1", "--ssim_batches", "1"]
    real, calls = study.regrow_layer, []

    def stop_at_the_fourth(run, args, start, reference, layer, number, seed):
        calls.append(layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(run, args, start, reference, layer, number, seed)
    monkeypatch.setattr(study, "regrow_layer", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        study.main(words)
    with pytest.raises(UserError, match="--resume"):
        study.main(words)
    study.main([*words, "--resume"])
    assert calls[3] == calls[4] and len(calls) == len(set(calls)) + 1 == 9  # control, 6 convolutions, linear
    folder = tmp_path / "single_layer_savedir/resnet20"
    with open(folder / "single_layer.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows][0] == study.CONTROL and len(rows) == 8
    for row in rows[1:]:
        capacity = int(row["capacity"])
        before, as_is, new = (float(row[f"val_acc_{when}"]) for when in ("before", "immediate", "immediate_bn"))
        assert float(row["immediate_gain"]) == pytest.approx(new - before, abs=1e-3)
        assert float(row["immediate_gain_as_is"]) == pytest.approx(as_is - before, abs=1e-3)
        assert int(row["regrown"]) == min(BACK, capacity) and int(row["capped"]) == (capacity < BACK)
    assert (folder / "single_layer.png").stat().st_size > 1000 and (folder / "correlations.csv").exists()
    assert "SSIM" in capsys.readouterr().out


def test_layers_without_a_pruned_weight_are_refused_before_anything_is_trained(tmp_path, image_folder):
    make_start(tmp_path)
    path = checkpoint.pruned_path(tmp_path, "resnet20", 0.99)
    start = checkpoint.load_checkpoint(path)
    start["conv1.weight_mask"].fill_(1)
    checkpoint.save_checkpoint(start, path)
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path)]
    with pytest.raises(UserError, match="--layers conv1: no weight is pruned there"):
        study.main([*words, "--layers", "conv1"])
    for name in [key for key in start if key.endswith("weight_mask")]:
        start[name].fill_(1)
    checkpoint.save_checkpoint(start, tmp_path / "whole.pth")
    with pytest.raises(UserError, match="the starting model: no weight is pruned there"):
        study.main([*words, "--starting_checkpoint", str(tmp_path / "whole.pth")])
    with pytest.raises(UserError, match="--start_sparsity finds the checkpoint under --root.*leave one"):
        study.main([*words, "--starting_checkpoint", str(path), "--start_sparsity", "0.9"])
