"""The straightforward versions give the same answers as ours: only then is their speed a fair comparison."""
from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.conftest import make_images, run_here
from tests.test_regrowth_scripts import make_start
from utils import benchmark
from utils.analysis_utils import get_masks, prunable_layers
from utils.benchmark import (
    argsort_lamp_masks,
    elementwise_regrowth,
    measure,
    plain_dataloader,
    plain_training_epoch,
)
from utils.checkpoint import save_csv
from utils.common import peak_memory_mb
from utils.pruning import weight_pruner_loader
from utils.selection import exact_k_mask

CPU = torch.device("cpu")


def test_argsort_lamp_equals_ours(small_cnn):
    weights = [layer.weight.detach().clone() for layer in prunable_layers(small_cnn).values()]
    total = sum(weight.numel() for weight in weights)
    for amount in (0.3, 0.9, 0.99):
        keep = round((1 - amount) * total)
        expected = argsort_lamp_masks(weights, keep)
        model = nn.Sequential(*[_fresh(weight) for weight in weights])
        weight_pruner_loader("lamp")(model, amount)
        assert all(torch.equal(a, b) for a, b in zip(get_masks(model).values(), expected))


def _fresh(weight: torch.Tensor) -> nn.Module:
    outputs, inputs = weight.shape[:2]
    new = nn.Linear(inputs, outputs) if weight.dim() == 2 else nn.Conv2d(inputs, outputs, weight.shape[2:])
    with torch.no_grad():
        new.weight.copy_(weight)
    return new


def test_elementwise_regrowth_does_what_ours_does():
    generator = torch.Generator().manual_seed(0)
    weight, values = torch.randn(2, 6, 5, generator=generator)
    scores = torch.randperm(30, generator=generator).view(6, 5).float()
    mask = (torch.rand(6, 5, generator=generator) < 0.3).float()
    expected, before, old = exact_k_mask(scores, 7, mask == 0), mask.clone(), weight.clone()
    elementwise_regrowth({"layer": 7}, [(weight, mask, scores, values)])
    assert torch.equal(mask.bool() & ~before.bool(), expected) and torch.equal(weight[expected], values[expected])
    assert torch.equal(weight[~expected], old[~expected])


def test_the_plain_loader_and_loop_train(small_cnn):
    images, targets = make_images(8, 5, 0)
    loader = plain_dataloader(images, targets, 8, [0.5] * 3, [0.25] * 3, workers=0)
    inputs, labels = next(iter(loader))
    assert inputs.shape == (8, 3, 32, 32) and labels.dtype == torch.int64 and len(loader) == 5
    optimizer = torch.optim.SGD(small_cnn.parameters(), lr=0.05, momentum=0.9)
    losses = [plain_training_epoch(small_cnn, loader, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_measure_counts_only_the_work(monkeypatch):
    """By a clock that the work and its preparation move: 9 and 4 s to warm up, then 1, 3 and 2."""
    clock, calls = [0.0], []
    monkeypatch.setattr(benchmark, "now", lambda device: clock[0])

    def work(number: int) -> None:
        calls.append(number)
        clock[0] += (9, 4, 1, 3, 2)[number]

    def prepare() -> int:
        clock[0] += 100
        return len(calls)
    timing, = measure([work], CPU, repeats=3, warmup=2, prepare=prepare)
    assert calls == [0, 1, 2, 3, 4]
    assert timing == {"median_s": 2, "fastest_s": 1, "slowest_s": 3, "repeats": 3}
    with pytest.raises(ValueError):
        measure([lambda: None], CPU, repeats=0)
    assert peak_memory_mb(CPU) > 10


def test_results_of_several_roots_are_gathered(tmp_path, run_script):
    for root in ("one", "two"):
        make_start(tmp_path / root)
    row = {"method": "saliency", "allocation": "rl", "sparsity_before": 0.99, "sparsity": 0.97, "val_acc_before": 10,
           "val_acc": 12, "start_test_acc": 11, "test_acc": 12, "seed": 0, "checkpoint": "regrown_resnet20_0.97.pth"}
    for place, new in (("one/here", {}), ("two/there", {"found_by": "erk"})):  # whatever --save_dir is called
        save_csv([{**row, **new}], tmp_path / place / "regrowth_results.csv")
    save_csv([{**row, "checkpoint": "regrown_vgg16_0.97.pth"}], tmp_path / "one/vgg16/regrowth_results.csv")
    process = run_script("experiments/collect_results.py", "--m_name", "resnet20", "--roots", tmp_path / "one",
                         tmp_path / "two", "--save_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "2 regrown models" in process.stdout and "rl, best: erk" in process.stdout
    assert (tmp_path / "out/bidirectional_pruning.csv").read_text().count("magnitude") == 1  # the same model twice
    assert (tmp_path / "out/bidirectional.png").stat().st_size > 1000
    missing = run_here("experiments/collect_results.py", "--m_name", "vgg16", "--roots", tmp_path)
    assert missing.returncode == 2 and "run main.py first" in missing.stderr


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_the_unit_of_the_system_and_0_where_that_does_not_say(platform, unit, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=300 * 2**20 // unit))
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert peak_memory_mb(CPU) == 300
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory_mb(CPU) == 0
