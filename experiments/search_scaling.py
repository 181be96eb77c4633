#!/usr/bin/env python
"""What more processes make of a search: trials per hour as measured, and how long processes wait for each other.

Measured: a round of short trials by each of --processes on this machine, one thread each, in turn --repeats times.
Simulated: the search itself (ten updates, rungs 1 3 9, no budget) on --simulated processes, with rewards at random and
trials that take what measured ones took, scaled to the rung. Idle is the share of all processes' time in which they
wait for the end of a round. Starts from the checkpoints of `main.py --m_name ... --pruner magnitude --iter_end 1`.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import plots, stage2  # noqa: E402, I001  first: it says which packages are missing

import numpy as np  # noqa: E402

from utils.allocation import ALLOCATORS, AllocationProblem  # noqa: E402
from utils.checkpoint import save_csv  # noqa: E402
from utils.common import RunFailed, UserError, epoch_count, fraction, generator, positive_int  # noqa: E402
from utils.controller import RegrowthPolicyGradient, SearchConfig  # noqa: E402
from utils.distributed import World, world  # noqa: E402
from utils.methods import regrowth_arguments  # noqa: E402
from utils.run import DATA_OPTIONS, open_run, run_parser, script  # noqa: E402
from utils.stage import check_same_files  # noqa: E402

IDLE = 0.2  # the largest share that is acceptable
RUNGS = (1, 3, 9)
Row = dict[str, Any]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = run_parser(__doc__, resumable=False)
    parser.add_argument("--processes", type=positive_int, nargs="+", default=[1, 2], help="to measure; 1 always is")
    parser.add_argument("--trials", type=positive_int, default=8, help="of each length in a measured round")
    parser.add_argument("--mini_finetune_epochs", type=epoch_count, nargs=2, default=[0.1, 0.3],
                        help="lengths of the measured trials")
    parser.add_argument("--repeats", type=positive_int, default=2, help="measured rounds for each number of processes")
    parser.add_argument("--simulated", type=positive_int, nargs="+", default=[8, 64], help="processes to simulate")
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+",
                        default=[2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512], help="to simulate")
    parser.add_argument("--target_sparsity", type=fraction, default=0.97, help="of the measured trials")
    parser.add_argument("--save_dir", type=Path, help="default: search_scaling/{m_name} under --root")
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)  # one measured round, under torchrun
    args = parser.parse_args(argv)
    if len(set(args.mini_finetune_epochs)) < 2:
        raise UserError("--mini_finetune_epochs: seconds are a line through two lengths; give two different ones")
    args.processes = sorted({1, *args.processes})  # trials of one process alone give the times that are simulated
    return args


# --- measured ------------------------------------------------------------------------------------------------------


def measure_round(args: argparse.Namespace) -> None:
    """Trains a round of trials with the processes there are; prints its seconds and those of each trial, as JSON."""
    run, processes = open_run(args), world()
    step = stage2.first_step(run, regrowth_arguments(
        "reference", m_name=args.m_name, **{name: getattr(args, name) for name in DATA_OPTIONS},
        root=args.root, target_sparsity=args.target_sparsity, ssim_batches=1))
    check_same_files(processes, {**run.identity(), "start": step.start.digest, "budget": step.budget})
    if not processes.leads:
        step.problem = AllocationProblem(**processes.share())  # its layers in the leader's order
        processes.serve(step.reward)
        return
    processes.share(asdict(step.problem))
    draws, trials = generator(run.seed, "scaling"), []
    jobs = [(ALLOCATORS["random"](step.problem, draws), run.seed, epochs)
            for epochs in sorted(args.mini_finetune_epochs, reverse=True) for _ in range(args.trials)]
    processes.run(step.reward, jobs[-processes.size:], lambda *_: None)  # the first of every process takes longer
    began = time.perf_counter()
    processes.run(step.reward, jobs, lambda number, _, seconds: trials.append((jobs[number][2], seconds)))
    seconds = time.perf_counter() - began
    processes.share()
    print(json.dumps({"seconds": seconds, "trials": trials}))


def measure(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """What `measure_round` prints in so many processes of one thread each. UserError with its error."""
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__, *sys.argv[1:]]
    done = subprocess.run([sys.executable, "-m", *words, "--round"], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(errors[0].removeprefix("error: ")) if errors else RunFailed(done.stderr[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def measured_rows(args: argparse.Namespace) -> tuple[list[Row], list[tuple[float, float]]]:
    """Trials per hour for each number of processes and repeat, and (epochs, seconds) of the trials of one alone."""
    rows, trials = [], []
    for repeat in range(1, args.repeats + 1):
        for processes in args.processes:
            told = measure(args, processes)
            per_hour = 3600 * len(told["trials"]) / told["seconds"]
            rows.append({"repeat": repeat, "processes": processes, "trials": len(told["trials"]),
                         "seconds": told["seconds"], "trials_per_hour": per_hour})
            print(f"processes {processes}: {per_hour:.0f} trials an hour", flush=True)
            trials += told["trials"] if processes == 1 else []
    return rows, [tuple(trial) for trial in trials]


def trial_times(trials: Sequence[tuple[float, float]], seed: int) -> Callable[[float], float]:
    """Gives seconds of a trial of so many epochs: a line through the measured ones, times one of their deviations."""
    epochs, seconds = np.array(trials).T
    line = np.polynomial.Polynomial.fit(epochs, seconds, 1).convert()
    ratios, random = seconds / line(epochs), np.random.default_rng(seed)
    return lambda length: float(line(length) * random.choice(ratios))


# --- simulated -----------------------------------------------------------------------------------------------------


class Simulated(World):
    """So many processes, of which the one that is free first takes the next trial; nothing is trained."""

    def __init__(self, processes: int, seconds_of: Callable[[float], float], seed: int):
        """No time has passed."""
        self.processes, self.seconds_of = processes, seconds_of
        self.random, self.elapsed, self.busy = np.random.default_rng(seed), 0.0, 0.0

    def run(self, function: Any, jobs: Sequence[tuple], on_result: Callable[..., None]) -> None:
        """As of `World`, with rewards at random."""
        free = np.zeros(self.processes)
        for *_, epochs in jobs:
            free[free.argmin()] += self.seconds_of(epochs)
        self.elapsed += free.max()
        self.busy += free.sum()
        for number in range(len(jobs)):
            on_result(number, float(self.random.uniform()), 0.0)


def simulated_rows(args: argparse.Namespace, trials: Sequence[tuple[float, float]]) -> list[Row]:
    """Idle share for every number of processes and batch size."""
    problem = AllocationProblem(tuple("abcdefgh"), (10**6,) * 8, 10**6, (2 * 10**6,) * 8, (100,) * 8)
    rows = []
    for processes, batch in product(args.simulated, args.batch_sizes):
        simulated = Simulated(processes, trial_times(trials, args.seed), args.seed)
        config = SearchConfig(batch_size=batch, rungs=RUNGS, search_budget=None, action_space="ratio")
        RegrowthPolicyGradient(problem, lambda *_: 0.0, config, args.seed, simulated).run()
        rows.append({"processes": processes, "batch_size": batch,
                     "idle": float(1 - simulated.busy / simulated.elapsed / processes),
                     "hours": float(simulated.elapsed / 3600)})
    return rows


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Idle share against batch size, a line for each number of processes."""
    figure = plots.new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for processes in sorted({row["processes"] for row in rows}):
        own = [row for row in rows if row["processes"] == processes]
        axes.plot([row["batch_size"] for row in own], [100 * row["idle"] for row in own], marker=".",
                  label=f"{processes} processes")
    axes.axhline(100 * IDLE, color="0.5", linewidth=0.8)
    axes.set(xscale="log", xlabel="--batch_size (episodes per update)", ylabel="idle (% of all processes' time)",
             title=title)
    axes.grid(alpha=0.3)
    plots.legend_below(figure)
    plots.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, simulates, draws, and says which batch size keeps processes busy."""
    args = parse_args(argv)
    if args.round:
        measure_round(args)
        return
    folder = args.save_dir or args.root / "search_scaling" / args.m_name
    measured, trials = measured_rows(args)
    save_csv(measured, folder / "measured.csv")
    rows = simulated_rows(args, trials)
    save_csv(rows, folder / "simulated.csv")
    draw(rows, folder / "idle.png", f"{args.m_name}: a search of ten updates, rungs {' '.join(map(str, RUNGS))}")
    for processes in args.simulated:
        idle = {row["batch_size"]: row["idle"] for row in rows if row["processes"] == processes}
        good = [batch for batch in sorted(idle) if idle[batch] < IDLE]
        sure = [batch for batch in good if all(idle[other] < IDLE for other in idle if other >= batch)]
        said = f"at --batch_size {min(good)}, and at all from {min(sure)} on" if sure else "at none of the largest"
        print(f"{processes} processes: idle below {100 * IDLE:.0f} % {said}")
    print(f"tables and figure: {folder}")


if __name__ == "__main__":
    script(main, resumable=False, several=True)
