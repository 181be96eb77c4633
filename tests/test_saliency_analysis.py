"""Per-class saliency: closed forms, explicit loops, counts by hand, a smoke run."""
from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import REPOSITORY
from utils import plots, saliency_analysis
from utils.analysis_utils import clone_model, get_masks, prunable_layers, set_masks
from utils.checkpoint import dense_path, save_checkpoint
from utils.common import UserError
from utils.data_loader import BatchLoader
from utils.model_loader import model_loader
from utils.saliency_analysis import (
    ClassSaliency,
    analyse,
    chunk_size,
    class_sample,
    find_few_class,
    gradient_saliency,
    same_scale,
    verdict,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear_problem(images: int = 7, inputs: int = 4, classes: int = 3) -> tuple[nn.Linear, Tensor, Tensor]:
    """A softmax classifier with its inputs and targets."""
    torch.manual_seed(3)
    model, inputs_ = nn.Linear(inputs, classes), torch.randn(images, inputs)
    return model, inputs_, torch.arange(images) % 3


def image_batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of random images of five classes; class 4 has none."""
    random = torch.Generator().manual_seed(1)
    batches = []
    for targets in ([0, 1, 2, 3, 0], [1, 1, 3]):
        inputs = torch.randn(len(targets), 3, 32, 32, generator=random).to(memory_format=torch.channels_last)
        batches.append((inputs, torch.tensor(targets)))
    return batches


def trained_statistics(model: nn.Module) -> nn.Module:
    """The model in training mode with batch-norm statistics that are not the identity."""
    random = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=random))
            module.running_var.copy_(torch.rand(module.num_features, generator=random) + 0.5)
    return model.train()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding, whose size goes by the largest value of the layer."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def prune_some(model: nn.Module, fraction: float = 0.6) -> nn.Module:
    random = torch.Generator().manual_seed(4)
    set_masks(model, {name: torch.rand(layer.weight.shape, generator=random) > fraction
                      for name, layer in prunable_layers(model).items()})
    return model


# --- per-image gradients -------------------------------------------------------------------------------------------


def test_closed_form_of_a_linear_classifier():
    model, inputs, targets = linear_problem()
    found = gradient_saliency(model, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])], 3)
    with torch.no_grad():
        errors = torch.softmax(model(inputs), 1) - F.one_hot(targets, 3)  # dl/dlogits of softmax cross-entropy
        gradients = errors[:, :, None] * inputs[:, None, :]  # (p - y) x^T
        for label in range(3):
            own = gradients[targets == label]
            torch.testing.assert_close(found["gradient"].matrices[""][label], own.abs().mean(0).flatten())
            expected = own.square().mean(0) * model.weight.square()
            torch.testing.assert_close(found["fisher"].matrices[""][label], expected.flatten())
    assert found["fisher"].images == [(targets == label).sum() for label in range(3)]
    assert found["fisher"].matrices[""].dtype == torch.float32


@pytest.mark.parametrize("pruned", [False, True])
def test_agrees_with_single_image_backward_passes(small_cnn, pruned):
    model = trained_statistics(small_cnn)
    model = prune_some(model) if pruned else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = image_batches()
    found = gradient_saliency(model, batches, 5)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    plain = clone_model(model).eval()
    layers, masks = prunable_layers(plain), get_masks(plain)
    expected = {name: torch.zeros(2, 5, layer.weight.numel()) for name, layer in layers.items()}
    counts = torch.zeros(5)
    for inputs, targets in batches:
        for image, target in zip(inputs, targets):
            loss = F.cross_entropy(plain(image[None]), target[None])
            for name, gradient in zip(layers, torch.autograd.grad(loss, [layer.weight for layer in layers.values()])):
                expected[name][0, target] += gradient.abs().flatten()
                expected[name][1, target] += gradient.square().flatten()
            counts[target] += 1
    assert found["gradient"].images == counts.tolist() and counts[4] == 0
    for name, layer in layers.items():
        means = expected[name] / counts.clamp_min(1)[:, None]
        fisher = means[1] * layer.weight.detach().square().flatten()
        assert_same(found["gradient"].matrices[name], means[0])
        assert_same(found["fisher"].matrices[name], fisher)
        if pruned:  # theta = 0 there, though the loss has a gradient
            gone = ~masks[name].flatten()
            assert found["fisher"].matrices[name][:, gone].count_nonzero() == 0
            assert found["gradient"].matrices[name][:, gone].count_nonzero() > 0


def test_chunks_do_not_change_the_result(small_cnn):
    batches = image_batches()
    whole = gradient_saliency(small_cnn, batches, 5)
    for chunk in (1, 2, 3):
        parts = gradient_saliency(small_cnn, batches, 5, chunk=chunk)
        for measure, saliency in parts.items():
            for name, matrix in saliency.matrices.items():
                assert_same(matrix, whole[measure].matrices[name])


class CountedLoader(list):
    """Batches that count how often they are iterated over."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_one_pass_for_all_classes_equals_a_pass_for_each(small_cnn):
    batches = CountedLoader(image_batches())
    together = gradient_saliency(small_cnn, batches, 5)
    assert batches.passes == 1
    for label in range(4):
        own = [(inputs[targets == label], targets[targets == label]) for inputs, targets in batches]
        alone = gradient_saliency(small_cnn, [batch for batch in own if len(batch[1])], 5)
        for measure in ("gradient", "fisher"):
            for name, matrix in together[measure].matrices.items():
                assert_same(matrix[label], alone[measure].matrices[name][label])


def test_published_interface():
    model, inputs, targets = linear_problem()
    both = gradient_saliency(model, [(inputs, targets)], 3)
    for second_order, measure in ((False, "gradient"), (True, "fisher")):
        found = saliency_analysis.compute_parameter_saliency_per_class(model, [(inputs, targets)], 3,
                                                                       use_second_order=second_order)
        assert found.measure == measure and torch.equal(found.matrices[""], both[measure].matrices[""])


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        gradient_saliency(linear_problem()[0], [], 3)


def test_chunk_size_follows_the_memory():
    model, image = model_loader("vgg16", seed=0), torch.zeros(1, 3, 32, 32)
    gradient = 4 * 14_715_584  # bytes
    assert 2 <= chunk_size(model, image) <= (1 << 30) / (2 * gradient)
    assert chunk_size(model, image, memory=1) == 1 and chunk_size(model, image, memory=1 << 40) == 64


# --- statistics ----------------------------------------------------------------------------------------------------


def test_few_class_weights_by_hand():
    values = np.array([[9, 0, 0, 8, 1],
                       [9, 7, 0, 8, 1],
                       [9, 7, 0, 0, 1]])
    threshold, important, few = find_few_class(values, percentile=55, few_classes=2)
    # sorted: five 0, three 1, two 7, two 8, three 9; the 55th percentile lies at rank 7.7 of 0..14
    assert threshold == pytest.approx(1 + 0.7 * 6)
    assert important.astype(int).tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 0]]
    assert few.astype(int).tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]  # not the first: for three
    assert not find_few_class(values, 55, few_classes=1)[2].any()
    threshold, *empty = find_few_class(np.zeros((3, 0)), 90, 2)
    assert np.isnan(threshold) and all(chosen.shape == (3, 0) for chosen in empty)


