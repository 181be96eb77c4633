"""Paired comparisons: values by hand, a false-positive rate as promised, and effects that are found."""
from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from utils.statistics import compare_arms, holm, paired_difference


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_the_smallest_effect_shows_in_four_of_five_experiments(pairs):
    """A true effect of that size, in 100,000 experiments of so many pairs each."""
    noise = np.random.default_rng(1).standard_normal((100_000, pairs))
    unit = paired_difference([1.0] + [0.0] * (pairs - 1), [0.0] * pairs)
    effect = unit["detectable"] / unit["std"]  # in standard deviations
    shown = stats.ttest_1samp(noise + effect, 0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.005)


def test_by_hand():
    found = paired_difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    # differences 1, 2, 3: mean 2, std 1, standard error 0.577, t quantile 4.303 at two degrees of freedom
    assert (found["pairs"], found["mean"], found["std"]) == (3, 2.0, 1.0)
    assert (found["t_low"], found["t_high"]) == (pytest.approx(2 - 2.484, abs=1e-3), pytest.approx(2 + 2.484, abs=1e-3))
    assert found["p"] == pytest.approx(stats.ttest_rel([3, 5, 7], [2, 3, 4]).pvalue)
    assert found["verdict"] == "indistinguishable"
    assert found["detectable"] == pytest.approx(5.653 * 0.57735, abs=2e-3)  # tables of the noncentral t: 5.65
    assert 1.0 <= found["bootstrap_low"] < 2 < found["bootstrap_high"] <= 3.0


def test_direction_and_extremes():
    assert paired_difference([1, 2, 3.01], [0.9, 1.9, 2.9])["verdict"] == "better"
    assert paired_difference([1, 2, 2.99], [1.1, 2.1, 3.1])["verdict"] == "worse"
    single = paired_difference([5.0], [1.0])
    assert single["verdict"] == "one pair, no verdict" and single["detectable"] == np.inf
    for arm in ([1, 2, 3], [1.1, 2.1, 3.1]):  # differences without spread, but for rounding
        found = paired_difference(arm, [1, 2, 3])
        assert (found["verdict"], found["p"], found["t_high"]) == ("indistinguishable", 1.0, np.inf)
    saved = [float(f"{100 * right / 3000:.6g}") for right in (2443, 2450, 2436, 2443)]  # 81.4333, 81.6667, ...
    assert paired_difference(saved[2:], saved[:2])["verdict"] == "indistinguishable"  # -7 images of 3,000 in both
    for pair in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="pairs"):
            paired_difference(*pair)


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_a_null_effect_is_called_indistinguishable(pairs):
    """Over 200 simulated studies with the noise of seeds (0.25 points) at most 7 % are called better or worse."""
    random = np.random.RandomState(pairs)
    wrong = sum(paired_difference(*random.normal(90, 0.25, (2, pairs)))["verdict"] != "indistinguishable"
                for _ in range(200))
    assert wrong <= 14


@pytest.mark.parametrize("pairs, least", [(3, 0.75), (5, 0.97)])
def test_an_effect_of_one_point_is_found(pairs, least):
    random = np.random.RandomState(1)
    shared = random.normal(90, 0.5, (200, pairs))  # the seeds' own level, which pairing takes out
    arms = shared + 1.0 + random.normal(0, 0.2, shared.shape), shared + random.normal(0, 0.2, shared.shape)
    found = sum(paired_difference(arm, control)["verdict"] == "better" for arm, control in zip(*arms))
    assert found >= least * 200


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_one_of_several_comparisons_is_decided_by_the_adjusted_p():
    """1.16, 1.52 and 0.78 have p 0.033, alone better; of two comparisons 0.065."""
    values = {"control": (70.0, 70.0, 70.0), "a": (71.16, 71.52, 70.78), "b": (70.1, 69.8, 70.05)}
    rows = [{"arm": arm, "target": 0.9, "seed": seed, "test_acc": value, "search_epochs": 0, "seconds": 1.0}
            for arm, own in values.items() for seed, value in enumerate(own)]
    (alone,) = compare_arms([row for row in rows if row["arm"] != "b"], "control", list(values))
    first, other = compare_arms(rows, "control", list(values))
    assert (alone["verdict"], round(alone["p_holm"], 3)) == ("better", 0.033)
    assert (first["verdict"], round(first["p_holm"], 3)) == ("not shown", 0.065)
    assert other["verdict"] == "indistinguishable" and other["p_holm"] > 0.5
    once = {**rows[0], "arm": "once"}  # a single pair is no test, and no reason to adjust for one more
    *same, last = compare_arms([*rows, once], "control", [*values, "once"])
    assert same == [first, other] and (last["verdict"], last["p_holm"]) == ("one pair, no verdict", 1.0)
