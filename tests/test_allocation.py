"""Regrowth allocations: hand-computed cases, and exact budget and capacity over random problems."""
from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from utils import allocation
from utils.allocation import ALLOCATORS, AllocationProblem, ratios_to_allocation, spend_ratio
from utils.analysis_utils import set_masks
from utils.common import UserError, needed
from utils.pruning import lacking_weights


def problem_of(capacities: tuple[int, ...], budget: int, **columns: tuple) -> AllocationProblem:
    """Layers as large as their capacity (at least one weight), all of fan 1 unless given."""
    columns = {"sizes": tuple(max(1, c) for c in capacities), "fan": (1,) * len(capacities), **columns}
    return AllocationProblem(tuple(f"layer{i}" for i in range(len(capacities))), capacities, budget, **columns)


def random_problem(seed: int) -> AllocationProblem:
    """Ties, zero capacities, one layer, budgets from 0 to above the total capacity."""
    rng = random.Random(seed)
    largest = rng.choice([1, 3, 10, 1000, 2_359_296])
    capacities = tuple(rng.choice([0, largest, rng.randint(0, largest)]) for _ in range(rng.randint(1, 12)))
    total = sum(capacities)
    budget = rng.choice([0, 1, 2, total // 2, max(0, total - 1), total, total + 5, rng.randint(0, total)])
    return problem_of(capacities, budget, fan=tuple(rng.choice([9, rng.randint(1, 99)]) for _ in capacities))


def allocate(name: str, problem: AllocationProblem, seed: int = 0) -> tuple[int, ...]:
    return ALLOCATORS[name](problem, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators_spend_exactly_the_budget_and_respect_every_capacity(name):
    for seed in range(150):
        problem = random_problem(seed)
        allocation = allocate(name, problem, seed)
        assert sum(allocation) == problem.spend == min(problem.budget, sum(problem.capacities))
        assert all(type(part) is int and 0 <= part <= cap
                   for part, cap in zip(allocation, problem.capacities, strict=True)), (seed, allocation)


@pytest.mark.parametrize(("name", "expected"), [
    ("proportional", (1, 3, 6)),  # a tenth of every layer
    ("uniform", (4, 3, 3)),       # 10/3 each, the odd one to the first
    ("greedy", (10, 0, 0)),
    ("erk", (5, 3, 2)),           # shares 5 : 3 : 2
])
def test_allocators_by_hand(name, expected):
    assert allocate(name, problem_of((10, 30, 60), 10, fan=(5, 3, 2))) == expected


@pytest.mark.parametrize(("name", "expected"), [
    ("uniform", (2, 9, 9)),   # 20/3 exceeds the first layer: it is filled, 18/2 for the others
    ("greedy", (2, 18, 0)),   # in the order given, each to capacity
    ("erk", (2, 12, 6)),      # shares 7 : 2 : 1 would give 14, 4, 2; the first is filled, 18 left at 2 : 1
])
def test_what_a_full_layer_cannot_take_goes_to_the_others(name, expected):
    assert allocate(name, problem_of((2, 30, 60), 20, fan=(7, 2, 1))) == expected


def test_by_magnitude_layers_get_what_they_lack():
    """The reference's five largest: 9, 8, 7 in a and 6, 5 in b, none in c; two of a's are there already."""
    reference, model = nn.ModuleDict(), nn.ModuleDict()
    for name, values in {"a": [9, -8, 7, 1], "b": [6, 5, 0, 0], "c": [1, -2, 3, 1]}.items():
        reference[name], model[name] = nn.Linear(4, 1), nn.Linear(4, 1)
        with torch.no_grad():
            reference[name].weight.copy_(torch.tensor([values]))
    set_masks(model, {"a": torch.tensor([[1, 1, 0, 0]]), "b": torch.zeros(1, 4), "c": torch.tensor([[1, 0, 0, 0]])})
    assert lacking_weights(model, reference, 5) == {"a": 1, "b": 2, "c": 0}
    set_masks(reference, {"a": torch.tensor([[1, 0, 1, 0]]), "b": torch.ones(1, 4), "c": torch.zeros(1, 4)})
    assert lacking_weights(model, reference, 3) == {"a": 0, "b": 1, "c": 0}  # its own pruned ones do not count
    assert lacking_weights(model, reference, 99) == {"a": 0, "b": 4, "c": 0}
    assert allocate("magnitude", problem_of((2, 4, 3), 3, lacking=(1, 2, 0))) == (1, 2, 0)
    assert allocate("magnitude", problem_of((2, 4, 3), 6, lacking=(1, 2, 0))) == (2, 4, 0)  # b is filled, then a
    assert allocate("magnitude", problem_of((2, 4, 3), 8, lacking=(1, 2, 0))) == (2, 4, 2)
    assert allocate("magnitude", problem_of((2, 4, 3), 3)) == allocate("proportional", problem_of((2, 4, 3), 3))


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name != "random"])
def test_a_rule_says_whether_it_goes_by_the_order_of_the_layers(name):
    forth = allocate(name, problem_of((10, 30, 60), 9, fan=(5, 3, 2)))
    back = allocate(name, problem_of((60, 30, 10), 9, fan=(2, 3, 5)))
    assert forth == back[::-1] or "drift" in needed(ALLOCATORS[name])
    assert (forth != back[::-1]) == (name == "greedy")


@pytest.mark.parametrize("counts", [(1, 1), (4, 0, 0), (3, 0, -1), (0, 0, 0), (0, 3, 0)])
def test_a_rule_that_gives_no_allocation_is_refused(counts, monkeypatch):
    monkeypatch.setitem(ALLOCATORS, "wrong", lambda problem, generator: counts)
    with pytest.raises(UserError, match="allocation wrong is wrong: .* 3 layers .* 2 in all"):
        allocation.allocate("wrong", problem_of((4, 2, 1), 2), torch.Generator())
    monkeypatch.setitem(ALLOCATORS, "wrong", lambda problem, generator: [1, 1, 0])
    assert allocation.allocate("wrong", problem_of((4, 2, 1), 2), torch.Generator()) == (1, 1, 0)


def test_random_allocations_follow_their_seed_and_favour_no_layer():
    problem = problem_of((1000,) * 4, 1000)
    draws = torch.tensor([allocate("random", problem, seed) for seed in range(600)], dtype=torch.float64)
    assert allocate("random", problem, 7) == tuple(draws[7].long().tolist())
    assert len(draws.unique(dim=0)) == 600
    # Flat Dirichlet over 4: mean 1/4, standard deviation sqrt(3/80) = 0.194; 4 standard errors of 600 draws are 0.032.
    assert (draws.mean(dim=0) / 1000 - 0.25).abs().max() < 0.032
    assert (draws.std(dim=0) / 1000 - 0.194).abs().max() < 0.03


@pytest.mark.parametrize(("ratios", "expected"), [
    ((0.5, 1.0, 0.0), (7, 5, 0)),  # 5 of 10, 5 of min(5, 7), 0: the 2 left go to the first layer
    ((0.0, 0.0, 0.0), (10, 2, 0)),  # nothing chosen: as greedy
    ((1.0, 1.0, 1.0), (10, 2, 0)),
    ((0.0, 0.5, 1.0), (1, 3, 8)),  # half of 5 rounds up to 3; all of min(8, 9) = 8; 1 left to the first
    ((0.1, 0.1, 0.1), (10, 1, 1)),  # 1 of 10; 0.5 -> 1 of 5; 0.8 -> 1 of 8; 9 left, all to the first
])
def test_ratios_by_hand(ratios, expected):
    assert ratios_to_allocation(ratios, (10, 5, 8), 12) == expected


def test_ratios_spend_exactly_the_budget_whatever_they_are():
    for seed in range(300):
        problem, rng = random_problem(seed), random.Random(seed)
        ratios = [rng.choice([0.0, 1.0, rng.randint(0, 10) / 10, rng.random()]) for _ in problem.layers]
        allocation = ratios_to_allocation(ratios, problem.capacities, problem.budget)
        assert sum(allocation) == problem.spend
        assert all(0 <= part <= cap for part, cap in zip(allocation, problem.capacities, strict=True))


def test_a_ratio_never_takes_more_than_there_is():
    assert [spend_ratio(ratio, 7, 5) for ratio in (0.0, 0.1, 0.5, 0.9, 1.0)] == [0, 1, 3, 5, 5]
    assert spend_ratio(1.0, 0, 5) == spend_ratio(1.0, 5, 0) == 0


@pytest.mark.parametrize(("arguments", "complaint"), [
    (([0.5], [1, 2], 1), "1 ratios for 2 capacities"),
    (([1.1], [1], 1), "between 0 and 1"),
    (([float("nan")], [1], 1), "between 0 and 1"),
    (([0.5], [1], -1), "negative"),
    (([0.5], [-1], 1), "negative"),
])
def test_impossible_ratios_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        ratios_to_allocation(*arguments)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"layers": ("a", "a")}, "distinct"),
    ({"layers": ()}, "at least one"),
    ({"capacities": (1,)}, r"2 layers, but columns of \[1, 2, 2, 2\]"),
    ({"budget": -1}, "budget"),
    ({"fan": (0, 4)}, "fan"),
    ({"capacities": (-1, 2)}, "capacity"),
    ({"capacities": (9, 2)}, "capacity"),
    ({"drift": (0.9, 0.1)}, "order of priority"),
    ({"drift": (float("nan"), 0.1)}, "order of priority"),
])
def test_a_problem_is_validated_on_entry(change, complaint):
    entries = {"layers": ("a", "b"), "capacities": (5, 2), "budget": 3, "sizes": (8, 8), "fan": (4, 4),
               "drift": (0.1, 0.1)}
    AllocationProblem(**entries)
    with pytest.raises(ValueError, match=complaint):
        AllocationProblem(**{**entries, **change})