def test_few_class_weights_against_a_loop():
    for seed in range(5):
        values = np.random.RandomState(seed).rand(6, 50) ** 3
        threshold, important, few = find_few_class(values, 80, 2)
        above = [[label for label in range(6) if values[label, weight] > threshold] for weight in range(50)]
        assert sum(len(labels) for labels in above) == 60 == important.sum()  # 20 % of 300 values
        for weight, labels in enumerate(above):
            assert np.flatnonzero(important[:, weight]).tolist() == labels
            assert np.flatnonzero(few[:, weight]).tolist() == (labels if len(labels) <= 2 else [])


def test_same_scale_ignores_the_size_of_a_class():
    values = np.array([[1.0, 3.0], [10.0, 30.0], [0.0, 0.0]])
    assert same_scale(values).tolist() == [[0.5, 1.5], [0.5, 1.5], [0, 0]]


def by_hand() -> tuple[ClassSaliency, dict[str, Tensor]]:
    """Two classes; layer `a` has four weights, one of them pruned, layer `b` two, `c` only pruned ones."""
    matrices = {"a": torch.tensor([[1.0, 2.0, 99.0, 3.0], [4.0, 4.0, 99.0, 4.0]]),
                "b": torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "c": torch.tensor([[5.0], [5.0]])}
    masks = {"a": torch.tensor([[True, True], [False, True]]), "b": torch.ones(2, dtype=torch.bool),
             "c": torch.zeros(1, dtype=torch.bool)}
    return ClassSaliency("gradient", matrices, [10, 20]), masks


