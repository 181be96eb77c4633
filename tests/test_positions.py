"""Flat positions: hand-computed cases, and random ones against a plain sort, on the host's and the device's path."""
from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from utils import selection
from utils.analysis_utils import clone_model, count_pruned_params, empty_layers, layer_sparsity, set_masks
from utils.common import map_tensors, move_all
from utils.pruning import make_pruner
from utils.regrowth import Evidence, WeightRegrowth, layer_capacities
from utils.selection import Positions, Ranking, random_indices, top_indices

CPU = torch.device("cpu")


def on_host(rankings: list[Ranking], counts: list[int]) -> list[Tensor]:
    return top_indices([partial(Ranking, *ranking) for ranking in rankings], counts, CPU)


def on_device(rankings: list[Ranking], counts: list[int]) -> list[Tensor]:
    """The accelerator's implementation, which runs on the CPU too."""
    return selection._device_top([selection._checked(ranking) for ranking in rankings], counts)


@pytest.fixture(params=[on_host, on_device])
def top(request: pytest.FixtureRequest):
    return request.param


def by_sorting(scores: Tensor, taken: Tensor, count: int) -> list[int]:
    """The oracle: sort (score, flat index) pairs in Python."""
    flat, barred = scores.reshape(-1).tolist(), taken.reshape(-1).tolist()
    free = sorted((i for i in range(len(flat)) if not barred[i]), key=lambda i: (-flat[i], i))
    return sorted(free[:count])


def test_the_best_free_positions_by_flat_index(top):
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.7]])
    taken = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # 0.9 is not free
    found = top([Ranking(scores, taken)], [2])[0]
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 3]


