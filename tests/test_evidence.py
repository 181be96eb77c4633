"""Evidence: it sees every class whatever the order on disk, comes from the model it is said to, and is made once."""
from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import rl_regrowth_nas
import rl_saliency_regrowth
import single_layer_regrowth_analysis as single_layer
from tests.test_regrowth import closed_form_gradients, linear_batches, one_linear, pruned_copy
from tests.test_regrowth_scripts import make_start, options  # noqa: F401  (a fixture)
from utils import checkpoint, stage1, stage2
from utils.analysis_utils import GRADIENT_KINDS, BlockwiseFeatureExtractor, clone_model, prunable_layers, set_masks
from utils.common import UserError, derive_seed, needed, needs
from utils.data_loader import BatchLoader, balanced_indices
from utils.datasets import load_dataset
from utils.mask_schedule import plan_fields
from utils.methods import parse_regrowth_args
from utils.regrowth import INITIALISERS, SELECTORS, Evidence, SaliencyComputer, WeightRegrowth
from utils.run import Run
from utils.saliency_analysis import class_sample
from utils.stage1 import PruneStep

SAMPLE = {"mean": np.full(3, 127.0), "std": np.full(3, 60.0)}


def about(train: BatchLoader, dense: nn.Module, pruned: nn.Module, **given: object) -> Evidence:
    """The evidence that stage 2 would have about this pruned model."""
    args = argparse.Namespace(**{"saliency_max_batches": 3, "ssim_batches": 3, "saliency_source": "dense", **given})
    return stage2.evidence_maker(run_over(train), args, dense)(pruned)


def run_over(train: BatchLoader) -> SimpleNamespace:
    """What there is of a run for evidence."""
    run = SimpleNamespace(train=train, precision="fp32", seed=0)
    run.derive_seed, run.evidence_sample = partial(Run.derive_seed, run), partial(Run.evidence_sample, run)
    return run


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(stage1, "DRIFT_IMAGES", 20)
    monkeypatch.setattr(stage1, "GRADIENT_BATCH", 20)
    monkeypatch.setattr(stage2, "DRIFT_BATCH", 20)
    monkeypatch.setattr(stage2, "SALIENCY_BATCH", 20)


# --- the sample ------------------------------------------------------------------------------------------------------


def counts_of(targets: torch.Tensor, classes: int = 5) -> list[int]:
    return targets.bincount(minlength=classes).tolist()


@pytest.mark.parametrize("wanted, expected", [(50, [10] * 5), (51, [10, 10, 10, 10, 11]), (100, [20] * 5),
                                              (130, [28, 28, 27, 27, 20]), (180, [45, 45, 40, 30, 20]),
                                              (1000, [60, 50, 40, 30, 20])])
def test_classes_give_equally_many_and_small_ones_all_they_have(tiny_dataset, wanted, expected):
    images, targets = tiny_dataset.train_images, tiny_dataset.train_targets
    chosen = balanced_indices(images, targets, wanted, seed=1)
    found = np.bincount(targets[chosen])
    assert len(chosen) == len(set(chosen.tolist())) == min(wanted, 200)
    assert sorted(found) == sorted(expected)
    assert all(count == size or max(found) - count <= 1 for count, size in zip(found, np.bincount(targets)))


@pytest.mark.parametrize("size", [10, 25])
@pytest.mark.parametrize("number", [100, 200])
def test_every_batch_is_mixed_in_proportion(tiny_dataset, number, size):
    train = BatchLoader(tiny_dataset.train_images, tiny_dataset.train_targets, 32, **SAMPLE, augment=True, shuffle=True)
    sample = train.balanced_sample(number, size, seed=0)
    assert not sample.augment and not sample.shuffle and train.augment
    shares = np.bincount(sample.targets) / number
    batches = [targets for _, targets in sample]
    assert len(batches) == number // size
    for targets in batches:
        assert np.abs(np.array(counts_of(targets)) - size * shares).max() <= 1.5


def test_a_last_smaller_batch_is_left_out_but_not_the_only_one(tiny_dataset):
    train = BatchLoader(tiny_dataset.train_images, tiny_dataset.train_targets, 32, **SAMPLE)
    assert [train.balanced_sample(*sizes, seed=0).num_images for sizes in ((130, 60), (1000, 60), (1000, 500))] == \
        [120, 180, 200]


def test_the_seed_chooses_and_other_images_leave_the_choice_mostly_alone(tiny_dataset):
    images, targets = tiny_dataset.train_images, tiny_dataset.train_targets
    one, again, other = (set(balanced_indices(images, targets, 50, seed).tolist()) for seed in (0, 0, 1))
    assert one == again and len(one & other) < 35
    most = np.random.RandomState(0).permutation(200)[:160]  # as after another split
    kept = set(most[balanced_indices(images[most], targets[most], 50, 0)].tolist())
    assert len(kept & one) >= 0.6 * 50


