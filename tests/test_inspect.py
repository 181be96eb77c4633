"""`inspect_checkpoint.py`: what it recognises and refuses, and finetuning of single weights."""
from __future__ import annotations

import json
import pickle
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import inspect_checkpoint
from tests.conftest import REPOSITORY, assert_user_error
from utils import checkpoint, datasets, export, finetuning, inspection
from utils.allocation import AllocationProblem
from utils.analysis_utils import clone_model, get_masks, prunable_layers, set_masks
from utils.channels import effective_sparsity
from utils.common import UserError
from utils.controller import RegrowthPolicyGradient, SearchConfig
from utils.data_loader import BatchLoader
from utils.finetuning import Phase, Source
from utils.inspection import describe, load_artifact, render
from utils.model_loader import load_model_state, model_loader
from utils.models import MODELS
from utils.pruning import prune_to
from utils.regrowth import BEST_ENTRIES, ReferenceBasedRegrowth
from utils.run import script
from utils.training import FINETUNE_FINAL, Recipe, Trainer

# --- recognition ---------------------------------------------------------------------------------------------------


def resnet(sparsity: float | None = None, seed: int = 0) -> nn.Module:
    """resnet20 for ten classes; with a sparsity, every layer has a random mask of about that sparsity."""
    model = model_loader("resnet20", seed=seed)
    if sparsity is not None:
        dice = torch.Generator().manual_seed(seed)
        set_masks(model, {name: torch.rand(layer.weight.shape, generator=dice) >= sparsity
                          for name, layer in prunable_layers(model).items()})
    return model


def search_state() -> dict:
    """A controller checkpoint's content, of a search over three layers whose reward is the share of the first."""
    problem = AllocationProblem(layers=("conv1", "layer1.0.conv1", "linear"), capacities=(10, 20, 30), budget=12,
                                sizes=(432, 2304, 640), fan=(22, 38, 74), drift=(0.2, 0.5, 0.9))
    config = SearchConfig(num_epochs=2, batch_size=2, rungs=(1, 3), search_budget=20)
    search = RegrowthPolicyGradient(problem, lambda allocation, seed, epochs: allocation[0] / 12, config, seed=0)
    search.run()
    return {"config": {"stage": "regrow", "m_name": "resnet20", "seed": 0}, "search": search.state_dict()}


