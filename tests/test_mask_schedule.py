"""Mask schedules: the papers' formulas by hand, hand-computed updates, exact counts, and that nothing moves unasked."""
from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import main
from tests.conftest import REPOSITORY, assert_user_error, run_here
from utils import training
from utils.allocation import ALLOCATORS
from utils.analysis_utils import (
    add_masks,
    clone_model,
    count_pruned_params,
    forget_momentum,
    get_masks,
    prunable_layers,
    set_masks,
    surviving_by_layer,
)
from utils.common import RunFailed, UserError, needs
from utils.mask_mover import MaskMover, move_masks
from utils.mask_schedule import (
    MASK_FIELDS,
    MASK_SCHEDULES,
    MaskPlan,
    Move,
    cosine_exchange,
    cubic_sparsity,
    plan_fields,
)
from utils.regrowth import SELECTORS, Evidence
from utils.training import Recipe, Trainer

RECIPE = Recipe("nesterov", lr=0.05, epochs=3, batch_size=32, weight_decay=5e-4)


def two_layers(first: list[float], second: list[float]) -> nn.Sequential:
    """Two masked linear layers with these weights."""
    model = nn.Sequential(nn.Linear(len(first), 1, bias=False), nn.Linear(len(second), 1, bias=False))
    for layer, values in zip(model, (first, second)):
        layer.weight.data = torch.tensor([values])
    add_masks(model)
    return model


def active(model: nn.Module) -> list[list[int]]:
    return [mask.int().flatten().tolist() for mask in get_masks(model).values()]


def gradients(first: list[float], second: list[float]) -> Evidence:
    return Evidence(gradient={"0": torch.tensor([first]), "1": torch.tensor([second])})


def test_cubic_sparsities_by_hand():
    """Zhu and Gupta's s_t from 0 to 0.96 in four steps: 0.96 (1 - (3/4)^3) = 0.555 and so on."""
    found = [cubic_sparsity(t, 0.0, 0.96) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0, 0.555, 0.84, 0.945, 0.96])
    assert cubic_sparsity(0.5, 0.5, 0.9) == pytest.approx(0.85)


def test_cosine_exchange_by_hand():
    """RigL's alpha / 2 (1 + cos(t pi / T_end)) for alpha 0.3."""
    assert [cosine_exchange(t, 0.3) for t in (0, 1 / 3, 0.5, 1)] == pytest.approx([0.3, 0.225, 0.15, 0.0])


ASKED = [  # 20 steps, the mask moves until the 10th, every 5th: (step, sparsity, exchange)
    ("gradual", [(0, 0.5, 0.0), (5, 0.85, 0.0), (10, 0.9, 0.0), (14, 0.9, 0.0)]),
    ("late", [(0, 0.5, 0.0), (9, 0.5, 0.0), (10, 0.9, 0.0), (14, 0.9, 0.0)]),
    ("rigl", [(0, 0.9, 0.3), (5, 0.9, 0.15), (10, 0.9, 0.0)]),
    ("granet", [(0, 0.5, 0.3), (5, 0.85, 0.15), (10, 0.9, 0.0)]),
    ("bidirectional", [(0, 0.5, 0.3), (5, 0.85, 0.15), (10, 0.9, 0.0)]),
    ("acdc", [(0, 0.9, 0.0), (5, 0.5, 0.0), (10, 0.9, 0.0)]),
]


def test_every_schedule_is_worked_out_by_hand():
    assert {name for name, _ in ASKED} == set(MASK_SCHEDULES)


@pytest.mark.parametrize("name, steps", ASKED)
def test_what_each_schedule_asks_for(name, steps):
    plan = MaskPlan(name, 0.5, 0.9, update_every=5, update_until=0.5)
    for step, sparsity, exchange in steps:
        assert plan.move(step, 20) == pytest.approx((sparsity, exchange)), step


