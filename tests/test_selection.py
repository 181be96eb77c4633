"""Exact-k selection and apportionment: hand-computed cases, and random ones against a plain sort."""
from __future__ import annotations

import random

import pytest
import torch

from utils import selection
from utils.allocation import apportion
from utils.selection import exact_k_mask, exact_k_masks


def by_sorting(scores: torch.Tensor, k: int, eligible: torch.Tensor | None = None) -> torch.Tensor:
    """The oracle: sort (score, position) pairs in Python."""
    flat = scores.reshape(-1).tolist()
    open_ = [True] * len(flat) if eligible is None else eligible.reshape(-1).tolist()
    ranked = sorted((i for i in range(len(flat)) if open_[i]), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[ranked[:k]] = True
    return mask.view(scores.shape)


def on_device(scores: list[torch.Tensor], k: int, eligible: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The accelerator's implementation, which runs on the CPU too."""
    return selection._device_masks(scores, k, eligible)


@pytest.fixture(params=["host", "device"])
def select(request: pytest.FixtureRequest):
    return exact_k_masks if request.param == "host" else on_device


def test_the_highest_scores_are_taken(select):
    mask = select([torch.tensor([[0.1, 0.9], [0.5, 0.7]])], 2)[0]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, True], [False, True]]


def test_ties_go_to_the_lowest_position(select):
    # 3 is taken; of the four 2s the first two, flat positions 0 and 2
    assert select([torch.tensor([2.0, 1.0, 2.0, 3.0, 2.0, 2.0])], 3)[0].tolist() == [1, 0, 1, 1, 0, 0]


def test_ties_across_tensors_go_in_list_order(select):
    first, second = select([torch.tensor([5.0, 5.0]), torch.tensor([[5.0], [6.0]])], 3)
    assert first.tolist() == [True, True]
    assert second.tolist() == [[False], [True]]


@pytest.mark.parametrize("k", range(7))
def test_all_equal_scores_still_give_exactly_k(select, k):
    masks = select([torch.zeros(2, 2), torch.zeros(2)], k)
    assert torch.cat([mask.flatten() for mask in masks]).tolist() == [True] * k + [False] * (6 - k)


def test_only_eligible_positions_are_taken(select):
    scores, eligible = torch.tensor([9.0, 8.0, 1.0, 7.0]), torch.tensor([False, True, True, False])
    assert select([scores], 1, [eligible])[0].tolist() == [0, 1, 0, 0]
    assert select([scores], 2, [eligible])[0].tolist() == [0, 1, 1, 0]


def test_infinite_scores_rank_at_the_ends_and_do_not_open_ineligible_positions(select):
    scores = torch.tensor([-torch.inf, torch.inf, -torch.inf, 0.0])
    eligible = torch.tensor([False, True, True, True])
    assert select([scores], 1, [eligible])[0].tolist() == [0, 1, 0, 0]
    assert select([scores], 3, [eligible])[0].tolist() == [0, 1, 1, 1]
    assert select([scores], 0, [eligible])[0].tolist() == [0, 0, 0, 0]