def saved(content, folder: Path, name: str = "artifact.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def progress_state() -> dict:
    recipe = Recipe("sgd", lr=0.1, epochs=5, batch_size=32).as_dict()
    trainer = {"model": resnet().state_dict(), "epoch": 3, "best_accuracy": 41.5, "best_epoch": 2, "history": []}
    return {"config": {"stage": "pretrain", "recipe": recipe}, "trainer": trainer}


BEST = {"epoch": 4, "reward": 0.71, "accuracy": 0.72, "timestamp": "2024-01-01 00:00:00"}
INDICES = {"layer1.0.conv1": [5, 6, 7], "linear": torch.tensor([1, 2]), "conv1": np.array([3])}
FORMATS = {
    "dense checkpoint": lambda: {"net": resnet().state_dict(), "acc": 91.25, "epoch": 17},
    "masked training checkpoint": lambda: {"net": resnet(0.9).state_dict(), "acc": np.float64(88.0), "epoch": 3},
    "masked state dict": lambda: {f"module.{key}": value for key, value in resnet(0.9).state_dict().items()},
    "dense state dict": lambda: resnet().state_dict(),
    "stage in progress": progress_state,
    "controller checkpoint": search_state,
    "best allocation": lambda: {**BEST, "allocation": {"layer1.0.conv1": 3, "linear": 2, "conv1": torch.tensor(1)},
                                "regrow_indices": INDICES},
    "checkpoint of another": lambda: {"agent": {"lstm.w": torch.zeros(3, 4)}, "rewards": [0.1, float("nan")] * 20,
                                      "epoch": 7},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One file of every kind, by its name in `FORMATS`."""
    folder = tmp_path_factory.mktemp("formats")
    return {name: saved(make(), folder, f"{number}.pth") for number, (name, make) in enumerate(FORMATS.items())}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_and_described(name, files, capsys):
    description = describe(load_artifact(files[name]))
    assert description["kind"].startswith(name)
    inspect_checkpoint.main(["--file", str(files[name]), "--json"])
    assert json.loads(capsys.readouterr().out) == description == json.loads(json.dumps(description, allow_nan=False))
    inspect_checkpoint.main(["--file", str(files[name])])
    printed = capsys.readouterr().out
    assert printed == render(description) + "\n" and description["kind"] in printed


def test_models_are_named_and_counted_by_layer(files):
    for name in ("masked state dict", "masked training checkpoint"):
        description = describe(load_artifact(files[name]))
        masks = get_masks(resnet(0.9))
        assert (description["model"], description["classes"], description["masks"]) == ("resnet20", 10, True)
        assert {row["layer"]: row["active"] for row in description["layers"]} == \
            {layer: int(mask.sum()) for layer, mask in masks.items()}
        active = sum(int(mask.sum()) for mask in masks.values())
        assert description["active"] == active and description["sparsity"] == pytest.approx(1 - active / 270_896)
        assert description["sparsity"] < description["effective_sparsity"] == effective_sparsity(resnet(0.9))
    dense = describe(load_artifact(files["dense checkpoint"]))
    assert (dense["sparsity"], dense["weights"]) == (0.0, 270_896)
    assert dense["training"] == {"acc": 91.25, "epoch": 17}
    assert describe(load_artifact(files["stage in progress"]))["training"] == {
        "epochs_done": 3, "epochs_planned": 5, "best_val_acc": 41.5, "best_epoch": 2}


def test_a_model_is_guessed_with_its_own_number_of_classes_or_not_at_all():
    assert inspection.guess_model(model_loader("alexnet", num_classes=7, seed=0).state_dict()) == ("alexnet", 7)
    state = model_loader("resnet20", seed=0).state_dict()
    state.pop("bn1.weight")
    assert inspection.guess_model(state) is None


class Twin(nn.Module):
    """A small network of which several kinds have the same layers: other activations, or a classifier that is no
    Linear, or not the last."""

    def __init__(self, act: type[nn.Module], classes: int, conv: bool = False):
        super().__init__()
        self.head = nn.Conv2d(4, classes, 1) if conv else nn.Linear(4, classes)
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.mix, self.act, self.conv = nn.Conv2d(4, 4, 3, padding=1), act(), conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.mix(self.act(self.up(x))))
        return self.head(x).mean((2, 3)) if self.conv else self.head(x.mean((2, 3)))


@pytest.fixture
def twins(monkeypatch):
    """`silu` after `relu`, of the same layers, and `conv` with a convolution as its classifier."""
    made = {"relu": lambda n: Twin(nn.ReLU, n), "silu": lambda n: Twin(nn.SiLU, n),
            "conv": lambda n: Twin(nn.SiLU, n, True)}
    for name, make in made.items():
        monkeypatch.setitem(MODELS, name, make)
    monkeypatch.setattr(inspection, "MODELS", ["resnet20", *made])


def test_of_models_with_the_same_layers_the_run_card_or_the_user_tells_which_it_is(twins, tmp_path):
    path = saved(model_loader("silu", num_classes=7, seed=0).state_dict(), tmp_path)
    assert inspection.guess_model(torch.load(path)) is None
    assert describe(load_artifact(path))["could be"] == ["relu", "silu"]
    with pytest.raises(UserError, match="fits relu, silu, and no run card says which it is; name it with --m_name"):
        export.network_of(load_artifact(path))
    assert isinstance(export.network_of(load_artifact(path, m_name="silu")).act, nn.SiLU)
    with pytest.raises(UserError, match="does not fit --m_name conv; it fits relu, silu$"):
        load_artifact(path, m_name="conv").weights
    card = {"sha256": checkpoint.file_digest(path), "config": {"m_name": "silu"}}
    checkpoint.save_json(card, checkpoint.card_path(path))
    assert load_artifact(path).network == ("silu", 7) and describe(load_artifact(path))["model"] == "silu"
    assert isinstance(export.network_of(load_artifact(path)).act, nn.SiLU)


def test_a_classifier_may_be_a_convolution_or_come_first_and_other_layers_are_not_counted(twins, tmp_path):
    for name, classes in (("conv", 5), ("silu", 6)):
        model = model_loader(name, num_classes=classes, seed=0)
        prune_to(model, 40, "magnitude")
        path = saved(model.state_dict(), tmp_path)
        artifact = load_artifact(path, m_name=name)
        assert artifact.network == (name, classes) and "up.weight_mask" not in artifact.weights
        described = describe(artifact)
        assert (described["active"], described["weights"]) == (40, 144 + 4 * classes)
        assert [row["layer"] for row in described["layers"]] == ["head", "mix"]
        assert "40 of" in export.export(artifact, "sparse", tmp_path / "out.sparse", overwrite=True)
        again = load_artifact(tmp_path / "out.sparse", m_name=name)
        assert describe(again)["active"] == 40 and not describe(again).get("warnings")


def test_layers_counted_by_hand():
    state = {"a.bias": torch.zeros(2), "a.weight_orig": torch.ones(2, 3), "b.weight": torch.tensor([[0.0, 2.0]]),
             "a.weight_mask": torch.tensor([[1.0, 0, 0], [0, 0, 1]]), "bn.weight": torch.ones(4)}
    assert [tuple(row.values()) for row in inspection.layer_rows(state)] == \
        [("a", (2, 3), 6, 2, 1 - 2 / 6), ("b", (1, 2), 2, 1, 0.5)]


def test_unknown_entries_by_key_type_and_shape():
    content = {"agent": {"cell": {"w": torch.zeros(3, 4)}}, "bias": torch.tensor(2.5), "name": "lstm", "sizes": [1, 2]}
    rows = inspection.entry_rows({**content, "skipped": 1}, skip=("skipped",), depth=3)
    assert [tuple(row.values()) for row in rows] == [
        ("agent.cell.w", "torch.float32", "(3, 4)", ""), ("bias", "torch.float32", "()", 2.5),
        ("name", "str", "", "lstm"), ("sizes", "list", "2", [1, 2])]
    assert inspection.entry_rows(content)[0] == {"key": "agent.cell", "type": "dict", "shape": "1", "value": ""}
    assert inspection.plain([float("inf"), np.float32(0.5), torch.zeros(2, 3)]) == [None, 0.5, "float32 (2, 3)"]


def test_suspicious_values_are_said(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    set_masks(model, {"0": torch.zeros(2, 2)})
    state = model.state_dict()
    state["1.weight_mask"][0, 0] = 0.5
    state["1.bias"][0] = float("nan")
    text = render(describe(load_artifact(saved(state, tmp_path))))
    for words in ("nothing is left in 0", "other than 0 and 1", "not finite"):
        assert words in text
    assert text.count("warning: ") == 3


def test_a_search_is_summed_up(files):
    description = describe(load_artifact(files["controller checkpoint"]))
    history = search_state()["search"]["history"]
    rewards = description["rewards"]
    top = [row for row in history if row["fidelity"] == 3]
    assert rewards["best"] == max(row["reward"] for row in top) and rewards["best_after_epochs"] == 3
    assert rewards["last"] == history[-1]["reward"] and rewards["episodes"] == len(history)
    assert rewards["epochs_spent"] == history[-1]["epochs_spent"] and description["budget"] == 12
    assert [row["capacity"] for row in description["allocation"]] == [10, 20, 30]
    assert sum(row["regrown"] for row in description["allocation"]) == 12


@pytest.mark.parametrize("allocation", [{"layer1.0.conv1": 3, "linear": 2, "conv1": 1}, [3, 2, 1],
                                        torch.tensor([3, 2, 1])])
def test_a_published_best_allocation_by_layer(allocation, tmp_path):
    path = saved({**BEST, "allocation": allocation, "regrow_indices": INDICES}, tmp_path)
    description = describe(load_artifact(path, "best"))
    assert description["allocation"] == [{"layer": name, "regrown": amount, "indices": amount} for name, amount
                                         in zip(INDICES, (3, 2, 1))]
    assert description["rewards"] == BEST | {"epoch": 4} and description["regrown"] == 6


def test_the_run_card_beside_is_read_only_if_it_is_the_files_own(tmp_path):
    path = saved(resnet(0.5).state_dict(), tmp_path)
    card = {"sha256": checkpoint.file_digest(path), "config": {"stage": "regrow", "seed": 3}, "val_acc": 70.5}
    checkpoint.save_json(card, checkpoint.card_path(path))
    description = describe(load_artifact(path))
    assert description["run card"] == {"val_acc": 70.5} and description["arguments"] == {"stage": "regrow", "seed": 3}
    checkpoint.save_json({**card, "sha256": "0"}, checkpoint.card_path(path))
    assert "run card" not in describe(load_artifact(path))


class Hostile:
    """Writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('executed')",)


def test_unusable_files_are_one_line_and_nothing_is_executed(files, tmp_path, capsys, monkeypatch):
    whole = files["dense state dict"].read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pth").write_text("accuracy,loss\n1,2\n")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"net": Hostile(tmp_path / "harm")}, protocol=2))
    torch.save({"net": Hostile(tmp_path / "harm")}, tmp_path / "hostile_zip.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({**search_state(), "search": {"problem": {}, "config": {}, "history": [], "rewards": {}}},
               tmp_path / "hollow.pth")
    for name, said in (("cut", "truncated"), ("text", "not a readable"), ("hostile", "refused"),
                       ("hostile_zip", "refused"), ("list", "no checkpoint"), ("hollow", "damaged"),
                       ("missing", "no checkpoint at")):
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", "--file", str(tmp_path / f"{name}.pth")])
        with pytest.raises(SystemExit) as caught:
            script(inspect_checkpoint.main)
        out, err = capsys.readouterr()
        assert_user_error(SimpleNamespace(returncode=caught.value.code, stderr=err), said)
        assert not out
    assert not (tmp_path / "harm").exists()


def test_type_insists(files):
    for name, path in files.items():
        right, wrong = ("best", "checkpoint") if name == "best allocation" else ("checkpoint", "best")
        assert load_artifact(path, right).kind is load_artifact(path).kind
        with pytest.raises(UserError, match=f"--type {wrong}"):
            load_artifact(path, wrong)


# --- single weights ------------------------------------------------------------------------------------------------


def regrow_some(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Activates about a tenth of the pruned weights of every layer; returns bool masks of them."""
    dice, regrown, masks = torch.Generator().manual_seed(seed), {}, get_masks(model)
    for name, mask in masks.items():
        regrown[name] = ~mask & (torch.rand(mask.shape, generator=dice) < 0.1)
    set_masks(model, {name: mask | regrown[name] for name, mask in masks.items()})
    return regrown


@pytest.fixture
def source(small_cnn) -> Source:
    """`small_cnn` at about 80 % sparsity with regrown weights."""
    dice = torch.Generator().manual_seed(1)
    set_masks(small_cnn, {name: torch.rand(layer.weight.shape, generator=dice) < 0.2
                          for name, layer in prunable_layers(small_cnn).items()})
    return Source(small_cnn, Path("none"), regrow_some(small_cnn))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor's bits, in which 0.0 and -0.0 differ."""
    return tensor.detach().contiguous().view(torch.int32)


def train(source: Source, phase: Phase, loaders, stop_after: int | None = None, state: dict | None = None) -> Trainer:
    """Runs a phase, from a trainer's state if given; `stop_after` an epoch raises KeyboardInterrupt. The trainer."""
    params, constrain = finetuning.TRAINED[phase.trained](source.model, source.regrown, phase)
    trainer = Trainer(source.model, loaders[0], loaders[1], phase.recipe, seed=3, params=params, constrain=constrain)
    if state is not None:
        trainer.load_state_dict(state)

    def interrupt(trainer: Trainer) -> None:
        if trainer.epoch == stop_after:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) if stop_after else nullcontext():
        trainer.run(on_epoch=interrupt, show=False)
    source.model.requires_grad_(True)
    return trainer


def assert_only_regrown_moved(before: dict, after: dict, regrown: dict[str, torch.Tensor]) -> None:
    """Every regrown weight differs; every other parameter has the bits it had."""
    for key, old in before.items():
        if not old.is_floating_point() or "running" in key:
            continue
        moved = bits(old) != bits(after[key])
        layer = key.removesuffix(".weight_orig")
        expected = regrown[layer] if key.endswith("weight_orig") else torch.zeros_like(moved)
        assert torch.equal(moved, expected), key


RECIPES = [Recipe("sgd", lr=0.05, epochs=2, batch_size=32, weight_decay=0.05),
           Recipe("adamw", lr=0.01, epochs=2, batch_size=32, weight_decay=0.1)]


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
def test_frozen_weights_keep_every_bit_and_leave_no_trace_in_the_optimizer(recipe, source, tiny_loaders):
    layer = prunable_layers(source.model)["0"]
    with torch.no_grad():
        layer.weight_orig.view(-1)[(layer.weight_mask.view(-1) == 1).nonzero()[0]] = -0.0
    before = {key: value.clone() for key, value in source.model.state_dict().items()}
    trainer = train(source, Phase("regrown", recipe), tiny_loaders)
    after = source.model.state_dict()
    assert_only_regrown_moved(before, after, source.regrown)
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    frozen = {id(layer.weight_orig): ~source.regrown[name] for name, layer in prunable_layers(source.model).items()}
    assert len(trainer.optimizer.state) == 3
    for param, state in trainer.optimizer.state.items():
        for value in (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()):
            assert not value[frozen[id(param)]].any() and value[~frozen[id(param)]].any()


@pytest.mark.parametrize("trained", ["regrown", "two rates"])
def test_an_interrupted_phase_continues_to_the_same_bits(trained, source, tiny_loaders):
    phase = Phase(trained, RECIPES[1], lr_original=1e-3)
    copies = [Source(clone_model(source.model), source.artifact, source.regrown) for _ in range(2)]
    state = train(copies[0], phase, tiny_loaders, stop_after=1).state_dict()
    train(copies[1], phase, tiny_loaders, state=state)
    train(source, phase, tiny_loaders)
    for key, value in source.model.state_dict().items():
        assert torch.equal(value, copies[1].model.state_dict()[key]), key


@pytest.mark.parametrize("make, expected", [
    (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),  # steps of 1 and 1.9 times the rate
     [[0.99, 1.9, 2.99, 4.0, 0.49], [0.971, 1.71, 2.971, 4.0, 0.471]]),
    (lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5),  # w (1 - rate / 2) - rate
     [[0.985, 1.8, 2.975, 4.0, 0.4875]]),
])
def test_two_rates_by_hand(make, expected):
    model = nn.Sequential(nn.Linear(4, 1))
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 0]])})
    weight, bias = model[0].weight_orig, model[0].bias
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        bias.fill_(0.5)
    phase = Phase("two rates", Recipe("sgd", lr=0.1, epochs=1, batch_size=1), lr_original=0.01)
    regrown = {"0": torch.tensor([[False, True, False, False]])}
    params, constrain = finetuning.train_at_two_rates(model, regrown, phase)
    optimizer = make(params)
    constrain(optimizer)
    for values in expected:
        weight.grad, bias.grad = torch.tensor([[1.0, 1.0, 1.0, 5.0]]), torch.ones(1)
        optimizer.step()
        assert torch.cat([weight[0], bias]).tolist() == pytest.approx(values, abs=1e-6)
    assert weight[0, 3] == 4.0


