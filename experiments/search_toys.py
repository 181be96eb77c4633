#!/usr/bin/env python
"""Does the search find better allocations than random ones, for as many epochs? On problems whose answer is known.

No network is trained: a toy's reward is a formula of the allocation, so that every allocation can be tried and the best
is known. Eight layers of unlike sizes in any order of priority share a budget; a reward after few epochs is lower, off
in a direction of its own, and noisy. Four toys: each layer saturates on its own (separable), a network conducts as its
layers in series do (interacting), two peaks of which the lower one is where the proportional rule lies (deceptive), and
separable with more noise (noisy). Searches of one seed are paired: same toy, same budget.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils.agent import ActionSpace, Rollout  # noqa: E402, I001  first: it says which packages are missing

import numpy as np  # noqa: E402
import torch  # noqa: E402

from utils.allocation import ALLOCATORS, AllocationProblem  # noqa: E402
from utils.checkpoint import save_csv, save_json  # noqa: E402
from utils.common import count, positive_int  # noqa: E402
from utils.controller import RegrowthPolicyGradient, SearchConfig  # noqa: E402
from utils.run import ArgumentParser, command_line, cpu_name, script  # noqa: E402
from utils.statistics import holm, paired_difference  # noqa: E402

SIZES, BUDGET = (4, 8, 8, 16, 16, 32, 32, 64), 20
NOISE = {"separable": 0.003, "interacting": 0.003, "deceptive": 0.003, "noisy": 0.01}  # after one epoch, accuracy


class Toy:
    """A problem and its reward; `kind` is one of `NOISE`, `seed` draws the layers' order and their gains."""

    def __init__(self, kind: str, seed: int):
        """Nothing is evaluated yet."""
        draws = np.random.default_rng([seed, *map(ord, kind)])
        sizes = draws.permutation(SIZES)
        self.kind, self.seed, self.top = kind, seed, SearchConfig.rungs[-1]
        fan = tuple(int(6 + 6 * math.sqrt(size)) for size in sizes)  # as of convolutions of so many weights
        self.problem = AllocationProblem(tuple(f"layer{i}" for i in range(len(sizes))), tuple(sizes.tolist()), BUDGET,
                                         tuple(sizes.tolist()), fan)
        self.proportional = BUDGET * sizes / sizes.sum()
        self.gain = draws.lognormal(0, 0.7, len(sizes))
        self.need = self.proportional * draws.lognormal(0, 0.5, len(sizes)) + 0.5  # weights until a layer saturates
        self.early = draws.normal(0, 0.5, len(sizes))  # in what few epochs are misleading
        peak = self.proportional ** -0.3 * draws.lognormal(0, 0.7, len(sizes))
        peak = np.minimum(BUDGET * peak / peak.sum(), sizes)
        self.peak = BUDGET * peak / peak.sum()

    def __call__(self, allocation: Sequence[int], seed: int, epochs: float) -> float:
        """The reward of a trial, in [0, 1]; the same whenever it is asked for."""
        noise = np.random.default_rng([self.seed, *epochs.as_integer_ratio(), *allocation]).standard_normal()
        reward = self.expected(np.array(allocation, float), epochs) + NOISE[self.kind] / epochs * noise
        return float(np.clip(reward, 0, 1))

    def expected(self, allocations: np.ndarray, epochs: float) -> np.ndarray:
        """(..., layers) -> (...): rewards without noise."""
        gain = self.gain * np.exp(self.early / epochs * (epochs < self.top))
        gain /= gain.sum()
        if self.kind == "deceptive":
            near, far = (np.abs(allocations - point).sum(-1) / 2 / BUDGET for point in (self.proportional, self.peak))
            value = np.maximum(0.68 - 0.3 * near, 0.72 - 0.15 * far)
        elif self.kind == "interacting":
            value = 0.75 - 0.3 / (1 + 1 / (gain * (self.need + 0.3) / (allocations + 0.3)).sum(-1))
        else:
            value = 0.75 - 0.3 * (gain * np.exp(-allocations / self.need)).sum(-1)
        return value - 0.1 / epochs

    def best_rule(self) -> float:
        """The highest reward of a plain rule, random not among them, after as many epochs as the search ends with."""
        return max(self(rule(self.problem, torch.Generator()), 0, self.top) for name, rule in ALLOCATORS.items()
                   if name != "random")

    def optimum(self) -> float:
        """The highest expected reward of all allocations."""
        return float(self.expected(every_allocation(self.problem), self.top).max())


