"""State dicts as others save them: every reader takes them, keeps what is pruned, or says in one line why not."""
from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import inspect_checkpoint
from utils import checkpoint, finetuning, inspection, stage1
from utils.analysis_utils import (
    add_masks,
    clone_model,
    count_pruned_params,
    get_masks,
    has_masks,
    hold_pruned_weights,
    prunable_layers,
    remove_masks,
    set_masks,
)
from utils.common import UserError
from utils.inspection import describe, guess_model, load_artifact
from utils.model_loader import find_state, load_model_state, model_loader, model_state


def resnet(sparsity: float | None = None) -> nn.Module:
    """resnet20; with a sparsity, every layer has a random mask of about that sparsity."""
    model = model_loader("resnet20", seed=0)
    if sparsity is not None:
        dice = torch.Generator().manual_seed(0)
        set_masks(model, {name: torch.rand(layer.weight.shape, generator=dice) >= sparsity
                          for name, layer in prunable_layers(model).items()})
    return model


@pytest.fixture
def run(tmp_path, monkeypatch) -> SimpleNamespace:
    """What loading needs of a run."""
    monkeypatch.setattr(stage1, "check_data", lambda *_: None)
    return SimpleNamespace(root=tmp_path, m_name="resnet20", device=torch.device("cpu"), new_model=resnet)


def renamed(state: dict, rename) -> dict:
    return {rename(key): value for key, value in state.items()}


def old_style(state: dict) -> dict:
    return {key: value for key, value in state.items() if "num_batches_tracked" not in key}


def as_sparse_tensors(state: dict) -> dict:
    return {key: value.contiguous().to_sparse() if key.endswith("mask") else value for key, value in state.items()}


FORMS = {
    "own": lambda state: state,
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "model": "resnet20"},
    "model": lambda state: {"model": state},
    "compiled": lambda state: renamed(state, lambda key: "_orig_mod." + key),
    "compiled, data-parallel": lambda state: renamed(state, lambda key: "module._orig_mod." + key),
    "data-parallel, compiled": lambda state: {"net": renamed(state, lambda key: "_orig_mod.module." + key)},
    "a compiled block": lambda state: renamed(state, lambda key: key.replace("layer1.0.", "layer1._orig_mod.0.")),
    "trainer's wrapper": lambda state: {"state_dict": renamed(state, lambda key: "model.module." + key)},
    "old batch norm": old_style,
    "sparse tensors": as_sparse_tensors,
    "parameters that want gradients": lambda state: {key: nn.Parameter(value, value.is_floating_point())
                                                     for key, value in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_reader_takes_every_form(form, run, tmp_path):
    model = resnet(0.9)
    path = tmp_path / "foreign.pth"
    torch.save(FORMS[form](model.state_dict()), path)
    artifact = load_artifact(path)
    description = describe(artifact)
    assert (description["model"], description["classes"], description["masks"]) == ("resnet20", 10, True)
    assert description["active"] == count_pruned_params(model).surviving and "warnings" not in description
    args = inspect_checkpoint.parse_args(["--file", "x", "--finetune"])
    assert finetuning.recognise_model(args, artifact) == "resnet20"
    for loaded in (stage1.load_outcome(run, path).model,
                   finetuning.load_source(run, artifact, finetuning.phases(args), args).model):
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_model_state_is_found_in_every_layout():
    state = {"w": torch.ones(1)}
    for loaded in (state, {"net": state, "acc": 1.0}, {"state_dict": state}, {"model": "resnet20", "state_dict": state},
                   {"model": state, "epoch": 3}, {"model_state_dict": state, "optimizer_state_dict": {}}):
        assert find_state(loaded) is state and model_state(loaded, "x") == state
    with pytest.raises(UserError, match="no model weights"):
        model_state({"allocation": [1, 2]}, "x.pth")


def test_exact_zeros_without_masks_stay_zero(run, tmp_path, capsys):
    model = resnet(0.9)
    counts, masks = count_pruned_params(model), get_masks(model)
    remove_masks(model)
    torch.save({"net": model.state_dict()}, tmp_path / "made_permanent.pth")
    description = describe(load_artifact(tmp_path / "made_permanent.pth"))
    assert description["kind"] == "dense checkpoint" and not description["masks"]
    assert description["sparsity"] == pytest.approx(counts.sparsity)
    said = f"{counts.pruned:,} of {counts.total:,} weights without a mask are exactly 0; they count as pruned"
    assert [said in text for text in description["warnings"]] == [True]
    loaded = stage1.load_outcome(run, tmp_path / "made_permanent.pth").model
    assert capsys.readouterr().err == f"note: {tmp_path / 'made_permanent.pth'}: {said} and stay 0\n"
    assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(loaded).items())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1, weight_decay=0.1)
    hold_pruned_weights(loaded, optimizer)
    loaded(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    loaded(torch.randn(4, 3, 32, 32))
    assert sum(int((layer.weight == 0).sum()) for layer in prunable_layers(loaded).values()) == counts.pruned


def test_a_few_zeros_by_chance_are_no_masks(capsys):
    state = resnet().state_dict()
    state["conv1.weight"][0, 0, 0] = 0.0  # 3 of 270,896
    model = resnet()
    load_model_state(model, state)
    assert not has_masks(model) and not capsys.readouterr().err


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def test_masks_on_some_layers_and_of_biases(capsys):
    """The PyTorch tutorial's way: one layer's weight and bias pruned, the others untouched."""
    source, model = two_layers(), two_layers()
    prune.l1_unstructured(source[0], "weight", 1)
    prune.custom_from_mask(source[2], "bias", torch.tensor([1.0, 0.0]))
    load_model_state(model, source.state_dict(), "tutorial.pth")
    assert list(model.state_dict()) == [f"{number}.{name}" for number in (0, 2)
                                        for name in ("bias", "weight_orig", "weight_mask")]
    assert {name: int(mask.sum()) for name, mask in get_masks(model).items()} == {"0": 3, "2": 4}
    assert torch.equal(model[2].bias, source[2].bias) and model[2].bias[1] == 0
    inputs = torch.randn(3, 2)
    assert torch.equal(model(inputs), source(inputs))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: tutorial.pth") and line.endswith("2.bias") and "applied once" in line


def changed(**entries) -> dict:
    return two_layers().state_dict() | {key.replace("_", "."): value for key, value in entries.items()}


NAN = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])