def test_statistics_by_hand():
    by_class, by_layer = analyse(*by_hand(), ["cat", "dog"], percentile=50, few_classes=1)
    rows = {(row["layer"], row["class"]): row for row in by_class}
    assert list(rows) == list(product("abc", ["cat", "dog"]))
    cat = rows["a", "cat"]
    assert (cat["weights"], cat["pruned"], cat["images"]) == (3, 1, 10) and rows["a", "dog"]["images"] == 20
    assert (cat["mean"], cat["median"], cat["max"]) == (2, 2, 3) and cat["std"] == pytest.approx((2 / 3) ** 0.5)
    assert cat["share"] == 6 / 10 and rows["b", "cat"]["share"] == 4 / 10 and rows["a", "dog"]["share"] == 12 / 16
    # layer a: the median of 1 2 3 4 4 4 is 3.5, which only the dog's weights exceed
    assert cat["important"] == 0 and rows["a", "dog"]["few_class"] == 3
    assert rows["c", "cat"]["weights"] == 0 and np.isnan(rows["c", "cat"]["mean"]) and rows["c", "cat"]["share"] == 0
    layer = by_layer[0]
    assert (layer["threshold"], layer["important"], layer["few_class"]) == (3.5, 3, 3)
    assert (layer["few_class_cat"], layer["few_class_dog"]) == (0, 3)
    # on one scale the rows are .5 1 1.5 and 1 1 1: only the cat's last weight is above the median, 1
    assert (layer["important_scaled"], layer["few_class_scaled"]) == (1, 1)
    assert by_layer[2]["important"] == 0


def test_a_class_called_scaled_does_not_take_the_place_of_the_counts_on_one_scale():
    _, plain = analyse(*by_hand(), ["cat", "dog"], percentile=50, few_classes=1)
    _, named = analyse(*by_hand(), ["cat", "scaled"], percentile=50, few_classes=1)
    assert [row["few_class_scaled"] for row in named] == [row["few_class_scaled"] for row in plain]
    assert [*plain[0]][-2:] == ["few_class_cat", "few_class_dog"]


def layer_row(important: int, few: int, scaled: tuple[int, int]) -> dict[str, int]:
    return {"important": important, "few_class": few, "important_scaled": scaled[0], "few_class_scaled": scaled[1]}


def test_the_verdict_follows_the_numbers():
    classes = ["cat", "dog", *"cdefghij"]
    text = verdict([layer_row(60, 30, (50, 1)), layer_row(40, 20, (50, 2))], classes, 90, 3)
    assert "100 weights" in text and "50.0% of them" in text and "in a layer 3.0%" in text
    assert "98.0%" in text  # (P(1) + P(2) + P(3)) / (1 - P(0)) of a binomial with 10 draws at 0.1
    assert verdict([layer_row(0, 0, (0, 0))], classes, 90, 3) == "no weight stands out for any class"


def test_class_sample_is_balanced_unaugmented_and_reproducible(tiny_dataset, tiny_loaders):
    train = tiny_loaders[0]
    sample = class_sample(train, 4, seed=0)
    targets = torch.cat([labels for _, labels in sample])
    assert targets.tolist() == sorted(list(range(5)) * 4) and sample.num_images == 20
    again, other = class_sample(train, 4, seed=0), class_sample(train, 4, seed=1)
    assert torch.equal(again.images, sample.images) and not torch.equal(other.images, sample.images)
    stored = {image.numpy().tobytes() for image in train.images}
    assert all(image.numpy().tobytes() in stored for image in sample.images)
    assert class_sample(train, 0, seed=0).num_images == train.num_images == 160
    assert train.augment and isinstance(sample, BatchLoader) and not sample.augment and not sample.shuffle


# --- figures and the script ----------------------------------------------------------------------------------------