def test_each_tensor_has_its_own_count_and_fewer_free_ones_are_all_returned(top):
    first = Ranking(torch.tensor([5.0, 6.0, 7.0]), torch.zeros(3))
    second = Ranking(torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert [indices.tolist() for indices in top([first, second], [1, 2])] == [[2], [1, 2]]
    assert [indices.tolist() for indices in top([first, second], [9, 4])] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("count", range(7))
def test_equal_scores_go_to_the_lowest_flat_index_in_any_memory_format(top, count):
    taken = torch.zeros(1, 3, 1, 2).to(memory_format=torch.channels_last)
    assert top([Ranking(torch.ones(1, 3, 1, 2), taken)], [count])[0].tolist() == list(range(count))


def test_infinite_scores_rank_at_the_ends(top):
    scores = torch.tensor([-torch.inf, 1.0, torch.inf, -torch.inf])
    assert top([Ranking(scores, torch.zeros(4))], [3])[0].tolist() == [0, 1, 2]


def test_nan_is_refused_where_it_is_free(top):
    scores = torch.tensor([1.0, torch.nan, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        top([Ranking(scores, torch.zeros(3))], [1])
    assert top([Ranking(scores, torch.tensor([0.0, 1.0, 0.0]))], [1])[0].tolist() == [2]


def test_nan_among_many_scores_is_found(top):
    scores = torch.arange(400_000.0)
    scores[123_457] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        top([Ranking(scores, torch.zeros(400_000))], [1000])


def test_no_ranking_gives_none_and_shapes_must_agree():
    ranking = Ranking(torch.tensor([1.0, 2.0]), torch.zeros(2))
    found = top_indices([lambda: None, lambda: ranking, lambda: None], [1, 1, 1], CPU)
    assert found[0] is found[2] is None and found[1].tolist() == [1]
    with pytest.raises(ValueError, match="shape"):
        on_host([Ranking(torch.ones(3), torch.zeros(2))], [1])


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_agree_with_a_sort(top, seed):
    pick, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [pick.choice([(7,), (3, 5), (4, 3, 2, 2), (2, 5, 3, 1), (6, 4, 1, 1), (1, 1)]) for _ in range(4)]
    rankings = []
    for shape in shapes:
        scores = torch.randint(0, pick.choice([2, 5, 1000]), shape, generator=rng).float()  # few values: many ties
        taken = (torch.rand(shape, generator=rng) < pick.choice([0.0, 0.3, 0.9])).float()
        if len(shape) == 4 and pick.random() < 0.7:
            taken = taken.to(memory_format=torch.channels_last)
        rankings.append(Ranking(scores, taken))
    counts = [pick.randint(0, scores.numel() + 1) for scores, _ in rankings]
    expected = [by_sorting(*ranking, count) for ranking, count in zip(rankings, counts, strict=True)]
    assert [indices.tolist() for indices in top(rankings, counts)] == expected


@pytest.mark.parametrize("count", [60, 2000, 30_000])
@pytest.mark.parametrize("distinct", [3, 200, 10**6])
def test_large_tensors_take_the_sampled_path_and_stay_exact(top, count, distinct):
    rng = torch.Generator().manual_seed(count + distinct)
    shape = (128, 96, 5, 5)
    scores = torch.randint(0, distinct, shape, generator=rng).float().to(memory_format=torch.channels_last)
    taken = (torch.rand(shape, generator=rng) < 0.2).float().to(memory_format=torch.channels_last)
    flat_scores, flat_taken = (selection.flat_view(tensor).numpy() for tensor in (scores, taken))
    assert selection._sampled_bound([flat_scores], [flat_taken], count) is not None
    small = Ranking(torch.tensor([3.0, 4.0]), torch.zeros(2))
    found = top([small, Ranking(scores, taken)], [1, count])
    assert found[0].tolist() == [1]
    assert found[1].tolist() == by_sorting(scores, taken, count)


def test_a_misleading_sample_is_noticed():
    scores, taken = torch.zeros(500_000), torch.zeros(500_000)
    runs = scores.view(-1, selection.RUN)
    step = 500_000 // selection.SAMPLE | 1
    runs[::step] = 1.0  # the sample sees nothing else
    count = runs[::step].numel() + 5
    bound = selection._sampled_bound([scores.numpy()], [taken.numpy()], count)
    assert bound is not None and int((scores >= bound).sum()) < count
    assert on_host([Ranking(scores, taken)], [count])[0].tolist() == by_sorting(scores, taken, count)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_are_read_and_written_by_flat_index(memory_format):
    tensor = torch.arange(48.0).view(2, 4, 3, 2).to(memory_format=memory_format)
    there = Positions(torch.tensor([1, 6, 7, 30, 47]))
    assert there.read(tensor).tolist() == [1.0, 6.0, 7.0, 30.0, 47.0]
    there.write(tensor, torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]))
    expected = torch.arange(48.0)
    expected[[1, 6, 7, 30, 47]] = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    assert torch.equal(tensor.reshape(-1), expected)
    there.write(tensor, 0.5)
    assert there.read(tensor).tolist() == [0.5] * 5


def test_one_object_serves_both_memory_formats():
    there = Positions(torch.tensor([2, 9, 17]))
    plain = torch.arange(18.0).view(1, 3, 2, 3)
    assert there.read(plain.to(memory_format=torch.channels_last)).tolist() == there.read(plain).tolist() == [2, 9, 17]


def test_other_strides_are_refused():
    with pytest.raises(ValueError, match="strides"):
        selection.flat_view(torch.zeros(3, 4).T)


def test_map_tensors_keeps_order_and_records_no_gradients():
    weight = torch.ones(2, requires_grad=True)
    doubled = map_tensors(lambda number: (number, (weight * number).requires_grad), CPU, range(20))
    assert doubled == [(number, False) for number in range(20)]


class Transfers(TorchDispatchMode):
    """Counts how often something is fetched from the device: a number read, or a tensor copied elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.seen.append("number")
        if operation is torch.ops.aten._to_copy.default and "device" in (kwargs or {}):
            self.seen.append(kwargs["device"].type)
        return operation(*args, **(kwargs or {}))


def test_tensors_move_in_one_transfer_and_keep_shapes_and_values():
    here = [torch.arange(6.0).view(2, 3), torch.ones(()), torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    with FakeTensorMode():  # as on a GPU, but without values
        there = [torch.empty(tensor.shape, device="cuda") for tensor in here]
        with Transfers() as transfers:
            moved = move_all(there, CPU)
    assert transfers.seen == ["cpu"]
    assert [(tensor.device, tensor.shape) for tensor in moved] == [(CPU, tensor.shape) for tensor in here]
    other = move_all(here, torch.device("cpu", 0))  # another name of the CPU: moved, with values
    assert all(torch.equal(moved, tensor) for moved, tensor in zip(other, here, strict=True))
    assert all(moved is tensor for moved, tensor in zip(move_all(here, CPU), here, strict=True))
    assert move_all([], CPU) == []


def test_counts_of_all_layers_are_read_together():
    """Each number read by itself would make a GPU's queue run dry once a layer."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    set_masks(model, {str(number): torch.arange(9).view(3, 3) < number for number in range(5)})
    record = WeightRegrowth(clone_model(model), "random", Evidence()).apply_regrowth({"0": 2, "3": 1})
    pruner = make_pruner(lambda layers, keep, seed: [alive & (name in "03") for name, alive in
                                                     zip(layers.names, layers.alive, strict=True)])
    with Transfers() as transfers:
        assert count_pruned_params(model) == (45, 10, 35)
        assert list(layer_sparsity(model).values()) == [1 - number / 9 for number in range(5)]
        assert empty_layers(model) == ["0"]
        assert layer_capacities(model, ["1", "4"]) == {"1": 8, "4": 5}
        record.replay(model)
        pruner(model, 0.5)  # 2 + 4 of 13 stay
    assert transfers.seen == []


# ---- at random -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_random_indices_are_exactly_count_free_ones(seed):
    rng = torch.Generator().manual_seed(seed)
    taken = (torch.rand(5, 4, 3, 3, generator=rng) < 0.6).float().to(memory_format=torch.channels_last)
    free = (taken.reshape(-1) == 0).nonzero()[:, 0].tolist()
    for count in {0, 1, len(free) // 2, len(free) // 2 + 1, len(free)}:
        chosen = random_indices(taken, count, rng).tolist()
        assert chosen == sorted(set(chosen)) and len(chosen) == count
        assert set(chosen) <= set(free)
    with pytest.raises(ValueError, match=f"{len(free) + 1} is more than the {len(free)}"):
        random_indices(taken, len(free) + 1, rng)


def test_random_indices_depend_on_the_generator_but_not_on_the_memory_format():
    taken = (torch.rand(6, 5, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    for count in (20, 150):  # the second draws what is left out
        first = random_indices(taken, count, torch.Generator().manual_seed(5))
        again = random_indices(taken.to(memory_format=torch.channels_last), count, torch.Generator().manual_seed(5))
        other = random_indices(taken, count, torch.Generator().manual_seed(6))
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_subset_is_equally_likely(count):
    # 2 of 4 free positions: 6 subsets; 1 or 3: 4. 3000 draws, each frequency within 5 standard deviations
    taken, rng = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), torch.Generator().manual_seed(0)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        subset = tuple(random_indices(taken, count, rng).tolist())
        seen[subset] = seen.get(subset, 0) + 1
    share = 1 / {1: 4, 2: 6, 3: 4}[count]
    assert len(seen) == round(1 / share)
    assert all(abs(n - 3000 * share) < 5 * (3000 * share * (1 - share)) ** 0.5 for n in seen.values())