def test_phase_one_moves_regrown_weights_and_phase_two_everything_but_the_pruned(source, tiny_loaders):
    start = {key: value.clone() for key, value in source.model.state_dict().items()}
    train(source, Phase("regrown", RECIPES[0]), tiny_loaders)
    first = {key: value.clone() for key, value in source.model.state_dict().items()}
    assert_only_regrown_moved(start, first, source.regrown)
    optimizer = train(source, Phase("all", RECIPES[0]), tiny_loaders).optimizer
    assert len(optimizer.state) == len(list(source.model.parameters()))
    for name, layer in prunable_layers(source.model).items():
        moved = bits(first[f"{name}.weight_orig"]) != bits(layer.weight_orig)
        assert torch.equal(moved, layer.weight_mask.bool())


def test_a_layer_that_never_runs_does_not_stop_the_freezing_of_original_weights(tiny_loaders):
    class Skips(nn.Module):
        """Like effnet's first block: a layer whose weights are there and never used."""

        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = nn.Conv2d(3, 2, 1), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x.mean(dim=(2, 3)))

    model = Skips()
    masks = {name: torch.arange(layer.weight.numel()).view_as(layer.weight) % 2 == 0
             for name, layer in prunable_layers(model).items()}
    set_masks(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    start = clone_model(model).state_dict()
    train(Source(model, Path("x"), masks), Phase("regrown", RECIPES[0]), tiny_loaders)
    moved = start["used.weight_orig"] != model.used.weight_orig
    assert torch.equal(moved, masks["used"]) and torch.equal(start["unused.weight_orig"], model.unused.weight_orig)


# --- where the model comes from ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> SimpleNamespace:
    """What `load_source` needs of a run, with the dense model and the pruned one it regrows from on disk."""
    checkpoint.save_checkpoint({"net": resnet(seed=5).state_dict()}, checkpoint.dense_path(tmp_path, "resnet20"))
    checkpoint.save_checkpoint(resnet(0.9).state_dict(), tmp_path / "start.pth")
    return SimpleNamespace(root=tmp_path, m_name="resnet20", device=torch.device("cpu"), new_model=resnet,
                           timing_only=False)


def options(*words: object) -> tuple[tuple[Phase, ...], Namespace]:
    """The phases and the options that a command line with `words` asks for."""
    args = inspect_checkpoint.parse_args(["--file", "x", "--finetune", *map(str, words)])
    return finetuning.phases(args), args


def regrown_best(run: SimpleNamespace) -> tuple[nn.Module, dict]:
    """A model regrown from `start.pth` by the dense model, and its best-allocation artifact."""
    model = resnet(0.9)
    amounts = {"conv1": 3, "layer2.0.conv1": 50, "linear": 7}
    record = ReferenceBasedRegrowth(model, resnet(seed=5)).apply_regrowth(amounts)
    return model, {**BEST, "allocation": amounts, **record.state_dict(), "starting_checkpoint": "start.pth",
                   "starting_digest": checkpoint.file_digest(run.root / "start.pth")}


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_a_best_allocation_is_replayed_on_its_starting_checkpoint(run, tmp_path):
    model, best = regrown_best(run)
    source = finetuning.load_source(run, load_artifact(saved(best, tmp_path)), *options("--freeze_original"))
    assert_same_model(source.model, model)
    assert {name: int(mask.sum()) for name, mask in source.regrown.items() if mask.any()} == best["allocation"]
    description = describe(load_artifact(tmp_path / "artifact.pth"))
    assert description["regrown by source"] == {"reference": 60} and "what the entries are" not in description


def test_a_best_allocation_says_what_its_entries_are(run, tmp_path, capsys):
    best = {**regrown_best(run)[1], "entries": BEST_ENTRIES, "val_acc_after_regrowth": 72.0}
    path = saved(best, tmp_path)
    description = describe(load_artifact(path))
    assert description["what the entries are"] == BEST_ENTRIES
    assert description["rewards"]["val_acc_after_regrowth"] == 72.0 and "other entries" not in description
    inspect_checkpoint.main(["--file", str(path)])
    assert "before any finetuning" in capsys.readouterr().out


def test_the_start_is_found_where_stage_1_puts_it_after_the_root_has_moved(run, tmp_path):
    model, best = regrown_best(run)
    place = tmp_path / "m/ckpt_after_prune/start.pth"
    place.parent.mkdir(parents=True)
    (tmp_path / "start.pth").rename(place)
    best["starting_checkpoint"] = "old_root/m/ckpt_after_prune/start.pth"
    source = finetuning.load_source(run, load_artifact(saved(best, tmp_path)), *options())
    assert_same_model(source.model, model)


def test_a_published_best_allocation_takes_its_values_from_the_reference(run, tmp_path):
    model, best = regrown_best(run)
    indices = best["regrow_indices"]
    shape = model.linear.weight.shape
    indices = {"conv1": indices["conv1"].tolist(), "layer2.0.conv1": indices["layer2.0.conv1"].numpy(),
               "linear": torch.stack(torch.unravel_index(indices["linear"], shape), dim=1)}
    artifact = load_artifact(saved({**BEST, "allocation": [3, 50, 7], "regrow_indices": indices}, tmp_path))
    source = finetuning.load_source(run, artifact, *options("--starting_checkpoint", tmp_path / "start.pth"))
    assert_same_model(source.model, model)
    with pytest.raises(UserError, match="does not say which pruned checkpoint"):
        finetuning.load_source(run, artifact, *options())
    active = {"linear": get_masks(resnet(0.9))["linear"].nonzero()[:1]}
    for wrong, said in ((active, "active already"), ({"linear": [640]}, "outside"), ({"linear": [-1]}, "outside"),
                        ({"linear": [[10, 0]]}, "outside"), ({"fc": [1]}, "'fc'")):
        artifact = load_artifact(saved({**BEST, "allocation": [1], "regrow_indices": wrong}, tmp_path, "wrong.pth"))
        with pytest.raises(UserError, match=said):
            finetuning.load_source(run, artifact, *options("--starting_checkpoint", tmp_path / "start.pth"))


def test_regrown_weights_are_those_pruned_in_the_starting_checkpoint(run, tmp_path):
    model = resnet(0.9)
    regrown = regrow_some(model)
    path = saved(model.state_dict(), tmp_path)
    with pytest.raises(UserError, match="unknown which weights.*--starting_checkpoint"):
        finetuning.load_source(run, load_artifact(path), *options("--freeze_original"))
    card = {"sha256": checkpoint.file_digest(path), "starting_checkpoint": "start.pth",
            "config": {"start": checkpoint.file_digest(tmp_path / "start.pth")}}
    checkpoint.save_json(card, checkpoint.card_path(path))
    found = finetuning.load_source(run, load_artifact(path), *options("--differential_lr")).regrown
    assert all(torch.equal(found[name], mask) for name, mask in regrown.items())
    assert finetuning.load_source(run, load_artifact(path), *options()).regrown is None
    (tmp_path / "start.pth").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="SHA-256"):
        finetuning.load_source(run, load_artifact(path), *options("--differential_lr"))


