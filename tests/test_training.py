"""The training loop: evaluation, schedules, best weights, patience, divergence, exact continuation."""
from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import REPOSITORY
from utils.analysis_utils import clone_model, get_masks, prunable_layers, set_masks
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.common import PRECISIONS, RunFailed, autocast, has_native_bf16, resolve_precision
from utils.data_loader import BatchLoader
from utils.model_loader import load_model_state, model_loader
from utils.muon import Muon, orthogonalised
from utils.pruning import prune_to
from utils.training import (
    OPTIMIZERS,
    PRETRAIN,
    SCHEDULES,
    Recipe,
    Trainer,
    TrainingHook,
    accuracy_with_new_statistics,
    evaluate,
    reestimate_batch_norm,
)

ARCHIVE = REPOSITORY.parent / "shared" / "data" / "cifar10-images.tar.xz"  # CIFAR-10 as JPEG files, where it is at hand
DENSE = REPOSITORY / "results" / "checkpoints" / "resnet20" / "checkpoint" / "ckpt.pth"
SHORT = Recipe("sgd", lr=0.05, epochs=3, batch_size=32, schedule="cosine", weight_decay=5e-4)


def make_trainer(model, loaders, recipe=SHORT, seed=0, **kwargs) -> Trainer:
    return Trainer(model, loaders[0], loaders[1], recipe, seed=seed, **kwargs)