def test_a_ramp_may_end_before_the_exchange_does():
    """20 steps: sparse after 6 of the 10 in which the mask moves, half-way at 3: 0.9 - 0.4 (1 - 1/2)^3 = 0.85."""
    plan = MaskPlan("bidirectional", 0.5, 0.9, update_until=0.5, ramp_until=0.3)
    assert [plan.move(step, 20) for step in (0, 3, 6, 10)] == [
        pytest.approx(move) for move in ((0.5, 0.3), (0.85, cosine_exchange(0.3, 0.3)),
                                         (0.9, cosine_exchange(0.6, 0.3)), (0.9, 0))]
    assert "ramp_until" not in plan_fields("bidirectional")
    assert plan_fields("granet", ramp_until=0.2)["ramp_until"] == 0.2
    with pytest.raises(UserError, match=r"--ramp_until 0.7 lies after --update_until 0.6"):
        plan_fields("bidirectional", ramp_until=0.7)


def test_acdc_ends_sparse_when_the_last_phase_would_be_dense():
    plan = MaskPlan("acdc", 0.0, 0.9, update_every=4, update_until=0.6)
    assert [plan.move(step, 20).sparsity for step in (0, 4, 8, 12)] == [0.9, 0.0, 0.9, 0.9]


def test_gradual_keeps_the_largest_of_the_network():
    model = two_layers([3.0, -1.0, 0.5, 4.0], [2.0, -5.0, 0.1, 1.5])
    move_masks(model, 4, 0.0, MaskPlan("gradual", 0, 0.5), Evidence(), seed=0, number=1)
    assert active(model) == [[1, 0, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("exchange", [0.5, 0.45])  # 0.45 of four and of two are 1.8 and 0.9: two and one
def test_rigl_drops_the_smallest_and_grows_the_largest_gradient_of_each_layer(exchange):
    """Layer 0 keeps four, half are exchanged: 1 and 0.5 go; the largest gradients outside of the two survivors return.

    In layer 1 one of two goes (0.1), and comes back since its gradient is the largest: it keeps its value.
    """
    model = two_layers([3.0, -1.0, 0.5, 4.0, 9.0, 8.0], [2.0, 0.1, 7.0, 6.0])
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 1, 0, 0]]), "1": torch.tensor([[1, 1, 0, 0]])})
    evidence = gradients([9.0, 0.1, -0.3, 9.0, -0.2, 0.4], [0.0, -5.0, 1.0, 2.0])
    moved = move_masks(model, 6, exchange, MaskPlan("rigl", 0.4, 0.4), evidence, seed=0, number=1)
    assert active(model) == [[1, 0, 1, 1, 0, 1], [1, 1, 0, 0]]
    assert moved.returned["0"].tolist() == [[False] * 5 + [True]] and not moved.returned["1"].any()
    assert [mask.nonzero()[:, 1].tolist() for mask in moved.handed_back.values()] == [[2], [1]]  # 0.5 and 0.1
    assert model[0].weight_orig.tolist() == [[3.0, -1.0, 0.5, 4.0, 9.0, 0.0]]  # 8 came back at zero, 0.5 as it was
    assert model[1].weight_orig[0, :2].tolist() == pytest.approx([2.0, 0.1])


def test_bidirectional_prunes_past_the_target_and_regrows_the_best_of_the_network():
    """Of 8 weights 4 are to stay, a margin of half: pruned to 5 and 4, then the two best scores g^2 w^2 return."""
    model = two_layers([3.0, -1.0, 0.5, 4.0], [2.0, -5.0, 0.1, 1.5])
    saliency = {"0": torch.tensor([[9.0, 0.0, 3.0, 9.0]]), "1": torch.tensor([[1.0, 9.0, 2.0, 0.0]])}
    plan = MaskPlan("bidirectional", 0, 0.5, regrow_rule="saliency", regrow_allocation="global")
    move_masks(model, 4, 0.5, plan, Evidence(saliency=saliency), seed=0, number=1)
    assert active(model) == [[1, 0, 1, 1], [0, 1, 0, 0]]  # 3 (saliency 9) and 0.5 (saliency 3) came back
    assert model[0].weight_orig.tolist() == [[3.0, -1.0, 0.5, 4.0]]  # both had been active: as they were