def test_sources_that_cannot_serve_are_refused(run, tmp_path):
    _, best = regrown_best(run)
    pruned, dense = tmp_path / "start.pth", checkpoint.dense_path(tmp_path, "resnet20")
    for content, words, said in (
            (best, ["--reference_model", dense], "leave --reference_model out"),
            (best, ["--starting_checkpoint", dense], "SHA-256"),
            ({**best, "regrow_values": {}}, [], "does not fit"),
            (resnet(0.9).state_dict(), ["--reference_model", dense], "has its own"),
            (resnet(0.9).state_dict(), ["--freeze_original", "--starting_checkpoint", pruned], "no regrown weights"),
            (resnet(0.9).state_dict(), ["--freeze_original", "--starting_checkpoint", dense], "is a dense model"),
            (resnet().state_dict(), ["--freeze_original", "--starting_checkpoint", pruned], "dense model without"),
            (search_state(), [], "holds no finished model"),
            (model_loader("resnet32", seed=0).state_dict(), [], "does not fit this model")):
        with pytest.raises(UserError, match=said):
            finetuning.load_source(run, load_artifact(saved(content, tmp_path)), *options(*words))


# --- the script ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["--epochs", "3"], "--epochs has no effect without --finetune"),
    (["--resume"], "--resume has no effect"),
    (["--dataset", "photos"], "--dataset has no effect without --finetune"),
    (["--data_dir", "x"], "--data_dir has no effect without --finetune"),
    (["--image_size", "8"], "--image_size has no effect without --finetune"),
    (["--val_split", "0.3"], "--val_split has no effect without --finetune"),
    (["--precision", "fp32"], "--precision has no effect without --finetune"),
    (["--seed", "1"], "--seed has no effect without --finetune"),
    (["--device", "cuda"], "--device has no effect without --finetune"),
    (["--root", "x", "--export", "sparse", "--out", "x"], "--root has no effect without --finetune"),
    (["--finetune", "--json"], "--json"),
    (["--finetune", "--lr_regrown", "0.1"], "without --differential_lr"),
    (["--finetune", "--phase1_epochs", "2"], "without --progressive_unfreezing"),
    (["--finetune", "--differential_lr", "--lr", "0.1"], "leave out --lr"),
    (["--finetune", "--progressive_unfreezing", "--epochs", "2"], "leave out --epochs"),
    (["--finetune", "--freeze_original", "--differential_lr"], "not allowed with"),
    (["--finetune", "--epochs", "0"], "--epochs"),
    (["--type", "agent"], "best"),
])
def test_options_without_effect_or_in_conflict_are_errors(words, said, capsys):
    with pytest.raises((SystemExit, UserError)) as caught:
        inspect_checkpoint.main(["--file", "missing.pth", *words])
    message = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert said in message and len(message.strip().splitlines()) == 1


