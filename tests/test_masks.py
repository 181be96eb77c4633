"""Masks of a model: put on, set, read, counted, cloned, loaded, and held against the optimizer."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from utils.analysis_utils import (
    add_masks,
    clone_model,
    count_pruned_params,
    empty_layers,
    get_masks,
    has_masks,
    hold_pruned_weights,
    hold_weights,
    layer_sparsity,
    prunable_layers,
    remove_masks,
    set_masks,
)
from utils.common import UserError
from utils.model_loader import load_model_state


def small_model(seed: int = 0, hidden: int = 4) -> nn.Sequential:
    """Prunable: conv '0' (1 -> hidden channels, 3x3) and linear '4' (hidden -> 3)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(hidden, 3),
        )


def images(n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, 5, 5, generator=torch.Generator().manual_seed(seed))


def half_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every second weight pruned."""
    return {name: (torch.arange(mask.numel()) % 2 == 0).view(mask.shape) for name, mask in get_masks(model).items()}


def pruned_model(seed: int = 0) -> nn.Sequential:
    model = small_model(seed)
    set_masks(model, half_masks(model))
    return model


def test_prunable_layers_are_convolutions_and_linears_in_order():
    model = small_model()
    assert prunable_layers(model) == {"0": model[0], "4": model[4]}
    layer = nn.Linear(2, 2)
    assert prunable_layers(layer) == {"": layer}


def test_add_masks_changes_form_but_not_function():
    model = small_model().eval()
    before, weight = model(images()), model[0].weight
    assert not has_masks(model)
    add_masks(model)
    assert has_masks(model)
    assert model[0].weight_orig is weight  # the same parameter: an optimizer made before still trains it
    assert [key for key in model.state_dict() if key.startswith("0.")] == ["0.bias", "0.weight_orig", "0.weight_mask"]
    assert torch.equal(model(images()), before)
    add_masks(model)  # again: nothing changes
    assert sum(key.endswith("_orig") for key in model.state_dict()) == 2


def test_add_masks_keeps_masks_that_are_there():
    model = pruned_model()
    add_masks(model)
    assert count_pruned_params(model).pruned == 24


def test_set_masks_zeroes_weights_at_once_and_in_place():
    model = small_model()
    add_masks(model)
    buffer = model[0].weight_mask
    set_masks(model, half_masks(model))
    assert model[0].weight_mask is buffer
    assert torch.equal(model[0].weight, model[0].weight_orig * half_masks(model)["0"])
    set_masks(model, {"4": torch.zeros(3, 4)})  # only one: the other keeps its own
    assert layer_sparsity(model) == {"0": 0.5, "4": 1.0}


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [("0", torch.full((4, 1, 3, 3), 0.5), "values other than 0 and 1"), ("4", torch.ones(4, 3), r"\(4, 3\) instead"),
     ("9", torch.ones(1), "no such prunable layer"), ("0", torch.full((4, 1, 3, 3), torch.nan), "values other")],
)
def test_set_masks_refuses_bad_masks_and_changes_nothing(name, mask, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        set_masks(model, {"4": torch.zeros(3, 4), name: mask})
    assert not has_masks(model)


def test_get_masks_is_a_copy_and_all_true_without_masks():
    assert all(mask.all() and mask.dtype == torch.bool for mask in get_masks(small_model()).values())
    model = pruned_model()
    get_masks(model)["0"].fill_(False)
    assert empty_layers(model) == []


def test_remove_masks_is_permanent_and_restores_the_dense_form():
    model = pruned_model().eval()
    output, parameter = model(images()), model[0].weight_orig
    remove_masks(model)
    assert not has_masks(model) and model[0].weight is parameter
    assert list(model.state_dict()) == list(small_model().state_dict())
    assert torch.equal(model(images()), output)
    assert model[0].weight.flatten()[1::2].eq(0).all() and model[0].weight.flatten()[::2].ne(0).all()
    remove_masks(model)  # nothing left to do


def test_counts_and_sparsities():
    model = small_model()
    assert count_pruned_params(model) == (48, 48, 0)  # 4*1*3*3 + 3*4
    mask = torch.zeros(4, 1, 3, 3)
    mask[0, 0, 0, :3] = 1
    set_masks(model, {"0": mask})
    assert count_pruned_params(model) == (48, 15, 33)  # 3 of 36 and all 12
    assert count_pruned_params(model).sparsity == 33 / 48
    assert layer_sparsity(model) == pytest.approx({"0": 33 / 36, "4": 0.0})
    assert empty_layers(model) == []
    set_masks(model, {"0": torch.zeros_like(mask)})
    assert empty_layers(model) == ["0"]
    assert count_pruned_params(nn.ReLU()).sparsity == 0.0


# ---- clone ----------------------------------------------------------------------------------------------------------


def test_a_pruned_model_that_has_run_forward_can_be_cloned():
    model = pruned_model()
    model(images()).sum().backward()
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    clone = clone_model(model)
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers(), *(m.weight for m in (model[0], model[4]))]}
    theirs = [*clone.parameters(), *clone.buffers(), clone[0].weight, clone[4].weight]
    assert not own & {t.data_ptr() for t in theirs}
    assert torch.equal(clone.eval()(images()), model.eval()(images()))


def test_the_clone_prunes_with_its_own_masks():
    model = pruned_model()
    model(images())
    clone = clone_model(model)
    set_masks(clone, {"0": torch.zeros(4, 1, 3, 3)})
    clone(images())
    model(images())
    assert clone[0].weight.eq(0).all() and model[0].weight.flatten()[::2].ne(0).all()
    with torch.no_grad():
        clone[4].weight_orig.fill_(7.0)
    clone(images()).sum().backward()
    assert torch.equal(clone[4].weight, 7.0 * half_masks(clone)["4"])
    assert clone[4].weight_orig.grad is not None and model[4].weight_orig.grad is None


def test_a_dense_model_can_be_cloned():
    model = small_model()
    clone = clone_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), clone.state_dict().values(), strict=True))


# ---- load -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_form", [small_model, pruned_model])
@pytest.mark.parametrize("target_form", [small_model, pruned_model])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_loading_brings_the_model_into_the_form_of_the_state(source_form, target_form, prefix):
    source, target = source_form(1), target_form(2)
    source(images())
    load_model_state(target, {prefix + key: value for key, value in source.state_dict().items()})
    assert has_masks(target) == has_masks(source)
    assert torch.equal(target[0].weight, source[0].weight)  # before any forward pass
    assert torch.equal(target.eval()(images()), source.eval()(images()))


@pytest.mark.parametrize("pruned", [False, True])
def test_a_layer_in_two_places_is_one_and_loads_under_both_names(pruned):
    def model() -> nn.Sequential:
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.ReLU(), layer)

    source, target = model(), model()
    if pruned:
        set_masks(source, half_masks(source))
    assert {key.partition(".")[0] for key in source.state_dict()} == {"0", "2"}
    load_model_state(target, source.state_dict())
    assert count_pruned_params(target) == count_pruned_params(source) == (9, *((5, 4) if pruned else (9, 0)))
    assert target[0] is target[2] and torch.equal(target[0].weight, source[0].weight)


def test_an_optimizer_survives_loading_in_another_form():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load_model_state(model, pruned_model(1).state_dict())
    model(images()).sum().backward()
    before = model[0].weight_orig.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight_orig, before)


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (nn.Linear(2, 2).state_dict(), "missing 0.weight, 4.weight, 0.bias and 6 more; unexpected weight, bias$"),
        (without(small_model().state_dict(), "4.weight"), "missing 4.weight$"),
        (small_model().state_dict() | {"5.weight": torch.ones(1)}, "unexpected 5.weight$"),
        (small_model(hidden=5).state_dict(),
         r"wrong shape 0.weight \(5, 1, 3, 3\) instead of \(4, 1, 3, 3\), 4.weight .* more$"),
        (without(pruned_model().state_dict(), "4.weight_mask"), "missing 4.weight_mask$"),
    ],
)
@pytest.mark.parametrize("form", [small_model, pruned_model])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(form, state, message):
    model = form(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"best.pth does not fit this model.*: .*{message}") as error:
        load_model_state(model, state, source="best.pth")
    assert "\n" not in str(error.value) and ("another model's" in str(error.value)) == ("unexpected weight" in message)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_states_that_are_none_and_masks_that_are_not_binary_are_refused():
    model = small_model()
    for bad in ([1, 2], {"0.weight": 3}, {}):
        with pytest.raises(UserError, match="x.pth holds no model weights"):
            load_model_state(model, bad, source="x.pth")
    state = pruned_model().state_dict()
    state["4.weight_mask"] = torch.full((3, 4), 0.5)
    with pytest.raises(UserError, match="other than 0 and 1: 4.weight_mask"):
        load_model_state(model, state)
    assert not has_masks(model)


# ---- hold -----------------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(seed=step)), torch.arange(8) % 3).backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-2, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_do_not_move_and_active_ones_do(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # momentum is under way when the weights are pruned
    set_masks(model, half_masks(model))
    handle = hold_pruned_weights(model, optimizer)
    before = [layer.weight_orig.detach().clone() for layer in prunable_layers(model).values()]
    train(model, optimizer)
    for layer, old in zip(prunable_layers(model).values(), before, strict=True):
        active = layer.weight_mask.bool()
        assert torch.equal(layer.weight_orig[~active], old[~active])
        assert (layer.weight_orig[active] != old[active]).all()
    handle.remove()
    train(model, optimizer, steps=1)
    layer, old = model[4], before[1]
    assert not torch.equal(layer.weight_orig[~layer.weight_mask.bool()], old[~layer.weight_mask.bool()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_single_weights_can_be_held_in_any_parameter(dtype):
    model = small_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    keep = torch.tensor([1, 0, 1], dtype=dtype)
    before = model[4].bias.detach().clone()
    hold_weights(optimizer, [(model[4].bias, keep)])
    keep.fill_(1)  # what was asked for counts, not what becomes of the tensor
    train(model, optimizer)
    assert (model[4].bias != before).tolist() == [True, False, True]


def test_without_masks_nothing_is_held():
    model = small_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = hold_pruned_weights(model, optimizer)
    before = model[4].weight.detach().clone()
    train(model, optimizer, steps=1)
    assert (model[4].weight != before).all()
    handle.remove()