def every_allocation(problem: AllocationProblem) -> np.ndarray:
    """(allocations, layers): all that spend the budget within the capacities."""
    found, left = np.zeros((1, 0), np.int64), np.array([problem.spend])
    for position, capacity in enumerate(problem.capacities):
        least = np.maximum(0, left - sum(problem.capacities[position + 1:]))
        number = np.minimum(capacity, left) - least + 1
        rows = np.repeat(np.arange(len(found)), number)
        part = np.arange(len(rows)) - np.repeat(number.cumsum() - number, number) + least[rows]
        found, left = np.column_stack([found[rows], part]), left[rows] - part
    return found


class RandomSearch(RegrowthPolicyGradient):
    """The same search, ladder and budget, with random allocations (flat Dirichlet) for the controller's."""

    def _sample(self, space: ActionSpace) -> Rollout:
        nothing = torch.zeros(self.config.batch_size, len(self.problem.layers))
        return Rollout(nothing, nothing, nothing, nothing.bool(),
                       [ALLOCATORS["random"](self.problem, self._sampler) for _ in nothing])

    def _learn(self, rollout: Rollout, rewards: list[float]) -> None:
        """Nothing."""


ARMS = {  # the search, and what its configuration has other than the defaults
    "default": (RegrowthPolicyGradient, {}),
    "ratio": (RegrowthPolicyGradient, {"action_space": "ratio"}),
    "rules, then random": (RandomSearch, {}),
    "random": (RandomSearch, {"warm_start": False}),
}


def measure(toy: Toy, arm: str) -> dict[str, Any]:
    """A row: what a search of the toy found."""
    kind, changes = ARMS[arm]
    started = time.perf_counter()
    search = kind(toy.problem, toy, SearchConfig(**changes), toy.seed)
    result = search.run()
    own = [row["reward"] for row in search.history if row["source"] == "rl"]
    return {"toy": toy.kind, "seed": toy.seed, "arm": arm, "reward": round(result.reward, 5),
            "first_six": round(float(np.mean(own[:6])), 5), "last_six": round(float(np.mean(own[-6:])), 5),
            "epochs": result.epochs_spent, "seconds": round(time.perf_counter() - started, 2)}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per toy the default search against every other arm: paired differences in points, p adjusted over toys (Holm)."""
    reward = {(row["toy"], row["arm"], row["seed"]): 100 * row["reward"] for row in rows}
    seeds, results = sorted({row["seed"] for row in rows}), []
    for arm in list(ARMS)[1:]:
        found = [{"toy": toy, "against": arm, **paired_difference(*(
            [reward[toy, name, seed] for seed in seeds] for name in ("default", arm)))} for toy in NOISE]
        for result, adjusted in zip(found, holm([row["p"] for row in found])):
            results.append({**result, "p_holm": adjusted})
    return results


def print_summary(rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> None:
    """What the table comes to, a line per toy and arm."""
    for toy in NOISE:
        own = [row for row in rows if row["toy"] == toy and row["arm"] == "default"]
        reached = sum(row["reward"] >= row["best_rule"] for row in own)
        ahead, room = (100 * np.mean([row[name] - row["best_rule"] for row in own]) for name in ("reward", "optimum"))
        print(f"{toy}: {ahead:+.2f} points to the best rule (the optimum {room:+.2f}), reached in {reached} of "
              f"{len(own)} seeds")
        for result in results:
            if result["toy"] == toy:
                print(f"  against {result['against']:<18} {result['mean']:+.2f} points [{result['t_low']:+.2f}, "
                      f"{result['t_high']:+.2f}], p {result['p']:.4f} (Holm {result['p_holm']:.4f})")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--num_seeds", type=positive_int, default=20, help="seeds --seed, --seed + 1, ...")
    parser.add_argument("--seed", type=count, default=200, help="first seed; defaults were chosen on others, 0 to 119")
    parser.add_argument("--save_dir", type=Path, default=Path("search_toys"), help="where the tables go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every search, saves `runs.csv`, `summary.csv` and a card, and says what came out."""
    args = parse_args(argv)
    rows = []
    for kind in NOISE:
        for seed in range(args.seed, args.seed + args.num_seeds):
            toy = Toy(kind, seed)
            known = {"best_rule": round(toy.best_rule(), 5), "optimum": round(toy.optimum(), 5)}
            rows += [{**measure(toy, arm), **known} for arm in ARMS]
        print(f"{kind}: {args.num_seeds} seeds done", flush=True)
    results = summary(rows)
    save_csv(rows, args.save_dir / "runs.csv")
    save_csv(results, args.save_dir / "summary.csv")
    save_json({"command": command_line(), "cpu": cpu_name(), "torch": torch.__version__}, args.save_dir / "runs.json")
    print_summary(rows, results)


if __name__ == "__main__":
    script(main, resumable=False)
