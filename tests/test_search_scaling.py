"""The simulated processes by hand, and a search on them."""
from __future__ import annotations

import argparse

import numpy as np
import pytest

from experiments import search_scaling as scaling


def jobs(*lengths: int) -> list[tuple]:
    return [((), 0, length) for length in lengths]


@pytest.mark.parametrize(("beside", "elapsed"), [(True, 10), (False, 1 + 6 + 9)])
def test_the_process_that_is_free_first_takes_the_next_trial(beside, elapsed):
    """9, 3, 3, 3, 1, 1 on two: one takes the 9, the other 3 + 3 + 3, and each a 1; or 1 | 1, then 3 + 3 | 3, then 9."""
    simulated, results = scaling.Simulated(2, float, beside, seed=0), []
    simulated.run(None, jobs(9, 3, 3, 3, 1, 1), lambda number, *_: results.append(number))
    assert (simulated.elapsed, simulated.busy, results) == (elapsed, 20, list(range(6)))


def test_times_of_longer_trials_lie_on_the_line_through_the_measured_ones():
    seconds_of = scaling.trial_times([(0.1, 4.0), (0.1, 4.0), (0.3, 6.0), (0.3, 6.0)], seed=0)
    assert seconds_of(9) == pytest.approx(3 + 10 * 9)
    spread = scaling.trial_times([(0.1, 3.0), (0.1, 5.0), (0.3, 6.0), (0.3, 6.0)], seed=0)
    assert {round(spread(1) / 13, 2) for _ in range(50)} == {0.75, 1.0, 1.25}


def test_promotions_beside_the_next_batch_leave_processes_less_idle():
    args = argparse.Namespace(seed=0, simulated=[4], batch_sizes=[4, 24])
    trials = [(0.1, seconds) for seconds in (10.9, 11.1)] + [(0.3, seconds) for seconds in (30.9, 31.1)]
    idle = {(row["promotions"], row["batch_size"]): row["idle"] for row in scaling.simulated_rows(args, trials)}
    assert idle["beside", 24] < 0.1 < idle["after", 24] and idle["beside", 4] < idle["after", 4]
    assert all(0 <= share < 1 for share in idle.values()) and np.isfinite(list(idle.values())).all()