def test_the_margin_is_rounded_to_the_nearest_number():
    """0.45 of 4 is 1.8, so two: pruned to 5 and 4, and 0.5 and 0.1 return before 3, which one would have left."""
    model = two_layers([3.0, -1.0, 0.5, 4.0], [2.0, -5.0, 0.1, 1.5])
    saliency = {"0": torch.tensor([[1.0, 0.0, 4.0, 9.0]]), "1": torch.tensor([[1.0, 9.0, 3.0, 0.0]])}
    plan = MaskPlan("bidirectional", 0, 0.5, regrow_rule="saliency", regrow_allocation="global")
    move_masks(model, 4, 0.45, plan, Evidence(saliency=saliency), seed=0, number=1)
    assert active(model) == [[0, 0, 1, 1], [0, 1, 1, 0]]


def test_steps_and_survivors_are_rounded_to_the_nearest_number():
    """0.55 of 5 steps are 2.75; 100 * 0.29 is just below 29 in floating point; 0.28 of 10 weights are 2.8."""
    for until, steps, end in ((0.55, 5, 3), (0.29, 100, 29)):
        assert MaskPlan("rigl", 0, 0.9, update_until=until).last_update(steps) == end
    mover = MaskMover(two_layers([1.0] * 6, [1.0] * 4), MaskPlan("rigl", 0, 0.72), 0)
    for survivors in (2, 3):
        mover.history = [{"survivors": survivors}]
        assert mover.counts(None) == (survivors == 3)


def test_equal_weights_go_and_come_by_position():
    model = two_layers([1.0, 1.0, 1.0, 1.0], [1.0, 1.0])
    set_masks(model, {"0": torch.tensor([[1, 1, 0, 0]]), "1": torch.tensor([[1, 1]])})
    evidence = gradients([0.0, 1.0, 1.0, 1.0], [0.0, 0.0])
    move_masks(model, 4, 0.5, MaskPlan("rigl", 0.5, 0.5), evidence, seed=0, number=1)
    assert active(model) == [[1, 1, 0, 0], [1, 1]]  # the last equal one goes; the first gradient returns


@pytest.mark.parametrize("allocation", ["layer", "global", *ALLOCATORS])
@pytest.mark.parametrize("rule", SELECTORS)
def test_exactly_so_many_survive_whatever_the_rule_and_allocation(rule, allocation, small_cnn):
    random = torch.Generator().manual_seed(5)
    layers = prunable_layers(small_cnn)
    values = {name: torch.rand(layer.weight.shape, generator=random) for name, layer in layers.items()}
    add_masks(small_cnn)
    reference = MaskMover(small_cnn, MaskPlan("gradual", 0, 0.9), 0).reference
    for number, keep in enumerate((700, 300, 301, 40, 900, 952), 1):
        evidence = Evidence(reference=reference, gradient=values, saliency=values,
                            drift={name: place for place, name in enumerate(layers)})
        plan = MaskPlan("bidirectional", 0, 0.9, regrow_rule=rule, regrow_allocation=allocation, exchange=0.4)
        before = get_masks(small_cnn)
        returned, handed_back, to_dead = move_masks(small_cnn, keep, 0.4, plan, evidence, seed=1, number=number)
        after = get_masks(small_cnn)
        assert not any(bool((mask & ~(before[name] & after[name])).any()) for name, mask in handed_back.items())
        assert count_pruned_params(small_cnn).surviving == keep
        assert all(torch.equal(returned[name], after[name] & ~before[name]) for name in layers)


def train(model, loaders, plan, epochs=3, seed=0):
    mover = MaskMover(model, plan, seed)
    trainer = Trainer(model, *loaders[:2], replace(RECIPE, epochs=epochs), seed=seed, hook=mover)
    return mover, trainer, trainer.run(show=False)


