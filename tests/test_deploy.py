"""What deployed forms cost: counts by hand, and the benchmark from the command line."""
from __future__ import annotations

import argparse
import csv

import pytest
import torch
from torch import nn

from experiments import deploy as script
from experiments.csr import sparse_products
from utils import checkpoint
from utils.analysis_utils import set_masks
from utils.common import UserError
from utils.compact import largest_difference
from utils.model_loader import model_loader
from utils.pruning import weight_pruner_loader


def small_net() -> nn.Module:
    """3 -> 4 maps of 16x16 -> 2 logits, with 3 + 2 active weights."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 2))
    conv, linear = torch.zeros(4, 3, 3, 3), torch.zeros(2, 4)
    conv[[0, 1, 1], [0, 1, 2], 1, 1] = 1
    linear[[0, 1], [0, 1]] = 1
    set_masks(model, {"0": conv, "4": linear})
    return model.eval()


def test_counts_by_hand(monkeypatch):
    monkeypatch.setattr(script, "MEASURED_S", 0.001)
    model = small_net()
    assert script.multiplications(model) == 4 * 27 * 16 * 16 + 8
    sparse = sparse_products(model)
    assert script.multiplications(sparse) == 3 * 16 * 16 + 2
    rows = script.measure_forms("small", model, 32, argparse.Namespace(threads=[1], batch_sizes=[1], num_runs=1))
    found = {row["form"]: row["parameters"] for row in rows if row["engine"] == script.EAGER}
    assert (found["dense"], found["masked"]) == (108 + 4 + 8 + 2, 2 * 108 + 4 + 2 * 8 + 2)
    assert found["CSR"] == (3 + 3 + 5) + 4 + (2 + 2 + 3) + 2


def test_sparse_products_need_no_bias():
    model = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Flatten(), nn.Linear(18, 3, bias=False)).eval()
    weight_pruner_loader("magnitude")(model, 0.5)
    assert largest_difference(model, sparse_products(model), torch.randn(2, 3, 5, 5)) < 1e-5


@pytest.mark.parametrize("name", ["resnet20", "effnet"])  # the second with depthwise layers, which CSR leaves alone
def test_sparse_products_give_the_same_logits(name):
    model = model_loader(name, seed=0).eval()
    weight_pruner_loader("unif")(model, 0.9)
    assert largest_difference(model, sparse_products(model), torch.randn(3, 3, 32, 32)) < 1e-5


def test_the_benchmark_writes_table_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "MEASURED_S", 0.001)
    script.main(["--models", "alexnet:lamp:0.99", "--batch_sizes", "2", "--threads", "1", "--num_runs", "1",
                 "--save_dir", str(tmp_path)])
    with open(tmp_path / "deploy.csv") as file:
        rows = {row["form"]: row for row in csv.DictReader(file) if row["engine"] == script.EAGER}
    assert list(rows) == ["dense", "masked", "compact", "CSR"]
    assert float(rows["dense"]["speedup"]) == 1 and all(float(row["difference"]) < 1e-5 for row in rows.values())
    assert int(rows["dense"]["bytes"]) < int(rows["masked"]["bytes"]) and int(rows["CSR"]["bytes"]) < 500_000
    assert (tmp_path / "deploy.png").read_bytes().startswith(b"\x89PNG")
    assert "effective 0.99" in capsys.readouterr().out


@pytest.mark.parametrize("word, said", [("alexnet:lamp:much", "'much' is no sparsity"),
                                        ("nothing.pth", "no checkpoint at nothing.pth")])
def test_models_that_are_none_are_refused(word, said):
    with pytest.raises(UserError, match=said):
        script.pruned_model(word)


def test_the_shipped_model_is_named_by_its_sparsity():
    label, model, side = script.pruned_model(script.MODELS_MEASURED[0])
    assert (label, side) == ("resnet20 0.99", 32) and script.multiplications(model) == 40_813_184


def test_two_models_of_one_kind_have_rows_of_their_own_and_each_its_images(tmp_path, monkeypatch):
    model = model_loader("resnet20", seed=0)
    weight_pruner_loader("unif")(model, 0.9)
    path = tmp_path / "small.pth"
    checkpoint.save_checkpoint({"net": model.state_dict(), "acc": 1.0, "epoch": 1, "input": {"image_size": 16}}, path)
    seen = []
    monkeypatch.setattr(script, "measure_forms", lambda name, model, side, args: seen.append((name, side)) or [])
    monkeypatch.setattr(script, "plot", lambda *_: None)
    script.main(["--models", str(path), str(path), script.MODELS_MEASURED[0], "--save_dir", str(tmp_path)])
    assert seen == [("resnet20 0.9, model 1", 16), ("resnet20 0.9, model 2", 16), ("resnet20 0.99", 32)]
    assert script.multiplications(model, 16) < 0.26 * script.multiplications(model)