@pytest.mark.parametrize("state, said", [
    (changed(**{"0_weight": torch.empty(2, 2, device="meta")}), "0.weight is a meta tensor"),
    (changed(**{"0_weight": torch.ones(2, 2, dtype=torch.complex64)}), "0.weight is of type complex64"),
    (changed(**{"0_weight": torch.ones(1).expand(2**20, 2**20)}), "0.weight has 1,099,511,627,776 elements"),
    (changed(**{"2_weight": torch.full((2, 2), 1e300, dtype=torch.float64)}), "not finite .*: 2.weight"),
    (changed(**{"2_weight": NAN, "0_bias": torch.tensor([float("inf"), 0])}), "not finite .*: 0.bias, 2.weight"),
    (changed(**{"2_weight": torch.ones(3, 2)}), "does not fit this model: wrong shape 2.weight"),
    (renamed(two_layers().state_dict(), lambda key: "encoder." * key.startswith("0") + "x." + key),
     "looks like another model's"),
])
def test_what_cannot_be_used_is_one_line_that_names_it(state, said, tmp_path):
    model, before = two_layers(), two_layers().state_dict()
    with pytest.raises(UserError, match=said) as error:
        load_model_state(model, state, "x.pth")
    assert str(error.value).startswith("x.pth") and len(str(error.value)) < 300
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for content in (state, {"state_dict": state}) if said.startswith("0.weight") else ():
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"x.pth: .*{said}"):
            describe(load_artifact(tmp_path / "x.pth"))


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="this PyTorch makes no quantised tensors")
def test_quantised_weights_are_named():
    with pytest.raises(UserError, match="x.pth: 0.weight is of type qint8"):
        load_model_state(two_layers(), changed(**{"0_weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0,
                                                                                       torch.qint8)}), "x.pth")


@pytest.mark.parametrize("name", ["bn1.running_var", "bn1.running_mean", "layer1.0.conv1.weight_orig"])
def test_statistics_and_weights_that_are_not_finite_are_refused_at_load(name, run, tmp_path):
    state = resnet(0.5).state_dict()
    state[name][(0,) * state[name].dim()] = float("nan") if "mean" in name else float("inf")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"not finite.*: {name}$"):
        stage1.load_outcome(run, tmp_path / "x.pth")


def test_a_module_of_the_model_that_is_named_like_a_prefix_stays():
    model, other = nn.ModuleDict({"net": nn.Linear(2, 2)}), nn.ModuleDict({"net": nn.Linear(2, 2)})
    load_model_state(model, renamed(other.state_dict(), lambda key: f"encoder.module.{key}"))
    assert torch.equal(model["net"].weight, other["net"].weight)