@pytest.mark.parametrize("name", MASK_SCHEDULES)
@pytest.mark.parametrize("pruner", ["magnitude", "erk"])
def test_a_training_ends_at_exactly_the_target(name, pruner, small_cnn, tiny_loaders):
    plan = MaskPlan(name, 0.0, 0.9, pruner=pruner, **{**MASK_SCHEDULES[name].defaults, "update_every": 2})
    mover, trainer, result = train(small_cnn, tiny_loaders, plan)
    assert count_pruned_params(small_cnn).surviving == round(0.1 * 952)
    for row in mover.history:
        assert row["survivors"] == round((1 - plan.move(row["step"], trainer.total_steps).sparsity) * 952)
        assert sum(row[layer] for layer in prunable_layers(small_cnn)) == row["survivors"]
    last = {"rigl": 11, "acdc": 13, "late": 4}.get(name, 9)
    assert mover.history[-1]["step"] == plan.last_update(trainer.total_steps) == last
    assert result.best_epoch >= 1
    if name in ("gradual", "late"):
        assert result.best_epoch >= 1 + (name == "gradual") and not any(row["regrown"] for row in mover.history)
    else:
        assert sum(row["regrown"] for row in mover.history) > 0
    assert not small_cnn[0]._forward_pre_hooks or len(small_cnn[0]._forward_pre_hooks) == 1  # the mask's own


def test_updates_may_be_a_fraction_of_the_training():
    """AC/DC's own: phases of a twentieth, sparse first; dense for the last time from 0.75 to 0.8, then sparse."""
    plan = MaskPlan("acdc", 0.0, 0.9, **MASK_SCHEDULES["acdc"].defaults)
    assert (plan.every(200), plan.last_update(200), plan.every(7)) == (10, 170, 1)
    found = [plan.move(step, 200).sparsity for step in range(0, 171, 10)]
    assert found == [0.9, 0.0] * 8 + [0.9, 0.9]
    assert (MaskPlan("rigl", 0, 0.5).every(200), MaskPlan("rigl", 0, 0.5, update_every=1).every(200)) == (40, 1)
    wanted = main.parse_args(["--m_name", "resnet20", "--mask_schedule", "acdc", "--update_every", "0.1"])
    assert wanted.update_every == 0.1


def test_an_epoch_that_does_not_count_is_neither_the_best_nor_takes_patience(small_cnn, tiny_loaders):
    """Ten steps of 5 an epoch; dense at the ends of epochs 1 and 3, and nothing learns: epoch 2 stays the best."""
    plan = MaskPlan("acdc", 0.0, 0.9, **{**MASK_SCHEDULES["acdc"].defaults, "update_every": 5, "update_until": 1.0})
    mover = MaskMover(small_cnn, plan, 0)
    recipe = replace(RECIPE, epochs=8, lr=1e-12, patience=2)
    for module in small_cnn.modules():
        module.momentum = 0.0
    trainer = Trainer(small_cnn, *tiny_loaders[:2], recipe, seed=0, hook=mover)
    result = trainer.run(show=False)
    counted = [epoch for epoch, row in enumerate(mover.history[1:], 1) if row["survivors"] == round(0.1 * 952)]
    assert result.best_epoch == counted[0] and result.epochs == counted[2]


def test_what_came_back_is_told_of_the_model_as_it_stands(small_cnn, tiny_loaders):
    """After a training the model is that of its best epoch, and its mask not always the last one."""
    mover, _, _ = train(small_cnn, tiny_loaders, MaskPlan("rigl", 0.0, 0.8, update_every=2, regrow_rule="random"))
    assert mover.came_back == mover.history[-1]["came_back"] > 0
    set_masks(small_cnn, {name: ~ever for name, ever in mover.ever_regrown.items()})
    assert mover.came_back == 0


