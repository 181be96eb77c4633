#!/usr/bin/env python
"""Is what the controller finds better than the plain rules? On real data, each trained again.

The search of the stage-2 scripts, with its defaults, spreads one budget over the layers; the controller's best
allocation and the best plain rules are then trained again, for as long as the last rung, under seeds of their own: what
was chosen for a lucky training shows no more than it is worth. Starts from the checkpoints of `main.py --m_name ...
--pruner magnitude --iter_end 1`. torchrun starts it in several processes, which share the trials.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import stage2  # noqa: E402
from utils.allocation import AllocationProblem, allocate  # noqa: E402
from utils.checkpoint import save_csv  # noqa: E402
from utils.common import UserError, count, fraction, generator, positive_float, positive_int  # noqa: E402
from utils.controller import WARM_START, RegrowthPolicyGradient, SearchConfig  # noqa: E402
from utils.distributed import world  # noqa: E402
from utils.methods import regrowth_arguments  # noqa: E402
from utils.run import DATA_OPTIONS, Run, open_run, run_parser, script  # noqa: E402
from utils.stage import ResumableTable, check_same_files, kept  # noqa: E402
from utils.statistics import paired_difference  # noqa: E402
from utils.training import FINETUNE_FINAL  # noqa: E402

CONTROLLER = "controller"  # the name, in the table, of the best allocation that it sampled


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--num_images", type=positive_int, help="training images of an epoch; validation stays whole "
                        "(default: all)")
    parser.add_argument("--start_sparsity", type=fraction, default=0.99, help="sparsity that regrowth starts from")
    parser.add_argument("--target_sparsity", type=fraction, default=0.97, help="sparsity after regrowth")
    parser.add_argument("--finetune_lr", type=positive_float, default=FINETUNE_FINAL.lr, help="of the episodes (AdamW)")
    parser.add_argument("--search_budget", type=count, default=SearchConfig.search_budget,
                        help="epochs of the search; 0: no limit")
    parser.add_argument("--rules", type=positive_int, default=1, help="so many of the plain rules, the best, are "
                        "trained again")
    parser.add_argument("--repeats", type=positive_int, default=3, help="trainings of each allocation after the search")
    parser.add_argument("--save_dir", type=Path, help="default: search_or_rule/{m_name} under --root")
    args = parser.parse_args(argv)
    if args.rules > len(WARM_START):
        raise UserError(f"--rules {args.rules}: there are {len(WARM_START)}, {', '.join(WARM_START)}")
    return args


def first_step(run: Run, args: argparse.Namespace) -> stage2.Step:
    """The regrowth whose allocation is looked for."""
    return stage2.first_step(run, regrowth_arguments(
        "reference", m_name=args.m_name, **{name: getattr(args, name) for name in DATA_OPTIONS},
        root=run.root, start_sparsity=args.start_sparsity,
        target_sparsity=args.target_sparsity, finetune_lr=args.finetune_lr, search_budget=args.search_budget,
        resume="latest" if args.resume else None, overwrite=args.overwrite))


def run_search(step: stage2.Step, folder: Path, config: dict[str, Any]) -> RegrowthPolicyGradient:
    """The search of the step, after it has ended; leaves its table and checkpoints in the folder."""
    search = RegrowthPolicyGradient(step.problem, step.reward, step.args.search, step.run.derive_seed("search"),
                                    world())
    stem = folder / "search_checkpoint"
    if step.args.resume:
        stage2.load_search(search, [path for path in stage2.saved_searches(stem).values()
                                    if kept(path, step.run.overwrite)], config)
    stage2.run_search(search, stem, config, save_freq=1, sparsity=step.sparsity_after)
    return search


def contenders(search: RegrowthPolicyGradient, rules: int) -> dict[str, tuple[int, ...]]:
    """Name -> allocation: the best of the controller's, and the best plain rules; longest training first, then reward.

    A search gives the best of all, which may be a rule.
    """
    plain: dict[tuple[int, ...], str] = {}
    for name in WARM_START:  # rules that agree count once
        plain.setdefault(allocate(name, search.problem, generator(search.seed)), name)
    standing = dict.fromkeys(plain, (0.0, 0.0))
    for epochs, rewards in sorted(search.ladder.rewards.items()):
        standing |= {allocation: (epochs, reward) for allocation, reward in rewards.items()}
    ranked = sorted(standing, key=standing.get, reverse=True)
    own = [allocation for allocation in ranked if allocation not in plain]
    if not own:
        raise UserError(f"--search_budget {search.config.search_budget} left no episode to the controller; raise it")
    return {CONTROLLER: own[0],
            **{plain[allocation]: allocation for allocation in [rule for rule in ranked if rule in plain][:rules]}}


def train_again(step: stage2.Step, table: ResumableTable, allocations: dict[str, tuple[int, ...]],
                repeats: int) -> None:
    """Adds the rows that the table lacks: every allocation under every seed, for as long as the last rung."""
    epochs = step.args.search.rungs[-1]
    keys = [(name, repeat) for repeat in range(1, repeats + 1) for name in allocations]
    missing = [key for key in keys if not table.has(*key)]

    def add(number: int, reward: float, seconds: float) -> None:
        name, repeat = missing[number]
        table.add({"allocation": name, "repeat": repeat, "val_acc": 100 * reward, "epochs": epochs, "seconds": seconds,
                   "dataset": step.run.data_label, "weights": " ".join(map(str, allocations[name]))},
                  step.run.card(layers=step.problem.layers))
        print(f"{name}, repeat {repeat}: validation {100 * reward:.2f} %", flush=True)
    world().run(step.reward, [(allocations[name], step.run.derive_seed("again", repeat), epochs)
                              for name, repeat in missing], add)


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The controller's allocation against every rule, paired by the repeats of both, in points of validation accuracy.
    """
    of: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):  # several processes finish in any order
        of.setdefault(row["allocation"], {})[row["repeat"]] = row["val_acc"]
    results, own = [], of.pop(CONTROLLER)
    for name, rule in of.items():
        both = [repeat for repeat in own if repeat in rule]
        results.append({"against": name, **paired_difference([own[key] for key in both], [rule[key] for key in both])})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Searches, trains again what is missing, then compares."""
    args = parse_args(argv)
    run = open_run(args)
    run = replace(run, train=run.train.part(args.num_images))  # validation, which models have had already, stays whole
    step = first_step(run, args)
    config = {**run.identity(), "num_images": args.num_images, "start": step.start.digest, "budget": step.budget,
              "recipe": step.args.finetuning.as_dict(), "search": asdict(step.args.search)}
    check_same_files(world(), config)
    if not world().leads:
        step.problem = AllocationProblem(**world().share())  # its layers in the leader's order
        world().serve(step.reward)  # the rounds of the search
        world().serve(step.reward)  # and what is trained again
        return
    folder = args.save_dir or run.root / "search_or_rule" / args.m_name
    table = ResumableTable(folder / "runs.csv", ("allocation", "repeat"), config, resume=args.resume,
                           overwrite=args.overwrite)
    world().share(asdict(step.problem))
    search = run_search(step, folder, config)
    world().share()
    train_again(step, table, contenders(search, args.rules), args.repeats)
    world().share()
    results = compare(table.rows)
    save_csv(results, folder / "differences.csv")
    for row in results:
        print(f"the controller's best against {row['against']}: {row['mean']:+.2f} points [{row['t_low']:+.2f}, "
              f"{row['t_high']:+.2f}], {row['verdict']} at {row['pairs']} trainings each")
    print(f"tables: {folder}")


if __name__ == "__main__":
    script(main, several=True)