def test_bad_k_is_refused(select):
    scores, eligible = [torch.ones(4)], [torch.tensor([1, 1, 0, 0]).bool()]
    with pytest.raises(ValueError, match="5 is more than the 4"):
        select(scores, 5)
    with pytest.raises(ValueError, match="3 is more than the 2"):
        select(scores, 3, eligible)
    with pytest.raises(ValueError, match="negative"):
        exact_k_masks(scores, -1)
    with pytest.raises(TypeError):
        exact_k_masks(scores, 1.5)
    with pytest.raises(ValueError, match="shapes"):
        exact_k_mask(scores[0], 1, torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_nan_is_refused_where_it_is_eligible(select, k):
    scores = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    with pytest.raises(ValueError, match="NaN"):
        select([scores], k)
    eligible = torch.tensor([True, False, True, True])
    assert int(select([scores], k, [eligible])[0].sum()) == k


def test_nan_among_many_scores_is_found_whatever_k():
    scores = torch.arange(200_000.0)
    scores[123_457] = torch.nan  # not on the sample's stride
    for k in (0, 10, 100_000):
        with pytest.raises(ValueError, match="NaN"):
            exact_k_mask(scores, k)


def test_an_empty_list_selects_nothing():
    assert exact_k_masks([], 0) == []
    with pytest.raises(ValueError, match="more than the 0"):
        exact_k_masks([], 1)


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_agree_with_a_sort(select, seed):
    pick, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [pick.choice([(7,), (3, 5), (2, 3, 4), (4, 3, 2, 2), (1, 1), ()]) for _ in range(pick.randint(1, 4))]
    # few distinct values: many ties
    scores = [torch.randint(0, pick.choice([2, 5, 1000]), shape, generator=rng).float() for shape in shapes]
    eligible = [torch.rand(shape, generator=rng) < pick.choice([0.3, 0.9, 1.1]) for shape in shapes]
    k = pick.randint(0, sum(int(e.sum()) for e in eligible))
    masks = select(scores, k, eligible)
    assert [mask.shape for mask in masks] == [s.shape for s in scores]
    joined = by_sorting(torch.cat([s.flatten() for s in scores]), k, torch.cat([e.flatten() for e in eligible]))
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), joined)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_every_score_type_is_compared_exactly(dtype):
    scores = torch.tensor([3, 1, 2, 3], dtype=dtype)
    assert exact_k_mask(scores, 2).tolist() == [1, 0, 0, 1]


def test_float64_scores_are_not_rounded():
    assert exact_k_masks([torch.tensor([1.0]), torch.tensor([1.0 + 1e-12], dtype=torch.float64)], 1)[1].item()


@pytest.mark.parametrize("k", [50, 400, 5000])
@pytest.mark.parametrize("distinct", [3, 100, 10**6])
def test_large_tensors_take_the_sampled_path_and_stay_exact(k, distinct):
    rng = torch.Generator().manual_seed(k + distinct)
    scores = [torch.randint(0, distinct, (n,), generator=rng).float() for n in (90_000, 17, 60_000)]
    eligible = [torch.rand(s.shape, generator=rng) < 0.8 for s in scores]
    taken = [~e.numpy() for e in eligible]
    assert selection._sampled_bound([s.numpy() for s in scores], taken, k) is not None
    joined = by_sorting(torch.cat(scores), k, torch.cat(eligible))
    assert torch.equal(torch.cat(exact_k_masks(scores, k, eligible)), joined)
    assert torch.equal(torch.cat(on_device(scores, k, eligible)), joined)