class Attention(nn.Module):
    """A user's own model with attention over 4 positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_attention_is_left_out_of_pruning_and_keeps_learning():
    torch.manual_seed(0)
    model = Attention()
    assert list(prunable_layers(model)) == ["embed", "head"]
    add_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.attention.out_proj.weight.detach().clone()
    inputs, outputs = torch.randn(2, 4, 3), []
    for _ in range(2):
        outputs.append(model(inputs))
        optimizer.zero_grad()
        outputs[-1].square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.attention.out_proj.weight, before) and model.attention.out_proj.weight.grad is not None
    other = Attention()
    load_model_state(other, model.state_dict())
    assert torch.equal(other(inputs), model(inputs))


def test_a_saved_model_can_be_pruned_by_pytorch_itself(tmp_path):
    """As the README says: a dense copy in contiguous format."""
    checkpoint.save_checkpoint(resnet(0.5).state_dict(), tmp_path / "a.pth")
    model = model_loader("resnet20")
    load_model_state(model, checkpoint.load_checkpoint(tmp_path / "a.pth"))
    remove_masks(model)
    model = model.to(memory_format=torch.contiguous_format)
    prune.global_unstructured([(layer, "weight") for layer in prunable_layers(model).values()],
                              pruning_method=prune.L1Unstructured, amount=0.9)
    assert count_pruned_params(model).sparsity == pytest.approx(0.9, abs=1e-5)
    model(torch.randn(1, 3, 32, 32))
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    assert torch.equal(clone_model(model).conv1.weight, model.conv1.weight)


def test_guessing_takes_any_form():
    state = resnet().state_dict()
    foreign = renamed(old_style(state), lambda key: "_orig_mod.module." + key)
    assert guess_model(model_state(foreign, "x")) == ("resnet20", 10)
    assert guess_model({}) is None


@pytest.mark.parametrize("classes", [3, inspection.ANY, 100_000])
def test_any_number_of_classes_is_guessed_without_a_model_of_so_many(classes, monkeypatch):
    monkeypatch.setattr(inspection, "MODELS", ["resnet20", "alexnet"])
    inspection._layout.cache_clear()
    made = []
    monkeypatch.setattr(inspection, "model_loader", lambda *args, **options: made.append(options["num_classes"]) or
                        model_loader(*args, **options))
    for name in inspection.MODELS:
        state = model_loader(name, seed=0).state_dict()
        weight = [key for key, value in state.items() if value.dim() == 2][-1]
        width = state[weight].shape[1]
        state |= {weight: torch.zeros(1).expand(classes, width),
                  weight.replace("weight", "bias"): torch.zeros(1).expand(classes)}
        assert guess_model(state) == (name, classes)
        assert guess_model({**state, weight: torch.zeros(1).expand(classes, width + 1)}) is None
    assert guess_model({"w.weight": torch.zeros(2**62, 0)}) is None
    assert made == [inspection.ANY] * 2


def test_a_small_file_of_absurdly_many_classes_is_described_and_no_layer_made(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MODELS", ["resnet20"])
    assert guess_model(resnet().state_dict()) == ("resnet20", 10)  # its layout is known from here on
    torch.save({"w.weight": torch.zeros(1).expand(2**25, 1)}, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 3000
    monkeypatch.setattr(nn.Linear, "__init__", lambda *_, **__: pytest.fail("a layer is made"))
    description = describe(load_artifact(tmp_path / "x.pth"))
    assert "model" in description and description["model"] is None and description["weights"] == 2**25


# --- entries beside the weights ------------------------------------------------------------------------------------


def holding_itself() -> dict:
    content = {"a": {}}
    content["a"] |= {"again": content, "and again": [content]}
    return content


def nested(levels: int) -> dict:
    content = {}
    for _ in range(levels):
        content = {"a": content}
    return content


@pytest.mark.parametrize("args, said", [(np.zeros(3), "float64 (3,)"), (torch.zeros(3), "float32 (3,)"),
                                        (np.float32(2.5), 2.5), ({"lr": np.ones(1)}, {"lr": 1.0}), ([], None)])
def test_arguments_of_any_type_are_shown(args, said, tmp_path):
    torch.save({"net": resnet().state_dict(), "args": args}, tmp_path / "x.pth")
    for card in ({}, {"sha256": checkpoint.file_digest(tmp_path / "x.pth"), "val_acc": 50.0}):
        checkpoint.save_json(card, tmp_path / "x.json")
        assert describe(load_artifact(tmp_path / "x.pth")).get("arguments") == said


@pytest.mark.parametrize("entry", [holding_itself(), nested(40), nested(400)])
def test_entries_without_end_are_one_line_and_an_input_without_end_is_none(entry, tmp_path):
    torch.save({"net": resnet().state_dict(), "input": entry}, tmp_path / "x.pth")
    description = describe(load_artifact(tmp_path / "x.pth"))
    assert description["model"] == "resnet20" and "input" not in description
    torch.save({"net": resnet().state_dict(), "args": entry}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth looks like a dense checkpoint but is damaged: .*too deeply") as error:
        describe(load_artifact(tmp_path / "x.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("levels", range(25, 36))
def test_entries_are_shown_down_to_some_level(levels, tmp_path):
    for name in ("input", "args"):
        torch.save({"net": resnet().state_dict(), name: nested(levels)}, tmp_path / "x.pth")
        with contextlib.suppress(UserError):
            inspection.render(describe(load_artifact(tmp_path / "x.pth")))