class Constant(nn.Module):
    """Always answers with the same logits."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), -1)


def test_evaluate_by_hand():
    batches = [(torch.zeros(3, 1), torch.tensor([0, 0, 1])), (torch.zeros(1, 1), torch.tensor([1]))]
    model = Constant([0.0, 0.0])
    model.train()
    loss, accuracy = evaluate(model, batches)
    assert loss == pytest.approx(0.693147, abs=1e-5)  # ln 2 for equal logits
    assert accuracy == 50.0  # argmax of equal logits is class 0: two of four
    assert model.training


@pytest.mark.parametrize("name, step, expected", [
    ("constant", 7, 1.0), ("cosine", 0, 1.0), ("cosine", 50, 0.5), ("cosine", 100, 0.0),
    ("triangular", 0, 0.05), ("triangular", 19, 1.0), ("triangular", 60, 0.5), ("triangular", 100, 0.0),
    ("warmup_cosine", 0, 0.2), ("warmup_cosine", 4, 1.0), ("warmup_cosine", 5, 1.0), ("warmup_cosine", 100, 0.0)])
def test_schedules_by_hand(name, step, expected):
    assert SCHEDULES[name](step, 100) == pytest.approx(expected, abs=1e-9)


def test_the_warm_up_is_rounded_to_the_nearest_step():
    assert SCHEDULES["warmup_cosine"](0, 30) == 0.5  # 5 % of 30 are 1.5 steps: two
    assert SCHEDULES["triangular"](0, 9) == 0.5  # 20 % of 9 are 1.8 steps: two


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_learns_with_every_optimizer(name, small_cnn, tiny_loaders):
    rates = {"sgd": 0.05, "nesterov": 0.05, "adamw": 1e-2, "muon": 0.05}
    recipe = replace(SHORT, optimizer=name, lr=rates[name], epochs=6)
    result = make_trainer(small_cnn, tiny_loaders, recipe).run(show=False)
    assert result.accuracy > 60 and result.epochs == 6  # five classes: chance is 20


def test_muon_by_hand():
    """A kernel moves along an orthogonal matrix, other parameters as under SGD with Nesterov momentum."""
    matrix = torch.diag(torch.tensor([3.0, 1.0]))  # over its norm: singular values 0.9487 and 0.3162
    first = [3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5 for x in (3 / 10**0.5, 1 / 10**0.5)]
    torch.testing.assert_close(orthogonalised(matrix, steps=1), torch.diag(torch.tensor(first)))
    random = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for wide in (random, random.T):
        values = torch.linalg.svdvals(orthogonalised(wide, steps=5))
        assert orthogonalised(wide).shape == wide.shape and values.min() > 0.6 and values.max() < 1.3
    kernel, bias = nn.Parameter(torch.zeros(2, 2, 1, 1)), nn.Parameter(torch.ones(2))
    optimizer = Muon([kernel, bias], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        kernel.grad, bias.grad = matrix.view(2, 2, 1, 1).clone(), torch.tensor([1.0, 0.0])
        optimizer.step()
    step = orthogonalised(matrix)  # the direction stays, so momentum changes its length only
    torch.testing.assert_close(kernel.detach().flatten(1), -0.1 * 0.5 * 2 * step)  # begins at 0, so is free
    torch.testing.assert_close(bias.detach(), nesterov_by_hand([1.0, 0.0], rate=0.1, decay=0.5, steps=2))


def test_kernels_keep_their_norm_under_muon():
    """They point where they would if they grew, over a resumption too. If they did grow, pruning by magnitude would take
    all of a classifier that does not."""
    draws = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 4, generator=draws), torch.randn(8, 3, 4, generator=draws)
    grown, momentum = start.clone(), torch.zeros(3, 4)
    kernel = nn.Parameter(start.view(3, 2, 2, 1).clone())
    optimizer = Muon([kernel], lr=0.5, weight_decay=0.5)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        grown = grown - 0.5 * 0.5 * orthogonalised(gradient + 0.95 * momentum)
        state = optimizer.state_dict()
        optimizer = Muon([kernel], lr=0.5, weight_decay=0.5)
        optimizer.load_state_dict(state)
        kernel.grad = gradient.view_as(kernel).clone()
        optimizer.step()
    assert grown.norm() > 1.1 * start.norm()
    torch.testing.assert_close(kernel.detach().flatten(1), grown * start.norm() / grown.norm())


def nesterov_by_hand(grad: list[float], rate: float, decay: float, steps: int) -> torch.Tensor:
    values = []
    for slope in grad:
        weight, momentum = 1.0, 0.0
        for _ in range(steps):
            gradient = slope + decay * weight
            momentum = 0.9 * momentum + gradient
            weight -= rate * (gradient + 0.9 * momentum)
        values.append(weight)
    return torch.tensor(values)


@pytest.mark.parametrize("epochs, steps, validations", [(0.25, 1, 1), (0.5, 2, 1), (1.5, 8, 2),
                                                        (0.01, 1, 1), (2, 10, 2)])
def test_a_fraction_of_an_epoch_is_so_many_steps(epochs, steps, validations, small_cnn, tiny_loaders):
    """160 images in batches of 32: 5 steps an epoch."""
    trainer = make_trainer(small_cnn, tiny_loaders, replace(SHORT, epochs=epochs))
    assert trainer.run(show=False).epochs == validations == len(trainer.history)
    assert trainer.step == trainer.total_steps == steps and trainer.finished


def test_the_weights_of_the_best_validation_accuracy_are_restored(small_cnn, tiny_loaders):
    trainer = make_trainer(small_cnn, tiny_loaders, replace(SHORT, lr=1.0, schedule="constant", epochs=5))
    result = trainer.run(show=False)
    accuracies = [row["val_acc"] for row in trainer.history]
    assert result.accuracy == max(accuracies) and result.best_epoch == accuracies.index(max(accuracies)) + 1
    assert evaluate(small_cnn, tiny_loaders[1]).accuracy == result.accuracy


def test_patience_stops_early(small_cnn, tiny_loaders):
    recipe = replace(SHORT, lr=1e-12, epochs=20, patience=2)
    small_cnn[1].momentum = 0.0  # nothing changes, so the first epoch stays the best
    result = make_trainer(small_cnn, tiny_loaders, recipe).run(show=False)
    assert (result.best_epoch, result.epochs) == (1, 3)


def test_a_non_finite_loss_stops_with_a_clear_message_and_keeps_the_last_state(small_cnn, tiny_loaders):
    saved = []
    trainer = make_trainer(small_cnn, tiny_loaders, replace(SHORT, lr=1e30))
    with pytest.raises(RunFailed, match=r"loss became (nan|inf) in epoch 1.*lower learning rate"):
        trainer.run(show=False, on_epoch=saved.append)
    assert saved == []


def test_a_non_finite_validation_loss_stops_the_stage_and_keeps_the_last_state(small_cnn, tiny_loaders):
    saved = []
    trainer = make_trainer(small_cnn, tiny_loaders, SHORT)

    def spoil(trainer):
        saved.append(trainer.epoch)
        small_cnn[1].momentum = 0.0
        small_cnn[1].running_mean.fill_(float("nan"))  # used in validation only
    with pytest.raises(RunFailed, match=r"the validation loss became nan in epoch 2.*what was saved before is kept"):
        trainer.run(show=False, on_epoch=spoil)
    assert saved == [1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_state_saved_contiguous_continues_with_the_strides_of_the_parameters(optimizer, small_cnn, tiny_loaders,
                                                                                tmp_path):
    recipe = replace(SHORT, optimizer=optimizer, lr=1e-3)
    small_cnn.to(memory_format=torch.channels_last)
    whole, start = make_trainer(small_cnn, tiny_loaders, recipe), clone_model(small_cnn)
    saved = tmp_path / "progress.pth"
    whole.run(show=False, on_epoch=lambda t: t.epoch == 1 and save_checkpoint(t.state_dict(), saved))
    again = make_trainer(start, tiny_loaders, recipe)
    again.load_state_dict(load_checkpoint(saved))
    for param, state in again.optimizer.state.items():
        assert all(value.stride() == param.stride() for value in state.values() if getattr(value, "ndim", 0) == 4)
    again.run(show=False)
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in small_cnn.state_dict().items())


class Terminal(io.StringIO):
    """A stderr that is, or is not, a terminal."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