def test_a_training_that_diverges_fails_in_one_line(small_cnn, tiny_loaders):
    plan = MaskPlan("rigl", 0.0, 0.8, update_every=1)
    with pytest.raises(RunFailed, match="not finite after 1 steps.*lower learning rate"):
        mover = MaskMover(small_cnn, plan, 0)
        Trainer(small_cnn, *tiny_loaders[:2], replace(RECIPE, lr=float("inf")), seed=0, hook=mover).run(show=False)


def test_pruned_weights_never_move_and_returning_ones_have_no_momentum(small_cnn, tiny_loaders):
    plan = MaskPlan("rigl", 0.0, 0.8, update_every=3, update_until=1.0)
    seen = {}

    class Checker(MaskMover):
        def on_step(self, trainer):
            before = {name: (layer.weight_orig.detach().clone(), layer.weight_mask.clone())
                      for name, layer in prunable_layers(self.model).items()}
            for name, (values, mask) in seen.items():
                assert torch.equal(before[name][0][mask == 0], values[mask == 0])
            super().on_step(trainer)
            for name, layer in prunable_layers(self.model).items():
                now = layer.weight_orig.detach().clone()
                momentum = trainer.optimizer.state[layer.weight_orig]["momentum_buffer"]
                back = (layer.weight_mask == 1) & (before[name][1] == 0)
                assert not now[back].any() and not momentum[back].any()
                assert torch.equal(now[~back], before[name][0][~back])
                seen[name] = (now, layer.weight_mask.clone())
    mover = Checker(small_cnn, plan, 0)
    Trainer(small_cnn, *tiny_loaders[:2], RECIPE, seed=0, hook=mover).run(show=False)
    assert sum(row["regrown"] for row in mover.history) > 0


def test_the_history_tells_which_of_the_survivors_had_been_pruned_and_came_back(small_cnn, tiny_loaders):
    """Followed by hand, from mask to mask: a survivor has come back if it was off after some update before."""
    plan = MaskPlan("bidirectional", 0.0, 0.8, update_every=2, regrow_rule="random", evidence_steps=1)
    off = {name: torch.zeros_like(layer.weight, dtype=torch.bool) for name, layer in prunable_layers(small_cnn).items()}
    expected = []

    class Follower(MaskMover):
        def _update(self, trainer, move):
            super()._update(trainer, move)
            masks = get_masks(self.model)
            expected.append(sum(int((masks[name] & off[name]).sum()) for name in off))
            for name, mask in masks.items():
                off[name] |= ~mask
    mover = Follower(small_cnn, plan, 0)
    Trainer(small_cnn, *tiny_loaders[:2], RECIPE, seed=0, hook=mover).run(show=False)
    assert [row["came_back"] for row in mover.history] == expected and any(expected)
    counts = surviving_by_layer(small_cnn)
    assert sum(round(share * counts[name]) for name, (_, share) in mover.shares_regrown().items()) == expected[-1]


def test_of_adam_a_returning_weight_has_the_second_moment_of_its_layer():
    """Survivors' moments 4 and 8, mean 6; momentum starts at 0."""
    model = two_layers([3.0, -1.0, 0.5, 4.0], [2.0, -5.0])
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 0]]), "1": torch.tensor([[1, 1]])})
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model[0].weight_orig] = {"step": torch.tensor(9.0), "exp_avg": torch.ones(1, 4),
                                             "exp_avg_sq": torch.tensor([[4.0, 8.0, 100.0, 200.0]])}
    back = {"0": torch.tensor([[False, False, True, False]]), "1": torch.zeros(1, 2, dtype=torch.bool)}
    forget_momentum(model, optimizer, back)
    state = optimizer.state[model[0].weight_orig]
    assert state["exp_avg"].tolist() == [[1, 1, 0, 1]] and state["exp_avg_sq"].tolist() == [[4, 8, 6, 200]]
    assert float(state["step"]) == 9


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Adadelta,
                                  partial(torch.optim.Adam, amsgrad=True)])