def test_options_reach_the_phases():
    (phase,) = options("--epochs", 7, "--lr", 0.01, "--patience", 4)[0]
    assert phase == Phase("all", replace(FINETUNE_FINAL, epochs=7, lr=0.01, patience=4))
    (phase,) = options("--differential_lr", "--lr_original", 0.002)[0]
    assert (phase.trained, phase.recipe.lr, phase.lr_original) == ("two rates", 1e-3, 0.002)
    first, second = options("--progressive_unfreezing", "--phase2_epochs", 5, "--lr", 0.02)[0]
    assert (first.trained, first.recipe.epochs, second.trained, second.recipe.epochs) == ("regrown", 10, "all", 5)
    assert first.recipe.lr == second.recipe.lr == 0.02


def test_the_model_is_recognised_or_asked_for(run, tmp_path):
    def recognise(content) -> str:
        args = inspect_checkpoint.parse_args(["--file", "x", "--finetune", "--root", str(tmp_path)])
        return finetuning.recognise_model(args, load_artifact(saved(content, tmp_path)))
    assert recognise(model_loader("resnet32", seed=0).state_dict()) == "resnet32"
    assert recognise(regrown_best(run)[1]) == "resnet20"
    for unclear in ({"a.weight": torch.zeros(2, 2)}, {**BEST, "allocation": [3], "regrow_indices": {"linear": [1]}}):
        with pytest.raises(UserError, match="--model"):
            recognise(unclear)