def test_a_misleading_sample_is_noticed():
    scores = torch.zeros(500_000)
    runs = scores.view(-1, selection.RUN)[:: scores.numel() // selection.SAMPLE | 1]
    runs += 1 + torch.rand(runs.shape, generator=torch.Generator().manual_seed(0))
    k = 10 + runs.numel() // 5  # the sample sees only high scores: its bound lets too few others pass
    bound = selection._sampled_bound([scores.numpy()], [None], k)
    assert bound is not None and int((scores >= bound).sum()) < k
    assert torch.equal(exact_k_mask(scores, k), by_sorting(scores, k))


def test_memory_format_does_not_change_the_answer(select):
    rng = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (6, 5, 3, 3), generator=rng).float()
    eligible = torch.rand(scores.shape, generator=rng) < 0.7
    expected = by_sorting(scores, 60, eligible)
    last = {"memory_format": torch.channels_last}
    for s in (scores, scores.to(**last), scores.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        for e in (eligible, eligible.to(**last)):
            assert torch.equal(select([s], 60, [e])[0], expected)


def test_inputs_are_left_alone():
    scores, eligible = torch.rand(100_000, requires_grad=True), torch.ones(100_000, dtype=torch.bool)
    before = scores.detach().clone()
    exact_k_mask(scores, 10, eligible)
    assert torch.equal(scores, before) and eligible.all()


# ---- apportion ------------------------------------------------------------------------------------------------------


def test_shares_are_rounded_by_largest_remainder():
    # 10 * (5, 3, 1)/9 = 5.56, 3.33, 1.11: floors 5, 3, 1, and the one left goes to .56
    assert apportion([5, 3, 1], 10, [99, 99, 99]) == [6, 3, 1]
    # 10 * (1, 3, 5)/9 = 1.11, 3.33, 5.56: the last has the largest remainder, the first the smallest
    assert apportion([1, 3, 5], 10, [99, 99, 99]) == [1, 3, 6]
    # 5 * (9, 8, 13)/30 = 1.5, 1.33, 2.17: the largest remainder is neither the last nor that of the largest share
    assert apportion([8, 9, 13], 5, [99, 99, 99]) == [1, 2, 2]


def test_equal_remainders_go_by_position():
    # 8/3 = 2.67 each: floors 2, 2, 2; the two left go to the first two
    assert apportion([0.1, 0.1, 0.1], 8, [9, 9, 9]) == [3, 3, 2]


def test_a_full_layer_passes_its_surplus_to_the_others_in_proportion():
    # 12 * (6, 2, 1)/9 = 8, 2.67, 1.33; the first takes only 3, leaving 9 * (2, 1)/3 = 6, 3
    assert apportion([6, 2, 1], 12, [3, 10, 10]) == [3, 6, 3]
    # filling the first pushes the second (6) over its capacity 5 too: 3, 5 and 4
    assert apportion([6, 2, 1], 12, [3, 5, 10]) == [3, 5, 4]


def test_more_than_everything_fills_everything():
    assert apportion([1, 0, 2], 100, [3, 4, 5]) == [3, 4, 5]


def test_zero_shares_get_nothing_until_the_others_are_full():
    assert apportion([0, 1], 5, [10, 5]) == [0, 5]
    assert apportion([0, 1, 0], 8, [4, 5, 2]) == [2, 5, 1]  # 3 left over capacities 4 and 2: 2 and 1
    assert apportion([0, 0], 3, [4, 2]) == [2, 1]


def test_nothing_to_divide():
    assert apportion([1, 2], 0, [5, 5]) == [0, 0]
    assert apportion([], 5, []) == []
    assert apportion([1, 1], 4, [0, 9]) == [0, 4]


@pytest.mark.parametrize(
    ("shares", "total", "capacity"),
    [([1], 1, [1, 2]), ([-1.0, 2], 1, [1, 2]), ([float("nan")], 1, [1]), ([float("inf")], 1, [1]), ([1], -1, [1]),
     ([1], 1, [-1])],
)
def test_bad_input_is_refused(shares, total, capacity):
    with pytest.raises(ValueError):
        apportion(shares, total, capacity)


@pytest.mark.parametrize("seed", range(60))
def test_apportionment_is_exact_bounded_and_proportional(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 12)
    shares = [rng.choice([0.0, rng.random(), rng.random() * 1e6]) for _ in range(n)]
    capacity = [rng.choice([0, rng.randint(1, 50), rng.randint(1, 10**6)]) for _ in range(n)]
    total = rng.randint(0, sum(capacity) + 10)
    parts = apportion(shares, total, capacity)
    assert sum(parts) == min(total, sum(capacity))
    assert all(0 <= part <= limit for part, limit in zip(parts, capacity, strict=True))
    free = [i for i in range(n) if shares[i] > 0 and parts[i] < capacity[i]]
    assert not free or all(parts[i] == 0 for i in range(n) if shares[i] == 0)
    for i in free:  # unfilled layers get their share up to rounding, and full ones would have got no less
        for j in free:
            assert (parts[i] - 1) * shares[j] <= (parts[j] + 1) * shares[i] * (1 + 1e-9)
    assert parts == apportion([share * 4 for share in shares], total, capacity)  # scale does not matter
