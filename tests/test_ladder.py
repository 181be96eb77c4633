"""Who is trained for longer, and what it costs, on rewards written by hand."""
from __future__ import annotations

import pytest

from utils.agent import Ladder
from utils.common import UserError


def climb(ladder: Ladder, next_trials, reward) -> list:
    """Pays for promotions, round by round, until there is none; returns the trials."""
    climbed = []
    while trials := next_trials():
        for trial in trials:
            ladder.record(trial, reward(trial))
        climbed += trials
    return climbed


def test_ladder_promotes_the_best_third_of_every_rung():
    ladder = Ladder((1, 3, 9), eta=3)
    for i, reward in enumerate([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.65]):
        ladder.record(((i,), 1), reward)
    # 3 of 9, the best first; then 1 of 3, by their rewards there.
    assert climb(ladder, ladder.promotions, lambda trial: trial[0][0] / 10) == [
        ((7,), 3), ((8,), 3), ((6,), 3), ((8,), 9)]
    assert ladder.spent == 9 * 1 + 3 * 3 + 9
    assert ladder.leader() == ((8,), 9)  # the only one at the top


def test_a_budget_takes_a_leader_to_the_top_and_spends_what_is_left():
    ladder = Ladder((1, 3, 9), eta=3, budget=20)
    for i in range(4):
        ladder.record(((i,), 1), i / 10)
    # 2 of 4 go on (a third, rounded up); on the second rung the order turns round; 1 epoch of 20 is left.
    assert climb(ladder, ladder.promotions, lambda trial: 1 - trial[0][0] / 10) == [
        ((3,), 3), ((2,), 3), ((2,), 9)]
    assert ladder.spent == 19 and ladder.leader() == ((2,), 9)
    ladder.budget = 1000
    climb(ladder, ladder.promotions, lambda trial: 0.5)
    assert ladder.spent == 4 * (1 + 3 + 9)


def test_standards_go_up_behind_the_leader_to_be_compared_with():
    """Ten candidates; 0, 1 and 2 are standards. After 10 epochs 3 each for 9 (who leads), 2, 1 (the best standards) and
    8, which leave 18 of 40 for two climbs to the top: of who leads there, and of the best standard there.
    """
    ladder = Ladder((1, 3, 9), eta=3, budget=40)
    for i in range(10):
        ladder.record(((i,), 1), i / 10)
    values = {9: 0.5, 2: 0.1, 1: 0.2, 8: 0.6}
    assert climb(ladder, lambda: ladder.promotions({(0,), (1,), (2,)}), lambda trial: values[trial[0][0]]) == [
        ((9,), 3), ((2,), 3), ((1,), 3), ((8,), 3), ((8,), 9), ((1,), 9)]
    assert ladder.spent == 40 and ladder.leader() == ((8,), 9)


def test_a_budget_for_one_climb_is_the_leaders():
    ladder = Ladder((1, 3, 9), eta=3, budget=16)
    for i in range(4):
        ladder.record(((i,), 1), i / 10)
    assert climb(ladder, lambda: ladder.promotions({(0,), (1,)}), lambda trial: 0.5) == [((3,), 3), ((3,), 9)]


def test_new_candidates_leave_the_way_to_the_top_open():
    ladder = Ladder((1, 3, 9), eta=3, budget=20)
    for i in range(4):
        ladder.record(((i,), 1), i / 10)
    new = [((i,), 1) for i in range(4, 8)]
    assert ladder.affords(new)  # 4 + 4 are 8, and 12 of 20 take one of them up
    assert ladder.affords(new + new + [((0,), 1)])  # doubles and what was paid for cost nothing
    assert not ladder.affords([*new, ((8,), 1)])
    assert Ladder((1, 3, 9), eta=3).affords(new * 1000)


@pytest.mark.parametrize(("budget", "rungs"), [(None, (1, 3, 9)), (13, (1, 3, 9)), (12, (1, 3)), (3, (1,))])
def test_rungs_that_the_budget_cannot_reach_are_left_out(budget, rungs):
    assert Ladder((1, 3, 9), 3, budget).rungs == rungs


def test_a_budget_that_pays_exactly_is_enough_whatever_floating_point_makes_of_it():
    assert 100 * 0.07 > 7 and Ladder((0.07, 1), 3, 7, batch=100).rungs == (0.07,)
    with pytest.raises(UserError, match="100 candidates for 0.07 epochs take 7;"):
        Ladder((0.07, 1), 3, 6, batch=100)


def test_equal_rewards_are_ranked_by_arrival():
    ladder = Ladder((1, 2), eta=2)
    for i in (3, 1, 2):
        ladder.record(((i,), 1), 0.5)
    assert ladder.ranked(1) == [(3,), (1,), (2,)] and ladder.leader() == ((3,), 1)
    with pytest.raises(ValueError, match="no candidate"):
        Ladder((1,), 2).leader()
