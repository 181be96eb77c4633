"""Regrowth: selections and values worked out by hand on tiny tensors, and properties over random models."""
from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import regrowth
from utils.analysis_utils import add_masks, clone_model, count_pruned_params, get_masks, prunable_layers, set_masks
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.common import UserError
from utils.regrowth import (
    FILL,
    INITIALISERS,
    SELECTORS,
    Evidence,
    ReferenceBasedRegrowth,
    RegrowthRecord,
    SaliencyBasedRegrowth,
    SaliencyComputer,
    WeightRegrowth,
    layer_capacities,
    reference_magnitudes,
    regrowth_budget,
    target_layers,
)


def one_linear(weight: list[list[float]], mask: list[list[int]] | None = None) -> nn.Sequential:
    """A model of one Linear layer, called '0', without bias."""
    model = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weight))
    if mask is not None:
        set_masks(model, {"0": torch.tensor(mask)})
    return model


def pruned_copy(model: nn.Module, seed: int = 0, density: float = 0.1) -> nn.Module:
    """A copy with random masks."""
    copy, rng = clone_model(model), torch.Generator().manual_seed(seed)
    set_masks(copy, {name: torch.rand(layer.weight.shape, generator=rng) < density
                     for name, layer in prunable_layers(model).items()})
    return copy


def evidence_for(model: nn.Module, reference: nn.Module, seed: int = 0) -> Evidence:
    rng = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(layer.weight.shape, generator=rng) for name, layer in prunable_layers(model).items()}
    return Evidence(saliency=scores, gradient=scores, reference=reference)