def test_figures_of_difficult_rows(tmp_path):
    """Zeros, a layer without weights, a class without images, more than ten classes."""
    random, rows = np.random.RandomState(0), []
    for layer, name in product(range(4), "abcdefghijkl"):
        numbers = np.sort(random.rand(5) ** 4) * (name != "a")
        numbers = numbers if layer != 3 else np.full(5, np.nan)
        rows.append({"layer": f"layer{layer}", "class": name, "weights": 5, "mean": numbers.mean(),
                     **dict(zip(("q05", "q25", "median", "q75", "q95"), numbers))})
    plots.plot_distributions(rows, tmp_path / "d.png", "title", "nats")
    plots.plot_layer_means(rows, tmp_path / "l.png", "title", "nats")
    plots.plot_heat_map(rows, tmp_path / "h.png", "title")
    for name in "dlh":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def save_model(root: Path, model: nn.Module) -> Path:
    path = dense_path(root, "resnet20")
    save_checkpoint({"net": model.state_dict(), "acc": 10.0, "epoch": 1}, path)
    return path


def run_module(*words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "TQDM_MININTERVAL": "60"}
    return subprocess.run([sys.executable, "-m", "utils.saliency_analysis", *map(str, words)], cwd=REPOSITORY,
                          env=environment, text=True, capture_output=True, timeout=240)


@pytest.fixture
def tiny_options(image_folder, tmp_path) -> list[str]:
    return list(map(str, ["--m_name", "resnet20", "--data_dir", image_folder, "--root", tmp_path, "--device", "cpu"]))


def test_the_module_runs_and_leaves_tables_figures_and_card(tiny_options, tmp_path):
    model = prune_some(model_loader("resnet20", seed=0), fraction=0.9)
    save_model(tmp_path, model)
    process = run_module(*tiny_options, "--samples_per_class", 1, "--measure", "fisher")
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "saliency_analysis" / "resnet20"
    assert str(folder) in process.stdout and "weights are important (above the 90th percentile" in process.stdout
    for name in ("distributions", "layers", "heatmap"):
        assert (folder / f"fisher_{name}.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "fisher_by_class.csv") as file:
        rows = list(csv.DictReader(file))
    kept = {name: int(mask.sum()) for name, mask in get_masks(model).items()}
    assert len(rows) == 22 * 10 and all(int(row["weights"]) == kept[row["layer"]] for row in rows)
    assert {row["images"] for row in rows} == {"1"}
    for name in {row["class"] for row in rows}:
        assert sum(float(row["share"]) for row in rows if row["class"] == name) == pytest.approx(1, abs=1e-3)
    with open(folder / "fisher_few_classes.csv") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == list(kept)
    assert not (folder / "gradient_by_class.csv").exists()
    card = json.loads((folder / "saliency_analysis.json").read_text())
    assert card["command"].startswith("python -m utils.saliency_analysis --m_name")
    assert card["measures"]["fisher"]["images"] == [1] * 10 and card["few_classes"] == 3  # three in ten
    assert card["sparsity"] == pytest.approx(0.9, abs=0.01) and card["precision"] == "fp32"


def test_a_measure_that_there_is_not_is_the_usual_error(tiny_options, capsys):
    with pytest.raises(SystemExit) as caught:
        saliency_analysis.parse_args([*tiny_options, "--measure", "hessian"])
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and "invalid choice: 'hessian'" in shown and "fisher" in shown.splitlines()[-1]


def test_user_errors(tiny_options, tmp_path):
    with pytest.raises(UserError, match="make it with: python main.py --m_name resnet20 --pruner none .*--root"):
        saliency_analysis.main(tiny_options)
    save_model(tmp_path, model_loader("resnet20", num_classes=7))
    for words, message in ((["--few_classes", "10"], "not few of 10 classes"),
                           (["--threshold_percentile", "100"], "below 100"),
                           (["--precision", "bf16"], "fp32 only"),
                           (["--checkpoint", str(tmp_path / "none.pth")], "no checkpoint at"),
                           ([], "trained on another data set: it tells 7 classes apart, and this data set has 10")):
        with pytest.raises(UserError, match=message):
            saliency_analysis.main([*tiny_options, *words])
    assert not (tmp_path / "saliency_analysis").exists()


def test_the_folder_is_held_while_saliency_is_computed(tiny_options, tmp_path, monkeypatch):
    save_model(tmp_path, model_loader("resnet20", seed=0))

    def stop(*_: object, **__: object) -> None:
        assert (tmp_path / "saliency_analysis/resnet20/.lock").is_file()
        raise KeyboardInterrupt
    monkeypatch.setattr(saliency_analysis, "gradient_saliency", stop)
    with pytest.raises(KeyboardInterrupt):
        saliency_analysis.main(tiny_options)
