"""A training step as a CUDA graph: what is recorded, what is repeated; on a GPU, that training does the same with it."""
from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from utils import step_graph
from utils.analysis_utils import add_masks, count_pruned_params, get_masks, refresh_weight
from utils.data_loader import loaders_from
from utils.mask_mover import MaskMover
from utils.mask_schedule import MaskPlan
from utils.model_loader import model_loader
from utils.step_graph import WARM_UP, Recording, StepGraph
from utils.training import FINETUNE_ITERATIVE, PRETRAIN, Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Recorder:
    """Stands in for CUDA's graphs on a CPU: a replay calls the passes again on the same tensors, into the same tensors.
    """

    def __init__(self, monkeypatch, error: str = ""):
        self.error, self.recorded = error, 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        plain = Recording.replay

        def replay(recording: Recording, inputs: Tensor, targets: Tensor) -> Tensor:
            """With a graph that does what was done between capture's begin and end."""
            recording.graph = SimpleNamespace(replay=lambda: self.repeat(recording))
            return plain(recording, inputs, targets)
        monkeypatch.setattr(Recording, "replay", replay)

    @contextlib.contextmanager
    def capture(self, graph):
        self.recorded += 1
        yield
        if self.error:
            raise RuntimeError(self.error)

    def repeat(self, recording: Recording) -> None:
        model, watched = self.step.model, bool(recording.watched)
        old = [(param, param.grad) for param in model.parameters()]
        recording.result.copy_(self.step.passes(recording.inputs, recording.targets, watched))
        for param, static in recording.grads:
            static.copy_(param.grad)
        for layer, static in recording.watched.items():
            static.copy_(layer.weight.grad)
            refresh_weight(layer)
        for param, before in old:
            param.grad = before


@pytest.fixture
def step(monkeypatch):
    """A step of y = w x with the loss y summed, its recorder, and the batches that Python has seen."""
    model, seen = nn.Sequential(nn.Linear(2, 1, bias=False)), []
    add_masks(model)

    def passes(inputs: Tensor, targets: Tensor, watched: bool) -> Tensor:
        seen.append(inputs.tolist())
        model.zero_grad(set_to_none=True)
        loss = (model(inputs)[:, 0] * targets).sum()
        if watched:
            model[0].weight.retain_grad()
        loss.backward()
        return loss.detach()

    found = StepGraph(model, passes)
    found.possible, found.recorder, found.seen = True, Recorder(monkeypatch), seen
    found.recorder.step = found
    return found


def batch(number: int, size: int = 2) -> tuple[Tensor, Tensor]:
    return torch.full((size, 2), float(number)), torch.arange(1.0, size + 1)


def test_a_recorded_step_gives_each_batch_its_own_result_and_gradient(step):
    layer = step.model[0]
    for number in range(1, WARM_UP + 4):
        result = float(step(*batch(number)))
        weights = (layer.weight_orig * layer.weight_mask).sum().item()
        assert result == pytest.approx(3 * number * weights, rel=1e-5)  # targets 1 and 2
        assert layer.weight_orig.grad.tolist() == [[3.0 * number] * 2]
        with torch.no_grad():
            layer.weight_orig.add_(0.5)
    assert step.recorder.recorded == 1


def test_watched_steps_have_the_gradient_of_the_masked_weight_also_where_it_is_pruned(step):
    layer = step.model[0]
    layer.weight_mask[0, 0] = 0
    for number in range(WARM_UP + 1):
        step(*batch(number), watched=True)
    assert step.recorder.recorded == 1
    for number in (4, 5):
        step(*batch(number), watched=True)
        assert layer.weight.grad.tolist() == [[3.0 * number] * 2]
        assert layer.weight_orig.grad.tolist() == [[0.0, 3.0 * number]]
    step(*batch(6))
    step(*batch(7), watched=True)
    assert step.recorder.recorded == 2 and layer.weight.grad.tolist() == [[21.0, 21.0]]
    assert layer.weight_orig.grad.tolist() == [[0.0, 21.0]]