def random_allocation(model: nn.Module, seed: int) -> dict[str, int]:
    pick, capacities = random.Random(seed), layer_capacities(model, target_layers(model))
    return {name: pick.choice([0, 1, pick.randint(0, capacity), capacity]) for name, capacity in capacities.items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything regrowth may change, `weight` included."""
    return {**{key: value.clone() for key, value in model.state_dict().items()},
            **{f"{name}.weight": layer.weight.detach().clone() for name, layer in prunable_layers(model).items()}}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal bit for bit: the sign of a zero counts."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value.view(torch.int32) if value.dtype == torch.float32 else value,
                           second[key].view(torch.int32) if value.dtype == torch.float32 else second[key]), key


@pytest.fixture
def dense(small_cnn: nn.Module) -> nn.Module:
    return small_cnn.to(memory_format=torch.channels_last)


# ---- targets, capacity, budget -------------------------------------------------------------------------------------


def test_target_layers_by_name_and_pattern_in_model_order(dense):
    assert target_layers(dense) == ["0", "4", "8"]
    assert target_layers(dense, ["8", "[04]"]) == ["0", "4", "8"]
    assert target_layers(dense, ["4"]) == ["4"]
    with pytest.raises(UserError, match=r"'7'.*0, 4, 8"):
        target_layers(dense, ["0", "7"])


def test_capacity_is_the_number_of_pruned_weights():
    model = one_linear([[1.0, 2.0], [3.0, 4.0]], [[1, 0], [0, 0]])
    assert layer_capacities(model, ["0"]) == {"0": 3}
    with pytest.raises(ValueError, match="'1'.*0"):
        layer_capacities(model, ["1"])


def pruned_to(surviving: int, total: int) -> nn.Module:
    return one_linear([[1.0] * total], [[1] * surviving + [0] * (total - surviving)])


@pytest.mark.parametrize(("target", "budget"), [(0.97, 20), (0.98, 10), (0.9895, 0), (0.0, 990), (0.985, 5)])
def test_the_target_sparsity_is_hit_exactly(target, budget):
    model = pruned_to(10, 1000)  # round(0.015 * 1000) = 15 survive at 0.985, so 5 return
    if budget == 0:
        with pytest.raises(UserError, match="less than one"):
            regrowth_budget(model, target_sparsity=target)
    else:
        assert regrowth_budget(model, target_sparsity=target) == budget


def test_the_step_is_a_fraction_of_all_weights_and_may_exceed_what_is_pruned():
    assert regrowth_budget(pruned_to(10, 1000), regrow_step=0.02) == 20
    assert regrowth_budget(pruned_to(900, 1000), regrow_step=0.5) == 500
    assert regrowth_budget(pruned_to(10, 1000), regrow_step=0.5, steps=2) == 500  # the second gets what is left


def test_the_budget_is_rounded_to_the_nearest_not_down():
    # N = 10: (1 - 0.72) * 10 = 2.8, so 3 survive and 2 return; at 0.78 2.2, so 2 survive and 1 returns
    assert regrowth_budget(pruned_to(1, 10), target_sparsity=0.72) == 2
    assert regrowth_budget(pruned_to(1, 10), target_sparsity=0.78) == 1
    assert [regrowth_budget(pruned_to(1, 10), regrow_step=step) for step in (0.06, 0.14, 0.28)] == [1, 1, 3]


@pytest.mark.parametrize(("wish", "message"), [({"target_sparsity": 0.99}, "0.99 is not below"),
                                               ({"target_sparsity": -0.1}, "-0.1"), ({"regrow_step": 0.0}, "0.0 must"),
                                               ({"regrow_step": 1.5}, "1.5 must"),
                                               ({"regrow_step": 0.0001}, "less than one"),
                                               ({"regrow_step": 0.5, "steps": 3}, "3 steps of 0.5 are too many")])
def test_a_wish_that_cannot_be_met_is_a_user_error(wish, message):
    with pytest.raises(UserError, match=message):
        regrowth_budget(pruned_to(10, 1000), **wish)


def test_budget_needs_a_pruned_model_and_one_wish():
    with pytest.raises(UserError, match="nothing is pruned"):
        regrowth_budget(one_linear([[1.0]]), regrow_step=0.5)
    for wishes in ({}, {"target_sparsity": 0.5, "regrow_step": 0.1}):
        with pytest.raises(ValueError, match="either"):
            regrowth_budget(pruned_to(1, 10), **wishes)


# ---- saliency ------------------------------------------------------------------------------------------------------


def linear_batches() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 3, generator=rng), torch.randint(2, (size,), generator=rng)) for size in (4, 4, 2)]


def closed_form_gradients(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of mean cross-entropy with respect to W of logits = x W^T: (softmax - onehot)^T x / B, per batch."""
    return torch.stack([(torch.softmax(x @ weight.T, 1) - F.one_hot(y, 2)).T @ x / len(x) for x, y in batches])


def test_saliency_and_gradients_of_a_linear_model_in_closed_form():
    weight = [[1.0, -2.0, 0.5], [0.25, 0.0, -1.0]]
    computer = SaliencyComputer(one_linear(weight), linear_batches())
    saliency = computer.compute()["0"]
    gradients = closed_form_gradients(torch.tensor(weight), linear_batches())
    torch.testing.assert_close(saliency, (gradients**2).mean(0) * torch.tensor(weight) ** 2)
    torch.testing.assert_close(computer.evidence()["gradient"]["0"], gradients.mean(0).abs())
    assert saliency[1, 1] == 0  # theta = 0


def test_pruned_source_uses_the_gradient_of_the_effective_weight_and_weight_orig():
    weight, mask = [[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], [[1, 0, 0], [0, 1, 0]]
    saliency = SaliencyComputer(one_linear(weight, mask), linear_batches(), source="pruned").compute()["0"]
    gradients = closed_form_gradients(torch.tensor(weight) * torch.tensor(mask), linear_batches())
    torch.testing.assert_close(saliency, (gradients**2).mean(0) * torch.tensor(weight) ** 2)
    assert (saliency > 0).all()  # pruned positions too


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
def test_a_layer_that_runs_twice_has_the_gradient_of_both_calls(mask):
    layer = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    plain = clone_model(model)
    plain[0].weight.data.mul_(mask)
    if not mask.all():
        set_masks(model, {"0": mask})
    inputs, targets = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0, 1])
    F.cross_entropy(plain(inputs), targets).backward()
    computer = SaliencyComputer(model, [(inputs, targets)], source="dense" if mask.all() else "pruned")
    torch.testing.assert_close(computer.evidence()["gradient"], {"0": plain[0].weight.grad.abs()})