def test_of_no_optimizer_a_returning_weight_makes_a_larger_step_than_the_others(kind):
    """All gradients are 1, so that what returns has the mean of equal moments: its step is that of the others."""
    model = two_layers([0.0, 0.0, 0.0, 0.0], [2.0, -5.0])
    set_masks(model, {"0": torch.tensor([[1, 1, 0, 0]]), "1": torch.tensor([[1, 1]])})
    weight = model[0].weight_orig
    optimizer = kind([weight], lr=0.1)

    def step() -> list[float]:
        before, weight.grad = weight.detach().clone(), model[0].weight_mask.clone()
        optimizer.step()
        return (before - weight.detach()).flatten().tolist()
    for _ in range(50):
        step()
    back = torch.tensor([[False, False, True, False]])
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 0]])})
    forget_momentum(model, optimizer, {"0": back, "1": torch.zeros(1, 2, dtype=torch.bool)})
    stayed, _, returned, _ = step()
    assert 0 < returned <= 1.001 * stayed


def test_the_gradient_is_that_of_the_effective_weight_also_where_it_is_pruned():
    """y = w0 x0 + w1 x1 with w1 pruned, loss y: dL/dw = x at both positions."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    mover = MaskMover(model, MaskPlan("rigl", 0, 0.5), 0)
    set_masks(model, {"0": torch.tensor([[1, 0]])})
    result = model(torch.tensor([[3.0, 7.0]])).sum()
    model[0].weight.retain_grad()  # as the trainer does where `mover.watching`
    result.backward()
    mover._gather()
    assert mover._sums[1]["0"].tolist() == [[3.0, 7.0]]
    assert model[0].weight_orig.grad.tolist() == [[3.0, 0.0]]  # what the optimizer sees


@pytest.mark.parametrize("rule, returns, to_dead", [("gradient", [1, 0], 1), ("relative_gradient", [0, 1], 0)])
def test_what_comes_to_a_filter_that_had_nothing_left_is_counted(rule, returns, to_dead):
    """One of the first filter's two goes, 1; the second filter is dead, its gradients 90 and 20 times as large."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 1.0, 7.0], [7.0, 7.0, 7.0]])
    set_masks(model, {"0": torch.tensor([[1, 1, 0], [0, 0, 0]])})
    evidence = Evidence(gradient={"0": torch.tensor([[0.0, 0.1, 0.05], [9.0, 2.0, 0.0]])})
    moved = move_masks(model, 2, 0.5, MaskPlan("rigl", 0.5, 0.5, regrow_rule=rule), evidence, seed=0, number=1)
    assert get_masks(model)["0"].nonzero().tolist() == [[0, 0], returns]
    assert int(moved.to_dead_filters["0"].sum()) == to_dead


def test_gradients_and_saliency_are_gathered_apart(monkeypatch):
    @needs("gradient", "saliency")
    def both(name, layer, evidence):
        raise NotImplementedError
    monkeypatch.setitem(SELECTORS, "both", both)
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[2.0, 5.0]])
    mover = MaskMover(model, MaskPlan("rigl", 0, 0.5, regrow_rule="both"), 0)
    for x in ([3.0, 7.0], [-4.0, 1.0]):
        result = model(torch.tensor([x])).sum()
        model[0].weight.retain_grad()
        result.backward()
        mover._gather()
        model.zero_grad()
    evidence = mover._evidence()
    assert evidence.make("gradient")["0"].tolist() == [[0.5, 4.0]]  # |3 - 4| / 2, |7 + 1| / 2
    assert evidence.make("saliency")["0"].tolist() == [[12.5 * 4, 25.0 * 25]]  # (9 + 16) / 2 2^2, (49 + 1) / 2 5^2
    assert evidence.make("magnitude")["0"].tolist() == [[2.0, 5.0]]


def test_a_random_allocation_is_drawn_anew_at_every_update():
    plan, shares = MaskPlan("bidirectional", 0, 0.5, regrow_rule="random", regrow_allocation="random"), []
    for number in (1, 2, 1):
        model = two_layers([1.0] * 1000, [1.0] * 1000)
        set_masks(model, {"0": torch.arange(1000)[None] < 100, "1": torch.arange(1000)[None] < 100})
        move_masks(model, 600, 0.0, plan, Evidence(), seed=3, number=number)
        shares.append([sum(mask) for mask in active(model)])
    assert shares[0] != shares[1] and shares[0] == shares[2] and {sum(share) for share in shares} == {600}