def test_a_batch_of_another_size_goes_through_python_and_does_no_harm(step):
    for number in range(WARM_UP + 1):
        step(*batch(number))
    grad, calls = step.model[0].weight_orig.grad, len(step.seen)
    step(*batch(7, size=1))
    assert step.seen[calls:] == [[[7.0, 7.0]]] and step.model[0].weight_orig.grad.tolist() == [[7.0, 7.0]]
    step(*batch(5))
    assert step.model[0].weight_orig.grad is grad and grad.tolist() == [[15.0, 15.0]]  # the recorded one again
    assert step.recorder.recorded == 1


def test_a_mask_changed_in_place_is_kept_and_one_replaced_is_recorded_anew(step):
    for number in range(WARM_UP + 1):
        step(*batch(number))
    step.model[0].weight_mask[0, 0] = 0
    step.check()
    step(*batch(2))
    assert step.model[0].weight_orig.grad.tolist() == [[0.0, 6.0]] and step.recorder.recorded == 1
    step.model[0].weight_mask = torch.tensor([[1.0, 0.0]])
    step.check()
    for _ in range(WARM_UP + 1):
        step(*batch(2))
    assert step.model[0].weight_orig.grad.tolist() == [[6.0, 0.0]] and step.recorder.recorded == 2


def test_what_cannot_be_recorded_runs_step_by_step_and_says_so_once(step, capsys):
    step.recorder.error = "operation not permitted when stream is capturing"
    step_graph.note.cache_clear()
    for number in range(WARM_UP + 3):
        step(*batch(number))
    assert step.seen[-1] == [[WARM_UP + 2.0] * 2] * 2 and step.recorder.recorded == 1
    assert capsys.readouterr().err.count("not recorded as a CUDA graph") == 1


def test_on_a_cpu_nothing_is_recorded(monkeypatch):
    recorder = Recorder(monkeypatch)
    model = nn.Linear(2, 1)
    step = StepGraph(model, lambda inputs, targets, watched: model(inputs).sum().detach())
    for number in range(WARM_UP + 2):
        step(*batch(number))
    assert recorder.recorded == 0


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def trained(tiny_dataset, recorded: bool, recipe, hook: bool = False) -> tuple[Trainer, MaskMover | None, int]:
    """resnet20 trained on the GPU in fp32 with exact convolutions, the hook, and how many recordings there were."""
    train, val, _ = loaders_from(tiny_dataset, batch_size=32, eval_batch_size=64, device="cuda")
    model, counts = model_loader("resnet20", "cuda", 5, seed=0), [0]
    mover = MaskMover(model, MaskPlan("bidirectional", 0.0, 0.9, update_every=10, evidence_steps=2), 0) if hook else None
    trainer = Trainer(model, train, val, recipe, seed=0, hook=mover)
    trainer._passes.possible = recorded
    trainer.run(show=False, on_epoch=lambda trainer: counts.append(len(trainer._passes.recordings)))
    assert not trainer._passes.recordings
    return trainer, mover, max(counts)


@pytest.fixture
def exact(monkeypatch):
    """One algorithm for every convolution, whose result is the same each time, in full float32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@needs_gpu
@pytest.mark.parametrize("recipe", [replace(PRETRAIN, epochs=4, batch_size=32, patience=None),
                                    replace(FINETUNE_ITERATIVE, epochs=4, batch_size=32, patience=None)])
@pytest.mark.parametrize("hook", [False, True])
def test_training_does_the_same_with_and_without_recording(tiny_dataset, exact, recipe, hook):
    (plain, before, none), (fast, after, recordings) = (trained(tiny_dataset, recorded, recipe, hook)
                                                        for recorded in (False, True))
    assert (none, recordings) == (0, 1 + hook)
    for one, other in zip(plain.history, fast.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    pairs = zip(plain.model.state_dict().values(), fast.model.state_dict().values(), strict=True)
    assert all(torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3) for one, other in pairs)
    if hook:
        assert count_pruned_params(fast.model).surviving == round(0.1 * count_pruned_params(fast.model).total)
        same = [(mask == get_masks(fast.model)[name]).float().mean() for name, mask in get_masks(plain.model).items()]
        assert min(same) > 0.99 and len(before.history) == len(after.history)