def test_finetuning_from_the_command_line(run, run_script, image_folder, tmp_path, capsys):
    model = resnet(0.9)
    regrown = regrow_some(model)
    path = saved(model.state_dict(), tmp_path, "regrown.pth")
    words = ["--file", path, "--finetune", "--progressive_unfreezing", "--phase1_epochs", 1, "--phase2_epochs", 1,
             "--lr", 0.01, "--reset_bn_stats", "--starting_checkpoint", tmp_path / "start.pth", "--root", tmp_path,
             "--data_dir", image_folder, "--device", "cpu", "--precision", "fp32"]
    process = run_script("inspect_checkpoint.py", *words)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "finetune_savedir" / "resnet20"
    first, final = folder / "finetuned_regrown_phase_1.pth", folder / "finetuned_regrown.pth"
    assert_only_regrown_moved(model.state_dict(), checkpoint.load_checkpoint(first), regrown)
    changed = checkpoint.load_checkpoint(final)["linear.bias"] != checkpoint.load_checkpoint(first)["linear.bias"]
    assert changed.all()
    cards = [checkpoint.read_card(file) for file in (first, final)]
    assert "val_acc_after_bn_reset" in cards[0] and "test_acc" not in cards[0] and 0 <= cards[1]["test_acc"] <= 100
    assert cards[1]["regrown"] == sum(int(mask.sum()) for mask in regrown.values())
    assert (folder / "finetuned_regrown_training.csv").read_text().count("\n") == 2
    for file, card in zip((first, final), cards):  # of the training, over all processes that it took
        log = checkpoint.read_csv(checkpoint.training_log_path(file), {"seconds": "number"}, "")
        assert card["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in log), rel=1e-3)
    assert "running statistics of batch normalisation adapt" in process.stdout

    inspect_checkpoint.main([str(word) for word in words])
    assert capsys.readouterr().out.count("reusing") == 2
    with pytest.raises(UserError, match=r"lr 0.01 \(asked: 0.02\)"):
        inspect_checkpoint.main([*map(str, words), "--lr", "0.02"])
    again = describe(load_artifact(final))
    assert again["model"] == "resnet20" and again["run card"]["starting_checkpoint"] == str(tmp_path / "start.pth")
    checkpoint.card_path(final).unlink()
    inspect_checkpoint.main([*map(str, words), "--resume"])
    assert f"{cards[1]['val_acc']:.2f} %, test {cards[1]['test_acc']:.2f} % (no run card says how it was made)" in \
        capsys.readouterr().out


def carded(path: Path, **facts: object) -> Path:
    """Gives a checkpoint a run card with these entries."""
    checkpoint.save_json({"sha256": checkpoint.file_digest(path), **facts}, checkpoint.card_path(path))
    return path


def data_options(path: Path, *words: object) -> dict[str, object]:
    args = inspect_checkpoint.parse_args(["--file", str(path), "--finetune", *map(str, words)])
    finetuning.take_data(args, load_artifact(path))
    return {name: getattr(args, name) for name in finetuning.DATA}


def test_data_split_and_precision_come_from_the_card_unless_told_otherwise(tmp_path, capsys):
    path = saved(resnet(0.5).state_dict(), tmp_path)
    config = {"dataset": "flowers, image folder (PNG)", "val_split": 0.3, "precision": "bf16"}
    known = {"dataset": "folder", "data_dir": str(tmp_path), "image_size": 16}
    defaults = {"dataset": "cifar10", "data_dir": Path("data"), "image_size": 32, "val_split": 0.2, "precision": "auto"}
    assert data_options(path) == defaults and capsys.readouterr().out == ""
    carded(path, config=config, input=known)
    recorded = {**known, "data_dir": tmp_path, "val_split": 0.3, "precision": "bf16"}
    assert data_options(path) == recorded
    assert f"--dataset folder --data_dir {tmp_path} --image_size 16 --val_split 0.3" in capsys.readouterr().out
    assert data_options(path, "--precision", "fp32", "--image_size", 8, "--data_dir", "x") == \
        {**recorded, "precision": "fp32", "image_size": 8, "data_dir": Path("x")}
    assert data_options(path, "--dataset", "photos") == {**defaults, "dataset": "photos", "val_split": 0.3,
                                                         "precision": "bf16"}
    best = saved({**BEST, "allocation": [1], "regrow_indices": {"linear": [1]}, "starting_checkpoint": str(path)},
                 tmp_path, "best.pth")
    assert data_options(best) == recorded
    carded(path, config={**config, "dataset": "photos, embedded"})  # an older card
    assert data_options(path)["dataset"] == "photos"
    carded(path, config=config, input={**known, "data_dir": str(tmp_path / "elsewhere")})
    assert data_options(path)["data_dir"] == Path("data")


def test_what_a_model_needs_to_know_of_its_input_is_shown(tmp_path):
    known = {"image_size": 16, "classes": ["rose", "tulip"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    path = saved({"net": resnet().state_dict(), "acc": 50.0, "epoch": 1, "input": known}, tmp_path)
    assert describe(load_artifact(path))["input"] == known
    path = carded(saved(resnet(0.5).state_dict(), tmp_path, "pruned.pth"), config={}, input=known)
    text = inspection.render(describe(load_artifact(path)))
    assert "rose, tulip" in text and "0.5000, 0.4000, 0.3000" in text


def test_the_readme_loads_the_shipped_model_in_plain_pytorch(image_folder, monkeypatch):
    blocks = (REPOSITORY / "README.md").read_text().split("```python\n")
    (example,) = [block.split("```")[0] for block in blocks if block.startswith("import json, torch")]
    monkeypatch.chdir(REPOSITORY)
    names: dict = {}
    exec(example, names)
    known, data = names["known"], datasets.load_dataset("cifar10", image_folder)
    assert known["classes"] == list(datasets.CIFAR10_CLASSES) and known["image_size"] == 32
    model = model_loader("resnet20", seed=1)
    load_model_state(model, checkpoint.load_checkpoint(Path(names["path"] + ".pth")))
    mean, std = (255 * np.array(known[key]) for key in ("mean", "std"))
    ((inputs, _),) = list(BatchLoader(data.test_images, data.test_targets, 500, mean=mean, std=std))
    assert torch.allclose(names["model"](inputs), model.eval()(inputs), atol=1e-4)