def in_another_order(data, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images shuffled and classes numbered anew; new[c] is the number that class c has then."""
    random = np.random.RandomState(seed)
    new, order = random.permutation(5), random.permutation(len(data.train_images))
    return data.train_images[order], new[data.train_targets[order]], new


@pytest.mark.parametrize("source", ["dense", "pruned"])
def test_evidence_does_not_depend_on_the_order_of_images_and_classes(tiny_dataset, small_cnn, small_batches, source):
    images, targets, new = in_another_order(tiny_dataset)
    renamed = clone_model(small_cnn)
    with torch.no_grad():  # the same network, for classes numbered anew
        renamed[8].weight[new], renamed[8].bias[new] = small_cnn[8].weight.clone(), small_cnn[8].bias.clone()
    pruned, pruned_renamed = pruned_copy(small_cnn), pruned_copy(renamed)
    set_masks(pruned_renamed, {name: pruned.get_submodule(name).weight_mask for name in "04"})
    set_masks(pruned_renamed, {"8": pruned[8].weight_mask[np.argsort(new)]})
    sorted_by_class = BatchLoader(tiny_dataset.train_images, tiny_dataset.train_targets, 32, **SAMPLE)
    one = about(sorted_by_class, small_cnn, pruned, saliency_source=source)
    other = about(BatchLoader(images, targets, 32, **SAMPLE), renamed, pruned_renamed, saliency_source=source)
    drift = [evidence.make("drift") for evidence in (one, other)]
    assert [drift[0][name] for name in "04"] == [drift[1][name] for name in "04"]
    for kind in ("saliency", "gradient"):
        first, second = one.make(kind), other.make(kind)
        for name in "04":
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(first["8"], second["8"][new], rtol=1e-4, atol=1e-9)


def test_renamed_class_folders_give_the_same_sample(image_folder, tmp_path):
    names = {f"class_{number}": f"class_{(7 * number + 3) % 10}" for number in range(10)}
    samples = []
    for rename in ({}, names):
        for folder in sorted(image_folder.glob("*/class_*")):
            shutil.copytree(folder, tmp_path / str(len(rename)) / folder.parent.name /
                            rename.get(folder.name, folder.name))
        data = load_dataset("folder", tmp_path / str(len(rename)))
        train = BatchLoader(data.train_images, data.train_targets, 32, **SAMPLE)
        samples.append(train.balanced_sample(40, 10, seed=0))
    assert torch.equal(samples[0].images, samples[1].images)
    assert not torch.equal(samples[0].targets, samples[1].targets)


def test_every_consumer_sees_every_class(tiny_dataset, small_cnn, small_batches, monkeypatch):
    seen, real = [], BatchLoader._batches

    def spy(loader):
        seen.append([])
        for inputs, targets in real(loader):
            seen[-1].append(counts_of(targets))
            yield inputs, targets
    monkeypatch.setattr(BatchLoader, "_batches", spy)
    train = BatchLoader(tiny_dataset.train_images, tiny_dataset.train_targets, 32, **SAMPLE, augment=True, shuffle=True)
    pruned = pruned_copy(small_cnn)
    evidence = about(train, small_cnn, pruned)
    for kind in Evidence.KINDS:
        evidence.make(kind)
    about(train, small_cnn, pruned, saliency_source="pruned").make("saliency")
    assert len(seen) == 5  # drift of two models, saliency of both, gradient
    assert all(batches == [[4] * 5] * 3 for batches in seen)
    assert counts_of(class_sample(train, 7, seed=0).targets) == [7] * 5
    seen.clear()
    plan = plan_fields("bidirectional", regrow_allocation="greedy")
    mover = stage1.mask_mover(run_over(train), pruned, PruneStep("magnitude", "bidirectional", 1, 0.9, mask=plan))
    mover._evidence().make("drift")
    assert seen == [[[4] * 5]] * 2  # its one batch, for both models
    seen.clear()
    stage1.pruning_evidence(run_over(train), small_cnn).make("gradient")
    assert seen == [[[6, 5, 4, 3, 2]] * 10]  # all 200 images, every class in every batch


# --- which evidence, from which model --------------------------------------------------------------------------------


def flat_data() -> BatchLoader:
    """12 images of one pixel and two classes, class by class."""
    random = np.random.RandomState(1)
    return BatchLoader(random.randint(256, size=(12, 1, 1, 3)).astype(np.uint8), np.repeat([0, 1], [8, 4]), 4, **SAMPLE)


def test_gradients_are_those_of_the_sparse_model_at_pruned_positions(monkeypatch):
    monkeypatch.setattr(stage2, "SALIENCY_BATCH", 4)
    weight, mask = [[3.0, -2.0, 0.5], [-1.0, 2.0, -4.0]], [[1, 0, 0], [0, 1, 0]]
    dense, pruned = (nn.Sequential(nn.Flatten(), *one_linear(weight, masks)) for masks in (None, mask))
    train = flat_data()
    evidence = about(train, dense, pruned, saliency_max_batches=2)
    sample = train.balanced_sample(8, 4, derive_seed(0, "evidence"))
    batches = [(inputs.flatten(1), targets) for inputs, targets in sample]
    effective = torch.tensor(weight) * torch.tensor(mask)
    expected = closed_form_gradients(effective, batches).mean(0).abs()
    torch.testing.assert_close(evidence.make("gradient")["1"], expected)
    wrong = closed_form_gradients(torch.tensor(weight), batches).mean(0).abs()  # of the dense model
    free = (1 - torch.tensor(mask)).flatten().bool()
    best = [sorted(torch.where(free, score.flatten(), -1).topk(2).indices.tolist()) for score in (expected, wrong)]
    assert best == [[1, 3], [2, 5]]
    record = WeightRegrowth(pruned, "gradient", evidence).apply_regrowth({"1": 2})
    assert record.layers["1"].indices.tolist() == best[0]


def test_relative_gradients_take_the_size_of_the_filter_out_and_leave_dead_ones_for_last():
    """Filters of norm 5, 0.1 and 0: |g| 1, 6, 100 count as 5, 0.6 and 0."""
    weight = [[3.0, 4.0, 0.5], [0.1, 9.0, 9.0], [9.0, 9.0, 9.0]]
    gradient = {"0": torch.tensor([[50.0, 50.0, -1.0], [0.0, 6.0, 2.0], [100.0, 0.0, 0.0]])}
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    model[0].weight.data = torch.tensor(weight)
    set_masks(model, {"0": torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])})
    ranking = SELECTORS["relative_gradient"]("0", model[0], Evidence(gradient=gradient))
    torch.testing.assert_close(ranking.scores[model[0].weight_mask == 0], torch.tensor([5.0, 0.6, 0.2, 0.0, 0.0, 0.0]))
    record = WeightRegrowth(model, "relative_gradient", Evidence(gradient=gradient)).apply_regrowth({"0": 2})
    assert record.layers["0"].indices.tolist() == [2, 4]


def test_a_rule_looks_at_what_it_needs_and_at_nothing_else(small_cnn):
    class Watched(Evidence):
        asked: set[str] = set()

        def get(self, kind):
            self.asked.add(kind)
            return super().get(kind)
    scores = {name: torch.rand(layer.weight.shape) for name, layer in prunable_layers(small_cnn).items()}
    for rule, rank in SELECTORS.items():
        made: list[str] = []

        def make(kind, made=made):
            made.append(kind)
            return scores
        makers = {kind: partial(make, kind) for kind in Evidence.KINDS}
        evidence = Watched(reference=small_cnn, **makers)
        Watched.asked = set()
        WeightRegrowth(pruned_copy(small_cnn), rule, evidence).apply_regrowth({"0": 5, "4": 3})
        WeightRegrowth(pruned_copy(small_cnn), rule, evidence).apply_regrowth({"0": 5, "4": 3})
        assert Watched.asked == set(needed(rank)) and made == list(needed(rank)), rule


def test_a_rule_that_does_not_name_its_needs_is_told_so(small_cnn, monkeypatch):
    unmarked = partial(SELECTORS["saliency"])
    monkeypatch.setitem(SELECTORS, "saliency", unmarked)
    evidence = Evidence(saliency=dict)
    with pytest.raises(ValueError, match="saliency without naming it"):
        WeightRegrowth(pruned_copy(small_cnn), "saliency", evidence).apply_regrowth({"0": 5})
    with pytest.raises(TypeError, match="unknown kind salience.*saliency"):
        Evidence(salience={})


def test_values_too_may_look_at_evidence_whatever_selects(monkeypatch):
    @needs("gradient")
    def downhill(site):
        return -0.1 * site.positions.read(site.evidence.tensor("gradient", site.name))
    monkeypatch.setitem(INITIALISERS, "downhill", downhill)
    model, gradient = one_linear([[1.0, 2.0, 3.0]], [[0, 1, 0]]), torch.tensor([[5.0, 6.0, 7.0]])
    WeightRegrowth(model, "random", Evidence(gradient=lambda: {"0": gradient}), "downhill").apply_regrowth({"0": 2})
    torch.testing.assert_close(model[0].weight_orig.detach(), torch.tensor([[-0.5, 2.0, -0.7]]))


def test_another_kind_of_evidence_is_one_line(monkeypatch):
    monkeypatch.setitem(GRADIENT_KINDS, "fisher", (2, lambda mean, weight: mean))
    weight, batches = [[1.0, -2.0, 0.5], [0.25, 0.0, -1.0]], linear_batches()
    found = SaliencyComputer(one_linear(weight), batches).evidence()
    torch.testing.assert_close(found["fisher"]["0"], (closed_form_gradients(torch.tensor(weight), batches)**2).mean(0))
    torch.testing.assert_close(found["saliency"]["0"], found["fisher"]["0"] * torch.tensor(weight) ** 2)


@pytest.mark.parametrize("words, option", [
    (["--selection", "random", "--saliency_source", "pruned"], "saliency_source"),
    (["--selection", "gradient", "--saliency_source", "pruned"], "saliency_source"),
    (["--selection", "magnitude", "--saliency_max_batches", "3"], "saliency_max_batches")])
def test_an_option_about_evidence_that_nothing_looks_at_is_refused(words, option):
    with pytest.raises(UserError, match=f"--{option} does nothing with --selection {words[1]}"):
        parse_regrowth_args("saliency", "", ["--m_name", "resnet20", *words])


@pytest.mark.parametrize("words, passes", [(["random"], 0), (["magnitude"], 0), (["reference"], 0), (["saliency"], 1),
                                           (["gradient"], 2), (["saliency", "--saliency_source", "pruned"], 2)])
def test_only_what_is_needed_is_computed_and_what_is_of_the_dense_model_once(options, words, passes,  # noqa: F811
                                                                             monkeypatch):
    calls = {SaliencyComputer: 0, BlockwiseFeatureExtractor: 0}
    for kind, name in ((SaliencyComputer, "evidence"), (BlockwiseFeatureExtractor, "extract")):
        real = getattr(kind, name)

        def counted(self, *arguments, kind=kind, real=real):
            calls[kind] += 1
            return real(self, *arguments)
        monkeypatch.setattr(kind, name, counted)
    rl_saliency_regrowth.main([*options, "--allocation", "uniform", "--regrow_iterations", "2", "--regrow_step", "0.01",
                               *["--saliency_max_batches", "1"] * (passes > 0), "--finetune_epochs", "0",
                               "--selection", *words])
    assert calls[SaliencyComputer] == passes and calls[BlockwiseFeatureExtractor] == 3  # dense, and before each step


# --- what a stage depends on -----------------------------------------------------------------------------------------


def perturb(path: Path) -> None:
    """Other weights in a checkpoint."""
    content = checkpoint.load_checkpoint(path)
    state = content.get("net", content)
    state["linear.bias"] += 1
    checkpoint.save_checkpoint(content, path)


def test_another_reference_model_under_the_same_name_is_noticed(options, tmp_path):  # noqa: F811
    reference = checkpoint.pruned_path(tmp_path, "resnet20", 0.95)
    shutil.copy(checkpoint.pruned_path(tmp_path, "resnet20", 0.99), reference)
    words = [*options, "--allocation", "uniform", "--finetune_epochs", "0", "--reference_model", "0.95"]
    rl_regrowth_nas.main(words)
    rl_regrowth_nas.main(words)  # reused
    perturb(reference)
    with pytest.raises(UserError, match="made with other arguments: reference .*asked"):
        rl_regrowth_nas.main(words)
    with pytest.raises(UserError, match="made from another reference model"):
        rl_regrowth_nas.main([*words, "--resume"])
    rl_regrowth_nas.main([*words, "--overwrite"])


@pytest.mark.parametrize("which, said", [("dense", "dense .*asked"), ("reference", "reference .*asked")])
def test_the_single_layer_study_notices_other_models(tmp_path, image_folder, which, said):
    make_start(tmp_path)
    reference = checkpoint.pruned_path(tmp_path, "resnet20", 0.95)
    shutil.copy(checkpoint.pruned_path(tmp_path, "resnet20", 0.99), reference)
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
             "--precision", "fp32", "--layers", "linear", "--finetune_epochs", "0", "--ssim_batches", "1",
             "--reference_model", "0.95"]
    single_layer.main(words)
    single_layer.main([*words, "--resume"])
    perturb(reference if which == "reference" else checkpoint.dense_path(tmp_path, "resnet20"))
    with pytest.raises(UserError, match=said):
        single_layer.main([*words, "--resume"])


def test_a_reference_model_that_is_not_there_is_one_line(tmp_path, image_folder):
    make_start(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at .*0.95"):
        single_layer.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device",
                           "cpu", "--precision", "fp32", "--reference_model", "0.95"])