def test_progress_in_a_pipe_is_a_plain_line_per_epoch(small_cnn, tiny_loaders, monkeypatch):
    monkeypatch.setattr("sys.stderr", pipe := Terminal(False))
    trainer = make_trainer(small_cnn, tiny_loaders)
    trainer.run("pretrain a-network-with-a-very-very-long-name")
    lines = pipe.getvalue().splitlines()
    assert "\r" not in pipe.getvalue() and len(lines) == 3 and all(len(line) <= 80 for line in lines)
    for epoch, (line, row) in enumerate(zip(lines, trainer.history), 1):
        best = max(earlier["val_acc"] for earlier in trainer.history[:epoch])
        assert line.startswith(f"epoch {epoch}/3  val {row['val_acc']:.2f} %  best {best:.2f} %  "
                               f"loss {row['train_loss']:.3f}  ")
        assert "pretrain a-network" in line and ("left" in line) == (epoch < 3)


def test_epochs_that_may_not_be_kept_are_never_called_the_best(small_cnn, tiny_loaders, monkeypatch):
    class FromTheSecondOn(TrainingHook):
        def counts(self, trainer: Trainer) -> bool:
            return trainer.epoch >= 2

    monkeypatch.setattr("sys.stderr", pipe := Terminal(False))
    trainer = make_trainer(small_cnn, tiny_loaders, hook=FromTheSecondOn())
    trainer.run()
    first, second = pipe.getvalue().splitlines()[:2]
    assert "best none yet  " in first and f"best {trainer.history[1]['val_acc']:.2f} %  " in second
    with pytest.raises(ValueError, match="constrain"):
        make_trainer(small_cnn, tiny_loaders, hook=FromTheSecondOn(), constrain=lambda optimizer: None)


def test_a_hook_that_watches_finds_the_gradient_of_the_masked_weight_where_it_is_pruned(small_cnn, tiny_loaders):
    class Watching(TrainingHook):
        seen: ClassVar[list[tuple[bool, bool]]] = []

        def before_step(self, trainer: Trainer) -> None:
            self.watching = trainer.step % 2 == 1

        def on_step(self, trainer: Trainer) -> None:
            layer = next(iter(prunable_layers(trainer.model).values()))
            grad = layer.weight.grad if layer.weight.retains_grad else None
            self.seen.append((self.watching, grad is not None and bool((grad[layer.weight_mask == 0] != 0).any())))

    prune_to(small_cnn, 200, "magnitude")
    make_trainer(small_cnn, tiny_loaders, hook=Watching()).run(show=False)
    assert {watching for watching, _ in Watching.seen} == {True, False}
    assert all(watching == found for watching, found in Watching.seen)


def test_progress_on_a_terminal_is_one_line_in_its_width(small_cnn, tiny_loaders, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal(True))
    monkeypatch.setenv("COLUMNS", "80")
    make_trainer(small_cnn, tiny_loaders).run("pretrain resnet20")
    shown = terminal.getvalue().strip().split("\r")
    assert all(len(text) <= 80 for text in shown) and "\n" not in terminal.getvalue().strip()
    assert shown[0].startswith("epoch 0/3") and shown[-1].startswith("epoch 3/3  val ") and "100% 00:" in shown[-1]


