#!/usr/bin/env python
"""Which short training tells which allocation will be best? The reward at each rung against the one at the last.

Allocations of one problem: the plain rules, a third as a fresh controller samples them around the best of the rules
at hand (proportional), the rest random. Each is regrown by the reference method and trained as an episode of a search
is, at every rung of --rungs; 'bn' is no training at all, but batch-norm statistics re-estimated (a pass over the
training images). Starts from the checkpoints of `main.py --m_name ... --pruner magnitude --iter_end 1`.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import stage2  # noqa: E402
from utils.agent import RegrowthAgent, ShareActions  # noqa: E402
from utils.allocation import AllocationProblem, allocate  # noqa: E402
from utils.checkpoint import save_csv  # noqa: E402
from utils.common import (  # noqa: E402
    UserError,
    derive_seed,
    epoch_count,
    fraction,
    generator,
    positive_float,
    positive_int,
)
from utils.controller import WARM_START  # noqa: E402
from utils.methods import regrowth_arguments  # noqa: E402
from utils.run import DATA_OPTIONS, Run, open_run, run_parser, script  # noqa: E402
from utils.stage import ResumableTable  # noqa: E402
from utils.statistics import correlate  # noqa: E402
from utils.training import FINETUNE_FINAL, Trainer, accuracy_with_new_statistics  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--num_allocations", type=positive_int, default=24, help="the rules among them")
    parser.add_argument("--rungs", type=epoch_count, nargs="+", default=[0.25, 1, 3, 9], help="epochs, increasing")
    parser.add_argument("--num_images", type=positive_int, help="training images of an epoch; validation stays whole "
                        "(default: all)")
    parser.add_argument("--start_sparsity", type=fraction, default=0.99, help="sparsity that regrowth starts from")
    parser.add_argument("--target_sparsity", type=fraction, default=0.97, help="sparsity after regrowth")
    parser.add_argument("--finetune_lr", type=positive_float, default=FINETUNE_FINAL.lr, help="of the episodes (AdamW)")
    parser.add_argument("--save_dir", type=Path, help="default: rung_fidelity/{m_name} under --root")
    args = parser.parse_args(argv)
    if args.rungs != sorted(set(args.rungs)) or len(args.rungs) < 2:
        raise UserError(f"--rungs {' '.join(map(str, args.rungs))}: give at least two, increasing, such as 0.25 1 3 9")
    if args.num_allocations < len(WARM_START) + 2:  # the rules and two others
        raise UserError(f"--num_allocations {args.num_allocations} leaves nothing beside the rules; use "
                        f"{len(WARM_START) + 2} or more")
    return args


class Study:
    """One regrowth problem and the reward of its allocations at every rung."""

    def __init__(self, run: Run, args: argparse.Namespace):
        """Loads the models and measures what the order of the layers needs."""
        self.run, self.rungs = run, args.rungs
        self.step = stage2.first_step(run, regrowth_arguments(
            "reference", m_name=args.m_name, **{name: getattr(args, name) for name in DATA_OPTIONS},
            start_sparsity=args.start_sparsity, root=run.root,
            target_sparsity=args.target_sparsity, finetune_lr=args.finetune_lr))
        self.problem = self.step.problem

    def rewards(self, allocation: tuple[int, ...]) -> dict[str, float]:
        """Validation accuracy (%) by rung, and the seconds that re-estimation and all training took.

        As a search rewards: the best epoch so far. The whole epochs of the last rung pass through those before it, bit
        for bit, so that only fractions of an epoch are trained apart.
        """
        started = time.perf_counter()
        found = {"bn": accuracy_with_new_statistics(self.step.apply(allocation)[0], self.run.train, self.run.val,
                                                    self.run.precision)}
        seconds = {"seconds_bn": time.perf_counter() - started}
        longest = [row["val_acc"] for row in self._trained(allocation, self.rungs[-1]).history]
        for rung in self.rungs:
            if rung == self.rungs[-1]:
                found[f"after_{rung}"] = max(longest)
            elif rung == int(rung):
                found[f"after_{rung}"] = max(longest[:int(rung)])
            else:
                found[f"after_{rung}"] = max(row["val_acc"] for row in self._trained(allocation, rung).history)
        return {**found, **seconds, "seconds": time.perf_counter() - started}

    def _trained(self, allocation: tuple[int, ...], epochs: float) -> Trainer:
        recipe = replace(self.step.args.finetuning, epochs=epochs, schedule="constant", patience=None)
        seed = derive_seed(derive_seed(self.run.seed, "search"), "episode")  # as in a search
        trainer = Trainer(self.step.apply(allocation)[0], self.run.train, self.run.val, recipe, seed=seed,
                          precision=self.run.precision)
        trainer.run(show=False)
        return trainer


def allocations(problem: AllocationProblem, number: int, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    """(source, allocation): the rules, 'near' ones around the proportional rule, 'random' ones; all different.

    UserError where there are not so many.
    """
    draws = generator(seed, "rung fidelity")
    rules = [(name, allocate(name, problem, draws)) for name in WARM_START]
    space = ShareActions(problem, 11, [capacity / sum(problem.capacities) for capacity in problem.capacities])
    agent = RegrowthAgent(seed=derive_seed(seed, "controller"), action_space="share")
    near = [("near", allocation) for allocation in agent(space, (number - len(rules)) // 2, draws).allocations]
    found: dict[tuple[int, ...], str] = {}
    for name, allocation in [*rules, *near]:
        found.setdefault(allocation, name)
    for _ in range(100 * number):
        if len(found) < number:
            found.setdefault(allocate("random", problem, draws), "random")
    if len(found) < number:
        raise UserError(f"--num_allocations {number}: only {len(found)} different ones were found for "
                        f"{problem.budget:,} weights in {len(problem.layers)} layers; ask for fewer")
    return [(name, allocation) for allocation, name in found.items()]


def compare(rows: Sequence[dict[str, Any]], rungs: Sequence[float]) -> list[dict[str, Any]]:
    """Per rung: Spearman's rho with the last rung over all and over 'near' allocations, and the fraction of
    the last rung's best third that is in the rung's own best third, which a ladder promotes."""
    last, results = f"after_{rungs[-1]}", []
    near, third = [row for row in rows if row["source"] == "near"], max(1, len(rows) // 3)
    best = {row["number"] for row in sorted(rows, key=lambda row: -row[last])[:third]}
    for name in ("bn", *(f"after_{rung}" for rung in rungs[:-1])):
        everywhere, close = (correlate([row[name] for row in part], [row[last] for row in part])
                             for part in (rows, near))
        kept = best & {row["number"] for row in sorted(rows, key=lambda row: -row[name])[:third]}
        results.append({"rung": name, "allocations": len(rows), "spearman": everywhere["spearman"],
                        "p": everywhere["spearman_p"], "near_allocations": len(near),
                        "spearman_near": close["spearman"], "p_near": close["spearman_p"],
                        "best_third_kept": len(kept) / third})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is missing, allocation by allocation, then compares the rungs."""
    args = parse_args(argv)
    run = open_run(args)
    run = replace(run, train=run.train.part(args.num_images))  # validation, which models have had already, stays whole
    folder = args.save_dir or run.root / "rung_fidelity" / args.m_name
    study = Study(run, args)
    config = {**run.identity(), "rungs": args.rungs, "start": study.step.start.digest, "budget": study.step.budget,
              "finetune_lr": args.finetune_lr, "num_allocations": args.num_allocations, "num_images": args.num_images}
    table = ResumableTable(folder / "rungs.csv", ("number",), config, resume=args.resume, overwrite=args.overwrite)
    for number, (source, allocation) in enumerate(allocations(study.problem, args.num_allocations, args.seed), 1):
        if not table.has(number):
            row = {"number": number, "source": source, **study.rewards(allocation),
                   "allocation": " ".join(map(str, allocation))}
            table.add(row, run.card(layers=study.problem.layers))
            print(f"{number}/{args.num_allocations} {source}: " + "  ".join(
                f"{name} {row[name]:.2f} %" for name in row if name == "bn" or name.startswith("after")), flush=True)
    results = compare(table.rows, args.rungs)
    save_csv(results, folder / "spearman.csv")
    for row in results:
        print(f"{row['rung']:<12} Spearman {row['spearman']:+.2f} (p {row['p']:.4f}), near the rule "
              f"{row['spearman_near']:+.2f} (p {row['p_near']:.4f}), {100 * row['best_third_kept']:.0f} % of the best "
              "third kept")
    print(f"tables: {folder}")


if __name__ == "__main__":
    script(main)