def test_what_exchanges_weights_at_one_sparsity_is_found_out():
    assert {name for name, row in MASK_SCHEDULES.items() if row.exchanges} == {"rigl", "granet", "bidirectional"}
    own = MASK_SCHEDULES["rigl"]._replace(move=lambda plan, t, number: Move(plan.target, 0.2), ignores=MASK_FIELDS)
    assert own.exchanges


def saved(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", MASK_SCHEDULES)
def test_an_interrupted_training_ends_in_the_same_bytes(name, small_cnn, tiny_loaders):
    plan = MaskPlan(name, 0.0, 0.9, **{**MASK_SCHEDULES[name].defaults, "update_every": 2, "evidence_steps": 2})
    straight, broken, again = small_cnn, clone_model(small_cnn), clone_model(small_cnn)
    mover, _, _ = train(straight, tiny_loaders, plan)
    states = []
    first = MaskMover(broken, plan, 0)
    Trainer(broken, *tiny_loaders[:2], RECIPE, seed=0, hook=first).run(
        show=False, on_epoch=lambda trainer: states.append(saved(trainer.state_dict())))
    second = MaskMover(again, plan, 0)
    trainer = Trainer(again, *tiny_loaders[:2], RECIPE, seed=0, hook=second)
    trainer.load_state_dict(torch.load(io.BytesIO(states[0]), weights_only=True))
    trainer.run(show=False)
    assert mover.history == second.history
    for key, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


# --- as a user runs it ---------------------------------------------------------------------------------------------

SMALL = ["--m_name", "resnet20", "--pruner", "magnitude", "--sparsity", "0.97", "--max_epochs", "1",
         "--finetune_epochs", "3", "--batch_size", "8", "--device", "cpu", "--val_split", "0.25"]


@pytest.mark.parametrize("words, message", [
    (["--exchange", "0.2"], "--exchange needs a --mask_schedule: gradual, late, rigl"),
    (["--mask_schedule", "gradual", "--regrow_rule", "random"], "--regrow_rule does nothing with --mask_schedule grad"),
    (["--mask_schedule", "rigl", "--finetune_epochs", "0"], "--finetune_epochs 0 leaves none"),
    (["--mask_schedule", "rigl", "--pruner", "none"], "--pruner none prunes nothing; leave --sparsity out"),
])
def test_contradictions_are_refused_by_name(words, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        main.main([*SMALL, "--root", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())


def test_the_script_moves_the_mask_and_goes_on_after_a_kill_to_the_same_bytes(image_folder, tmp_path):
    words = [*SMALL, "--data_dir", image_folder, "--mask_schedule", "granet", "--update_every", "3"]
    artifact = "resnet20/ckpt_after_prune/pruned_finetuned_mask_0.97.pth"
    assert run_here("main.py", *words, "--root", tmp_path / "straight").returncode == 0
    shutil.copytree(tmp_path / "straight/resnet20/checkpoint", tmp_path / "killed/resnet20/checkpoint")
    command = [sys.executable, REPOSITORY / "main.py", *words, "--root", tmp_path / "killed"]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stderr:  # a line per epoch; only the finetuning has three
        if "epoch 2/3" in line:
            process.kill()
            break
    process.wait()
    assert (tmp_path / "killed" / artifact).with_suffix(".progress.pth").is_file()
    resumed = run_here("main.py", *words, "--root", tmp_path / "killed", "--resume")
    assert resumed.returncode == 0 and "continuing after epoch" in resumed.stdout, resumed.stderr
    assert (tmp_path / "straight" / artifact).read_bytes() == (tmp_path / "killed" / artifact).read_bytes()
    tables = [(tmp_path / run / artifact).with_name("pruned_finetuned_mask_0.97_mask_updates.csv") for run in
              ("straight", "killed")]
    assert tables[0].read_text() == tables[1].read_text() and tables[0].with_suffix(".png").stat().st_size > 1000
    rows = list(csv.DictReader(tables[0].read_text().splitlines()))
    assert rows[-1]["survivors"] == "8127" and sum(int(row["regrown"]) for row in rows) > 0
    card = json.loads((tmp_path / "straight" / artifact).with_suffix(".json").read_text())
    assert card["config"]["schedule"] == "granet" and card["config"]["mask"]["exchange"] == 0.3
    refused = run_here("main.py", *words[:-4], "--root", tmp_path / "straight")
    assert_user_error(refused, "was made with other arguments", "schedule granet (asked: one-shot)")


def test_what_came_back_is_told_of_the_best_epoch_though_more_came_back_later(small_cnn, tiny_loaders, monkeypatch):
    each_epoch = len(tiny_loaders[0].with_batch_size(RECIPE.batch_size))
    plan = MaskPlan("rigl", 0.0, 0.8, update_every=each_epoch, update_until=1.0, exchange=0.9, regrow_rule="random")
    seen, real = [], MaskMover.on_best

    def noted(mover, trainer):
        seen.append(mover.history[-1]["came_back"])
        real(mover, trainer)
    monkeypatch.setattr(MaskMover, "on_best", noted)
    mover = MaskMover(small_cnn, plan, 0)
    trainer = Trainer(small_cnn, *tiny_loaders[:2], replace(RECIPE, epochs=6), seed=0, hook=mover)
    accuracies = iter([50.0, 40.0, 30.0, 30.0, 30.0, 30.0])
    monkeypatch.setattr(training, "evaluate", lambda *_: training.Evaluation(1.0, next(accuracies)))
    assert trainer.run(show=False).best_epoch == 1 and len(seen) == 1
    assert mover.came_back == seen[0] > 0
    counts = surviving_by_layer(small_cnn)
    assert sum(round(share * counts[name]) for name, (_, share) in mover.shares_regrown().items()) == seen[0]
    ever = sum(int((mask & mover.ever_regrown[name]).sum()) for name, mask in get_masks(small_cnn).items())
    assert ever > seen[0]  # weights that were in the best model, and went and came back after it


def test_the_least_density_is_that_before_weights_return():
    assert MaskPlan("gradual", 0.0, 0.9).least_density() == pytest.approx(0.1)
    assert MaskPlan("rigl", 0.9, 0.9).least_density() == pytest.approx(0.1)  # each layer gives up and gets back its own
    assert MaskPlan("rigl", 0.9, 0.9, exchange=0.3, regrow_allocation="erk").least_density() == pytest.approx(0.07)


def test_a_schedule_that_does_not_end_at_the_target_is_refused_before_any_training(image_folder, tmp_path, monkeypatch,
                                                                                   small_cnn, tiny_loaders):
    """1 - exp(-4 t) is 0.98 at t = 1; and where nothing checks beforehand, no model comes out of the training."""
    short = MASK_SCHEDULES["gradual"]._replace(move=lambda plan, t, number: Move(plan.target * (1 - math.exp(-4 * t))))
    monkeypatch.setitem(MASK_SCHEDULES, "gradual", short)
    with pytest.raises(UserError, match="gradual is wrong: at t = 1, .*sparsity 0.883515925 .* the target's, 0.9"):
        main.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--max_epochs",
                   "1", "--mask_schedule", "gradual", "--sparsity", "0.9", "--finetune_epochs", "1"])
    assert not list(tmp_path.rglob("*.pth"))
    mover = MaskMover(small_cnn, MaskPlan("gradual", 0.0, 0.9), 0)
    with pytest.raises(RunFailed, match="none of the 3 epochs counts"):
        Trainer(small_cnn, *tiny_loaders[:2], RECIPE, seed=0, hook=mover).run(show=False)