@pytest.mark.parametrize("stream", [None, object()])
def test_training_does_without_a_usable_stderr(stream, small_cnn, tiny_loaders, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    assert make_trainer(small_cnn, tiny_loaders, replace(SHORT, epochs=1)).run().epochs == 1


def test_training_is_a_pure_function_of_its_seed(small_cnn, tiny_loaders):
    models = [clone_model(small_cnn) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        torch.rand(3)  # whatever happened before must not matter
        make_trainer(model, tiny_loaders, seed=seed).run(show=False)
    states = [torch.cat([value.flatten().float() for value in model.state_dict().values()]) for model in models]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_watched_layer_that_runs_twice_has_the_gradient_of_both_calls(tiny_loaders):
    layer = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    plain = clone_model(model)
    plain[0].weight.data[0, 1] = 0.0
    set_masks(model, {"0": torch.tensor([[1, 0], [1, 1]])})
    inputs, targets = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0, 1])
    nn.functional.cross_entropy(plain(inputs), targets).backward()
    make_trainer(model, tiny_loaders)._gradients(inputs, targets, watched=True)
    torch.testing.assert_close(layer.weight.grad, plain[0].weight.grad)
    assert layer.weight_orig.grad[0, 1] == 0 != layer.weight.grad[0, 1]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_continued_training_equals_an_uninterrupted_one(stop_after, tiny_loaders, small_cnn):
    small_cnn.insert(6, nn.Dropout(0.3))  # draws from the global generator
    start, recipe = clone_model(small_cnn), replace(SHORT, optimizer="adamw", lr=1e-3)
    whole = make_trainer(small_cnn, tiny_loaders, recipe)
    whole.run(show=False)

    first = make_trainer(clone_model(start), tiny_loaders, recipe)
    saved = {}

    def stop(trainer):
        if trainer.epoch == stop_after:
            saved.update(trainer.state_dict(), model={k: v.clone() for k, v in trainer.model.state_dict().items()})
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        first.run(show=False, on_epoch=stop)
    second = make_trainer(clone_model(start), tiny_loaders, recipe)
    second.load_state_dict(saved)
    second.run(show=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert [row["val_acc"] for row in whole.history] == [row["val_acc"] for row in second.history]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_pruned_weights_never_move(optimizer, small_cnn, tiny_loaders):
    generator = torch.Generator().manual_seed(0)
    set_masks(small_cnn, {name: torch.rand(mask.shape, generator=generator) < 0.3
                          for name, mask in get_masks(small_cnn).items()})
    before = {name: layer.weight_orig.detach().clone() for name, layer in small_cnn.named_modules()
              if hasattr(layer, "weight_orig")}
    make_trainer(small_cnn, tiny_loaders, replace(SHORT, optimizer=optimizer)).run(show=False)
    assert before
    for name, layer in small_cnn.named_modules():
        if name in before:
            pruned = layer.weight_mask == 0
            assert torch.equal(layer.weight_orig[pruned], before[name][pruned])
            assert not torch.equal(layer.weight_orig[~pruned], before[name][~pruned])


def test_precision_names():
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32" and resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("auto", cpu) == ("bf16" if has_native_bf16(cpu) else "fp32")
    assert set(PRECISIONS) == {"auto", "fp32", "bf16"}
    with autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(cpu, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_bf16_training_learns_and_keeps_float32_weights(small_cnn, tiny_loaders):
    result = make_trainer(small_cnn, tiny_loaders, replace(SHORT, epochs=5), precision="bf16").run(show=False)
    assert result.accuracy > 50 and all(p.dtype == torch.float32 for p in small_cnn.parameters())


def test_the_published_pretraining_recipe():
    assert (PRETRAIN.optimizer, PRETRAIN.lr, PRETRAIN.epochs, PRETRAIN.batch_size, PRETRAIN.schedule,
            PRETRAIN.weight_decay, PRETRAIN.patience) == ("sgd", 0.1, 200, 128, "cosine", 5e-4, 30)


# --- batch-norm statistics -----------------------------------------------------------------------------------------


def loader_of(values: list[int], batch_size: int) -> BatchLoader:
    """Images of one pixel and one channel with these values, as they are, shuffled."""
    images = np.array(values, np.uint8).reshape(-1, 1, 1, 1)
    return BatchLoader(images, np.zeros(len(values)), batch_size, mean=np.zeros(1), std=np.ones(1), shuffle=True)


@pytest.mark.parametrize("values, batch_size, variance", [
    ([1, 3, 5, 11], 4, 56 / 3), ([1, 3, 5, 11], 2, 56 / 3), ([1, 3, 5, 11, 5], 3, 56 / 4)])
def test_batch_norm_statistics_are_those_of_all_values_pooled(values, batch_size, variance):
    """Mean 5, squares 16 + 4 + 0 + 36, whatever the batches; the means within batches alone would depend on them."""
    norm, idle = nn.BatchNorm2d(1, momentum=0.3), nn.BatchNorm2d(1)
    model = nn.Sequential(nn.Dropout(0.5), norm)
    model[0].idle = idle  # is never run
    norm.running_mean.fill_(9.0)
    idle.running_mean.fill_(7.0)
    assert reestimate_batch_norm(model, loader_of(values, batch_size))
    assert norm.running_mean.item() == pytest.approx(5.0) and norm.running_var.item() == pytest.approx(variance)
    assert norm.momentum == 0.3 and model.training and model[0].training and norm.training
    assert idle.running_mean.item() == 7.0 and idle.momentum == 0.1
    assert not reestimate_batch_norm(nn.Linear(1, 1), loader_of(values, 2))


def test_new_statistics_leave_the_generators_and_everything_else_where_they_were(small_cnn, tiny_loaders):
    train, val, _ = tiny_loaders
    before = {name: value.clone() for name, value in small_cnn.state_dict().items()}
    states = train.generator.get_state(), torch.get_rng_state()
    accuracy_with_new_statistics(small_cnn, train, val, "fp32")
    assert all(torch.equal(before[name], value) for name, value in small_cnn.state_dict().items())
    reestimate_batch_norm(small_cnn, train)
    assert torch.equal(states[0], train.generator.get_state()) and torch.equal(states[1], torch.get_rng_state())
    changed = {name for name, value in small_cnn.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    again = small_cnn[1].running_var.clone()
    reestimate_batch_norm(small_cnn, train)
    assert torch.equal(again, small_cnn[1].running_var)  # the same images for every model
    assert train.augment and train.shuffle


def test_a_trained_model_loses_nothing_by_new_statistics(small_cnn, tiny_loaders):
    train, val, _ = tiny_loaders
    Trainer(small_cnn, train, val, Recipe("sgd", lr=0.05, epochs=6, batch_size=32), seed=0).run(show=False)
    trained = evaluate(small_cnn, val)
    assert trained.accuracy > 60
    small_cnn[1].reset_running_stats()
    assert evaluate(small_cnn, val).loss > trained.loss + 0.3
    reestimate_batch_norm(small_cnn, train)
    found = evaluate(small_cnn, val)
    assert abs(found.loss - trained.loss) < 0.1 and found.accuracy > trained.accuracy - 5


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="needs CIFAR-10 as images")
def test_a_trained_network_loses_at_most_a_third_of_a_point_by_new_statistics():
    """Un-augmented batches sorted by class, each with the variance within it, cost the shipped dense model 5 points."""
    known, per_class = json.loads(DENSE.with_suffix(".json").read_text())["input"], {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:  # in the order of the archive, which is packed in one piece
            part, _, label = member.name.removeprefix("./").rpartition("/")[0].partition("/")
            found = per_class.setdefault(label, [])
            if part == "train" and member.isfile() and len(found) < 400:
                found.append(np.asarray(Image.open(archive.extractfile(member)).convert("RGB")))
    labels = known["classes"]
    images = np.stack([image for label in labels for image in per_class[label]])
    targets = np.repeat(np.arange(len(labels)), [len(per_class[label]) for label in labels])
    mean, std = (255 * np.array(known[name]) for name in ("mean", "std"))
    train = BatchLoader(images, targets, 128, mean=mean, std=std, augment=True, shuffle=True)
    model = model_loader("resnet20")
    load_model_state(model, load_checkpoint(DENSE))
    precision = resolve_precision("auto", torch.device("cpu"))
    val = train.unaugmented(500)
    before = evaluate(model, val, precision).accuracy
    assert before > 80 and accuracy_with_new_statistics(model, train, val, precision) > before - 0.3


def test_every_module_has_its_own_mode_back(small_cnn, tiny_loaders):
    norms = [module for module in small_cnn.modules() if isinstance(module, nn.BatchNorm2d)]
    small_cnn.train()
    norms[0].eval()
    evaluate(small_cnn, tiny_loaders[1])
    reestimate_batch_norm(small_cnn, tiny_loaders[0])
    assert [module.training for module in (small_cnn, *norms)] == [True, False, *[True] * (len(norms) - 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_epochs_are_no_training_by_any_schedule(schedule, small_cnn, tiny_loaders):
    recipe = Recipe("sgd", lr=0.1, epochs=0, batch_size=8, schedule=schedule)
    assert Trainer(small_cnn, *tiny_loaders[:2], recipe, seed=0).run(show=False).epochs == 0
