"""The simulated processes by hand, and a search on them."""
from __future__ import annotations

import argparse

import pytest

from experiments import search_scaling as scaling


def jobs(*lengths: int) -> list[tuple]:
    return [((), 0, length) for length in lengths]


def test_the_process_that_is_free_first_takes_the_next_trial():
    """9, 3, 3, 3, 1, 1 on two: one takes the 9, the other 3 + 3 + 3, and each a 1."""
    simulated, results = scaling.Simulated(2, float, seed=0), []
    simulated.run(None, jobs(9, 3, 3, 3, 1, 1), lambda number, *_: results.append(number))
    assert (simulated.elapsed, simulated.busy, results) == (10, 20, list(range(6)))
    simulated.run(None, jobs(3), lambda number, *_: results.append(number))  # a round begins when the one before ends
    assert (simulated.elapsed, simulated.busy) == (13, 23)


def test_times_of_longer_trials_lie_on_the_line_through_the_measured_ones():
    seconds_of = scaling.trial_times([(0.1, 4.0), (0.1, 4.0), (0.3, 6.0), (0.3, 6.0)], seed=0)
    assert seconds_of(9) == pytest.approx(3 + 10 * 9)
    spread = scaling.trial_times([(0.1, 3.0), (0.1, 5.0), (0.3, 6.0), (0.3, 6.0)], seed=0)
    assert {round(spread(1) / 13, 2) for _ in range(50)} == {0.75, 1.0, 1.25}


def test_larger_batches_leave_processes_less_idle():
    args = argparse.Namespace(seed=0, simulated=[4, 1], batch_sizes=[2, 16])
    trials = [(0.1, seconds) for seconds in (10.9, 11.1)] + [(0.3, seconds) for seconds in (30.9, 31.1)]
    idle = {(row["processes"], row["batch_size"]): row["idle"] for row in scaling.simulated_rows(args, trials)}
    assert idle[4, 16] < 0.1 < 0.3 < idle[4, 2]  # two of four processes have nothing to do while a batch of two runs
    assert idle[1, 2] == idle[1, 16] == pytest.approx(0, abs=1e-9)