def test_a_parameter_that_is_used_without_its_layer_has_its_gradient():
    class Tied(nn.Module):
        """logits = W^T W x."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

        def forward(self, inputs):
            return self.layer(inputs) @ self.layer.weight

    model, inputs, targets = Tied(), torch.tensor([[1.0, -2.0]]), torch.tensor([1])
    F.cross_entropy(model(inputs), targets).backward()
    found = SaliencyComputer(model, [(inputs, targets)]).evidence()["gradient"]["layer"]
    torch.testing.assert_close(found, model.layer.weight.grad.abs())


@pytest.mark.parametrize("source", ["dense", "pruned"])
def test_saliency_agrees_with_a_loop_over_batches(dense, tiny_loaders, source):
    model = dense if source == "dense" else pruned_copy(dense)
    batches = list(tiny_loaders[0].unaugmented(40))[:2]
    found = SaliencyComputer(model, tiny_loaders[0].unaugmented(40), max_batches=2, source=source).compute()
    plain = clone_model(dense).eval()  # the effective weights as ordinary parameters
    for name, layer in prunable_layers(plain).items():
        layer.weight.data.mul_(get_masks(model)[name])
    sums = dict.fromkeys(found, 0.0)
    for inputs, targets in batches:
        plain.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        sums = {name: total + plain.get_submodule(name).weight.grad ** 2 for name, total in sums.items()}
    for name, layer in prunable_layers(dense).items():
        torch.testing.assert_close(found[name], sums[name] / 2 * layer.weight.detach() ** 2)


@pytest.mark.parametrize("source", ["dense", "pruned"])
def test_a_layer_that_is_never_run_has_saliency_zero(source):
    model = one_linear([[1.0, -2.0, 0.5], [0.25, 0.0, -1.0]])
    model[0].register_module("unused", nn.Linear(3, 4))
    model = model if source == "dense" else pruned_copy(model, density=0.5)
    saliency = SaliencyComputer(model, linear_batches(), source=source).compute()
    assert torch.equal(saliency["0.unused"], torch.zeros(4, 3)) and saliency["0"].any()


def test_saliency_leaves_the_model_as_it_was(dense, tiny_loaders):
    dense.train()
    dense[1].eval()
    dense[4].weight.grad = torch.ones_like(dense[4].weight)
    before = state_of(dense)
    with torch.no_grad():  # the caller's grad mode does not matter
        SaliencyComputer(dense, tiny_loaders[0].unaugmented(64), precision="bf16").compute()
    assert_same(before, state_of(dense))
    assert dense[0].training and dense.training and not dense[1].training
    assert dense[0].weight.grad is None and (dense[4].weight.grad == 1).all()


def test_max_batches_bounds_the_pass_and_bad_arguments_are_refused(dense):
    def endless():
        while True:
            yield torch.randn(2, 3, 32, 32), torch.tensor([0, 1])

    assert set(SaliencyComputer(dense, endless(), max_batches=2).compute()) == {"0", "4", "8"}
    for arguments, message in (({"source": "pruned"}, "is dense"), ({"source": "else"}, "else"),
                               ({"max_batches": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            SaliencyComputer(dense, endless(), **arguments)
    with pytest.raises(ValueError, match="is pruned"):
        SaliencyComputer(pruned_copy(dense), endless())
    with pytest.raises(ValueError, match="no batch"):
        SaliencyComputer(dense, []).compute()


# ---- selection by each rule, by hand ---------------------------------------------------------------------------------

WEIGHT = [[9.0, -4.0, 1.0], [-2.0, 3.0, 0.5]]  # weight_orig; flat positions 0 and 4 are active
MASK = [[1, 0, 0], [0, 1, 0]]
SCORES = torch.tensor([[7.0, 1.0, 5.0], [2.0, 8.0, -6.0]])
REFERENCE = [[0.0, 0.1, -0.9], [0.2, 5.0, 0.3]]


@pytest.mark.parametrize(("rule", "two", "three"), [
    ("saliency", [2, 3], [1, 2, 3]),  # 5, 2, 1; the -6 is last
    ("gradient", [2, 5], [2, 3, 5]),  # |-6|, 5, 2
    ("magnitude", [1, 3], [1, 2, 3]),  # |-4|, |-2|, 1, 0.5
    ("reference", [2, 5], [2, 3, 5]),  # 0.9, 0.3, 0.2, 0.1
])
def test_a_rule_takes_its_best_pruned_positions(rule, two, three):
    for count, expected in ((2, two), (3, three)):
        model = one_linear(WEIGHT, MASK)
        evidence = Evidence(saliency={"0": SCORES}, gradient={"0": SCORES}, reference=one_linear(REFERENCE))
        record = WeightRegrowth(model, rule, evidence).apply_regrowth({"0": count})
        assert record.layers["0"].indices.tolist() == expected
        assert get_masks(model)["0"].reshape(-1).nonzero()[:, 0].tolist() == sorted([0, 4, *expected])
        assert [record.source_names[code] for code in record.layers["0"].sources] == [rule] * count


def test_a_pruned_reference_fills_the_rest_at_random_and_copies_what_it_has():
    reference = one_linear(REFERENCE, [[1, 0, 1], [0, 1, 1]])  # active in it and pruned here: 2 and 5
    model = one_linear(WEIGHT, MASK)
    record = ReferenceBasedRegrowth(model, reference, seed=1).apply_regrowth({"0": 3})
    layer = record.layers["0"]
    sources = {index: record.source_names[code] for index, code in zip(layer.indices.tolist(), layer.sources.tolist())}
    filled = next(index for index, source in sources.items() if source == FILL)
    assert sources == {2: "reference", 5: "reference", filled: FILL} and filled in (1, 3) and record.filled == 1
    written = model[0].weight_orig.reshape(-1)
    assert written[[2, 5]].tolist() == torch.tensor([-0.9, 0.3]).tolist()
    assert written[filled] != 0 and written[filled] != REFERENCE[filled // 3][filled % 3]  # Kaiming: nothing to copy
    one_only = ReferenceBasedRegrowth(one_linear(WEIGHT, MASK), reference).apply_regrowth({"0": 1})
    assert one_only.layers["0"].indices.tolist() == [2]


def test_magnitudes_computed_once_change_nothing(dense):
    start = pruned_copy(dense)
    records = [ReferenceBasedRegrowth(clone_model(start), dense, magnitudes=known).apply_regrowth({"0": 5, "4": 9})
               for known in (None, reference_magnitudes(dense))]
    for name in ("0", "4"):
        assert torch.equal(records[0].layers[name].indices, records[1].layers[name].indices)
        assert torch.equal(records[0].layers[name].values, dense.get_submodule(name).weight.flatten()[
            records[0].layers[name].indices].detach())


def test_the_random_fill_depends_on_the_seed():
    reference = one_linear([[1.0] * 200], [[0] * 200])
    filled = [ReferenceBasedRegrowth(one_linear([[1.0] * 200], [[0] * 200]), reference, seed=seed)
              .apply_regrowth({"0": 20}).layers["0"].indices.tolist() for seed in (0, 0, 1)]
    assert filled[0] == filled[1] != filled[2]


@pytest.mark.parametrize("count", range(7))
def test_all_equal_scores_give_exactly_k_lowest_positions(count):
    model = one_linear([[0.0] * 3, [0.0] * 3], [[0] * 3] * 2)
    record = SaliencyBasedRegrowth(model, {"0": torch.zeros(2, 3)}).apply_regrowth({"0": count})
    assert record.count == count
    assert get_masks(model)["0"].reshape(-1).tolist() == [True] * count + [False] * (6 - count)


def test_a_new_rule_is_one_function_and_one_line(monkeypatch):
    def smallest(name: str, layer: nn.Module, evidence: Evidence) -> regrowth.Ranking:
        return regrowth.Ranking(-layer.weight_orig.abs(), layer.weight_mask)

    monkeypatch.setitem(SELECTORS, "smallest", smallest)
    record = WeightRegrowth(one_linear(WEIGHT, MASK), "smallest", Evidence()).apply_regrowth({"0": 2})
    assert record.layers["0"].indices.tolist() == [2, 5]
    assert {record.source_names[code] for code in record.layers["0"].sources} == {"smallest"}


@pytest.mark.parametrize("rule", list(SELECTORS))
@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_allocation_returns_and_only_pruned_weights(dense, rule, seed):
    model, reference = pruned_copy(dense, seed, 0.15), pruned_copy(dense, seed + 100, 0.4)
    before, allocation = get_masks(model), random_allocation(model, seed)
    record = WeightRegrowth(model, rule, evidence_for(dense, reference, seed)).apply_regrowth(allocation)
    after = get_masks(model)
    assert record.count == sum(allocation.values())
    assert record.allocation == {name: count for name, count in allocation.items() if count}
    for name, count in allocation.items():
        assert (after[name] & ~before[name]).sum() == count and (after[name] | ~before[name]).all()
        assert torch.equal(record.masks(model)[name], after[name] & ~before[name])


def test_the_budget_leads_to_the_target_sparsity(dense):
    model = pruned_copy(dense, density=0.05)
    left, allocation = regrowth_budget(model, target_sparsity=0.8), {}
    for name, capacity in layer_capacities(model, target_layers(model)).items():
        allocation[name] = min(left, capacity)
        left -= allocation[name]
    WeightRegrowth(model, "random", Evidence()).apply_regrowth(allocation)
    assert count_pruned_params(model).surviving == 190  # round(0.2 * 952)


# ---- initial values --------------------------------------------------------------------------------------------------


def regrow(dense: nn.Module, init_strategy: str, seed: int = 0,
           order: Callable = list) -> tuple[nn.Module, RegrowthRecord]:
    model = pruned_copy(dense)
    allocation = {name: capacity // 2 for name, capacity in layer_capacities(model, target_layers(model)).items()}
    allocation = {name: allocation[name] for name in order(allocation)}
    regrower = WeightRegrowth(model, "random", Evidence(reference=dense), init_strategy, seed)
    return model, regrower.apply_regrowth(allocation)


@pytest.mark.parametrize("init_strategy", list(INITIALISERS))
def test_every_regrown_position_holds_its_value(dense, init_strategy):
    dense[4].weight.data[:] += 1.0
    start = pruned_copy(dense)
    with torch.no_grad():  # weight_orig of the pruned model is not the reference's
        for layer in prunable_layers(start).values():
            layer.weight_orig.mul_(-3.0)
    start.eval()(torch.zeros(1, 3, 32, 32))  # so that `weight` follows
    model = clone_model(start)
    evidence = Evidence(reference=dense)
    allocation = {"0": 120, "4": 400, "8": 77}
    record = WeightRegrowth(model, "random", evidence, init_strategy).apply_regrowth(allocation)
    for name, layer in prunable_layers(model).items():
        regrown, original = record.masks(model)[name], start.get_submodule(name)
        expected = {"zero": torch.zeros_like(layer.weight), "magnitude": original.weight_orig.detach(),
                    "reference": dense.get_submodule(name).weight.detach()}.get(init_strategy)
        if expected is None:  # what was drawn, in the order of the flat indices
            expected = torch.zeros(layer.weight.numel()).index_copy(0, record.layers[name].indices,
                                                                    record.layers[name].values).view(layer.weight.shape)
            assert (expected[regrown] != 0).all()
        assert torch.equal(layer.weight_orig[regrown], expected[regrown])
        assert torch.equal(layer.weight[regrown], expected[regrown])  # already before a forward pass
        assert torch.equal(layer.weight_orig[~regrown], original.weight_orig[~regrown])
        assert torch.equal(layer.weight_mask, original.weight_mask + regrown)
    before = {name: layer.weight.detach().clone() for name, layer in prunable_layers(model).items()}
    model(torch.zeros(1, 3, 32, 32))
    for name, layer in prunable_layers(model).items():
        assert torch.equal(layer.weight, before[name])


@pytest.mark.parametrize(("init_strategy", "variance"), [("kaiming", 2 / (64 * 9)), ("xavier", 2 / (64 * 9 + 32 * 9))])
def test_drawn_values_have_the_fan_of_the_dense_layer(init_strategy, variance):
    model = nn.Sequential(nn.Conv2d(64, 32, 3, bias=False)).to(memory_format=torch.channels_last)
    set_masks(model, {"0": torch.zeros(32, 64, 3, 3)})
    values = WeightRegrowth(model, "random", Evidence(), init_strategy).apply_regrowth({"0": 18_000}).layers["0"].values
    assert values.var().item() == pytest.approx(variance, rel=0.05)  # 5 standard deviations of the sample variance
    assert values.mean().abs() < 5 * (variance / 18_000) ** 0.5


def test_grouped_convolutions_have_the_fan_of_their_own_tensor():
    model = nn.Sequential(nn.Conv2d(512, 512, 3, groups=512, bias=False))
    set_masks(model, {"0": torch.zeros(512, 1, 3, 3)})
    values = WeightRegrowth(model, "random", Evidence(), "kaiming").apply_regrowth({"0": 4608}).layers["0"].values
    assert values.var().item() == pytest.approx(2 / 9, rel=0.12)


@pytest.mark.parametrize("wrong", [lambda site: 0.5, lambda site: site.previous[:1],
                                   lambda site: site.previous[:, None]])
def test_an_initialiser_that_gives_no_value_for_every_weight_is_refused(dense, wrong, monkeypatch):
    monkeypatch.setitem(INITIALISERS, "wrong", wrong)
    model = pruned_copy(dense)
    before = state_of(model)
    regrowth = WeightRegrowth(model, "random", Evidence(), "wrong")
    with pytest.raises(ValueError, match="initialisation 'wrong' has to give a tensor of shape"):
        regrowth.apply_regrowth({name: 2 for name in prunable_layers(model)})
    assert_same(before, state_of(model))


@pytest.mark.parametrize("init_strategy", list(INITIALISERS))
def test_the_seed_decides_and_the_order_of_layers_does_not(dense, init_strategy):
    model, record = regrow(dense, init_strategy)
    again, _ = regrow(dense, init_strategy, order=lambda names: sorted(names, reverse=True))
    assert_same(state_of(model), state_of(again))
    other, _ = regrow(dense, init_strategy, seed=1)
    assert not torch.equal(model[4].weight_mask, other[4].weight_mask)
    alone = pruned_copy(dense)
    WeightRegrowth(alone, "random", Evidence(reference=dense), init_strategy).apply_regrowth(
        {"4": record.allocation["4"]})
    assert torch.equal(alone[4].weight_orig, model[4].weight_orig)


def test_the_memory_format_does_not_matter(dense):
    plain = clone_model(dense).to(memory_format=torch.contiguous_format)
    for rule in SELECTORS:
        results = []
        for base in (dense, plain):
            model = pruned_copy(base)
            WeightRegrowth(model, rule, evidence_for(dense, dense), "kaiming").apply_regrowth({"0": 50, "4": 200})
            results.append(state_of(model))
        assert_same(*results)


def test_a_step_draws_anew(dense):
    values = []
    for step in (1, 2):
        regrower = SaliencyBasedRegrowth(pruned_copy(dense), evidence_for(dense, dense).make("saliency"), "kaiming")
        values.append(regrower.apply_regrowth({"4": 50}, step=step).layers["4"])
    assert torch.equal(values[0].indices, values[1].indices) and not torch.equal(values[0].values, values[1].values)
    assert values[1].steps.tolist() == [2] * 50


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(SELECTORS))
@pytest.mark.parametrize(("allocation", "message"), [({"0": 5, "4": 10_000}, "4: 10000 .* capacity is"),
                                                     ({"0": 1, "nowhere": 2}, "'nowhere'.*0, 4, 8"),
                                                     ({"0": -1}, "negative")])
def test_a_bad_allocation_changes_nothing(dense, rule, allocation, message):
    model = pruned_copy(dense)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        WeightRegrowth(model, rule, evidence_for(dense, dense)).apply_regrowth(allocation)
    with pytest.raises(TypeError):
        WeightRegrowth(model, rule, evidence_for(dense, dense)).apply_regrowth({"0": 1.5})
    assert_same(before, state_of(model))


def test_missing_or_wrong_evidence_is_refused(dense):
    model = pruned_copy(dense)
    before, nan = state_of(model), torch.full((5, 32), torch.nan)
    wrong = nn.Sequential(nn.Linear(3, 3))
    for make, message in ((lambda: WeightRegrowth(model, "best", Evidence()), "'best'.*saliency"),
                          (lambda: WeightRegrowth(model, "random", Evidence(), "ones"), "'ones'.*zero"),
                          (lambda: SaliencyBasedRegrowth(model, {}), "no saliency.*'8'"),
                          (lambda: WeightRegrowth(model, "gradient", Evidence()), "no gradient.*'8'"),
                          (lambda: SaliencyBasedRegrowth(model, {"8": torch.ones(5)}), "shape"),
                          (lambda: SaliencyBasedRegrowth(model, {"8": nan}), "NaN"),
                          (lambda: WeightRegrowth(model, "reference", Evidence()), "no reference.*'8'"),
                          (lambda: ReferenceBasedRegrowth(model, wrong), "no reference.*'8'"),
                          (lambda: ReferenceBasedRegrowth(model, pruned_to(1, 3)), "no reference"),
                          (lambda: WeightRegrowth(model, "random", Evidence(), "reference"), "no reference.*'8'")):
        with pytest.raises(ValueError, match=message):
            make().apply_regrowth({"8": 3})
    with pytest.raises(ValueError, match="shape"):
        ReferenceBasedRegrowth(one_linear(WEIGHT, MASK), wrong).apply_regrowth({"0": 1})
    with pytest.raises(ValueError, match="no masked layer"):
        WeightRegrowth(dense, "random", Evidence()).apply_regrowth({"0": 1})
    assert_same(before, state_of(model))


# ---- the record ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_strategy", list(INITIALISERS))
@pytest.mark.parametrize("seed", range(3))
def test_undo_restores_and_replay_repeats_bit_for_bit(dense, init_strategy, seed):
    start = pruned_copy(dense, seed)
    start(torch.randn(2, 3, 32, 32))  # `weight` carries a graph now
    model, elsewhere, before = clone_model(start), clone_model(start), state_of(start)
    regrower = WeightRegrowth(model, "saliency", evidence_for(dense, dense, seed), init_strategy, seed)
    record = regrower.apply_regrowth(random_allocation(model, seed + 1))
    record.replay(elsewhere)
    assert_same(state_of(model), state_of(elsewhere))
    record.undo(model)
    assert_same(before, state_of(model))


def test_a_record_survives_a_file(dense, tmp_path):
    start = pruned_copy(dense)
    model, scores = clone_model(start), evidence_for(dense, dense).make("saliency")
    record = SaliencyBasedRegrowth(model, scores, "kaiming").apply_regrowth({"4": 30, "8": 5}, step=2)
    assert record.allocation == {"4": 30, "8": 5} and record.count == 35
    assert record.layers["4"].indices.tolist() == sorted(record.layers["4"].indices.tolist())
    assert (record.layers["4"].steps == 2).all()
    save_checkpoint({"epoch": 3, **record.state_dict()}, tmp_path / "best.pth")
    loaded = load_checkpoint(tmp_path / "best.pth")
    assert all(indices.dtype == torch.int64 for indices in loaded["regrow_indices"].values())
    copy, again = clone_model(start), RegrowthRecord.from_state_dict(loaded)
    again.replay(copy)
    assert_same(state_of(model), state_of(copy))
    again.undo(copy)
    assert_same(state_of(start), state_of(copy))
    with pytest.raises(ValueError, match="regrow_sources"):
        RegrowthRecord.from_state_dict({"regrow_indices": {}})


def test_a_record_is_only_applied_where_it_fits(dense):
    model = pruned_copy(dense)
    record = WeightRegrowth(model, "random", Evidence()).apply_regrowth({"0": 5, "4": 10})
    regrown = state_of(model)
    with pytest.raises(ValueError, match="active already"):
        record.replay(model)
    assert_same(regrown, state_of(model))
    record.undo(model)
    with pytest.raises(ValueError, match="pruned already"):
        record.undo(model)
    with pytest.raises(ValueError, match="no masked layer"):
        record.replay(dense)


# ---- speed -----------------------------------------------------------------------------------------------------------


def element_by_element(model: nn.Module, saliency: dict[str, Tensor], allocation: dict[str, int]) -> None:
    """The same regrowth as a plain loop: sort the pruned positions of each layer and write them one at a time."""
    for name, count in allocation.items():
        layer, scores = model.get_submodule(name), saliency[name].reshape(-1)
        mask, weight = layer.weight_mask.view(-1), layer.weight_orig.data.view(-1)
        pruned = [index for index in range(len(mask)) if mask[index] == 0]
        for index in sorted(pruned, key=lambda index: (-scores[index].item(), index))[:count]:
            mask[index] = 1.0
            weight[index] = 0.0


def test_a_hundred_times_faster_than_a_loop_and_with_the_same_result():
    start = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Linear(200, 100, bias=False))
    add_masks(start)
    start = pruned_copy(start, density=0.01)
    saliency = evidence_for(start, start).make("saliency")
    allocation = {"0": 600, "1": 200}  # 1 % of the weights
    fast, slow, seconds = clone_model(start), clone_model(start), []
    for _ in range(30):
        started = time.process_time()  # of all threads, and not of other programs
        record = SaliencyBasedRegrowth(fast, saliency).apply_regrowth(allocation)
        seconds.append(time.process_time() - started)
        record.undo(fast)
    record.replay(fast)
    started = time.process_time()
    element_by_element(slow, saliency, allocation)
    assert time.process_time() - started >= 100 * min(seconds)
    assert_same(dict(fast.state_dict()), dict(slow.state_dict()))


def test_a_rule_without_scores_leaves_a_random_fill_and_says_so(monkeypatch):
    monkeypatch.setitem(regrowth.SELECTORS, "silent", lambda name, layer, evidence: None)
    for rule, filled in (("silent", 2), ("random", 0)):
        model = nn.Sequential(nn.Linear(4, 1))
        set_masks(model, {"0": torch.tensor([[1, 0, 0, 0]])})
        record = WeightRegrowth(model, rule, Evidence()).apply_regrowth({"0": 2}, step=40_000)
        assert (record.count, record.filled) == (2, filled) and record.layers["0"].steps.tolist() == [40_000] * 2
