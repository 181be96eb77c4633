#!/usr/bin/env python
"""What each step of a regrowth episode costs, by both methods: loading, SSIM drift, evidence (gradients or reference),
selection, mask update with initial values, mini-finetuning; our versions against straightforward ones; and what moving
the mask while training costs, by every schedule.

The published setting is --m_name vgg16 at 0.99, from which 147,156 weights return. Without the checkpoints of stage 1
(or with --synthetic) untrained weights and random images are timed, which takes as long.
"""
from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import benchmark, checkpoint, plots
from utils.common import UserError, peak_memory_mb
from utils.run import ArgumentParser, environment, script
from utils.stage import hold_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    benchmark.add_setting_options(parser, num_runs=5, num_images=8_000)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="benchmark.json of an earlier run: print ratios")
    parser.add_argument("--save_dir", type=Path, help="default: benchmark/{m_name} under --root")
    args = parser.parse_args(argv)
    if args.num_images < 200:
        raise UserError(f"--num_images {args.num_images} is too few to time an epoch; use 200 or more")
    return args


def timings(card: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of every stage and comparison of a run, and what it was run with."""
    medians = {f"{row['method']} / {row['stage']}": row["median_s"] for row in card["stages"]}
    medians |= {row["measurement"]: row["ours_median_s"] for row in card["comparisons"]}
    return medians, {**card["setting"], "device": card["environment"]["device"]}


def load_timings(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """`timings` of an earlier run, of its benchmark.json. UserError in one line when it is none."""
    try:
        return timings(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--compare takes the benchmark.json of an earlier run, not {path}: {error}") from error


def print_changes(before: dict[str, float], setting: dict[str, Any], card: dict[str, Any]) -> None:
    """Earlier seconds over today's, so that above 1 is faster now; says what makes the two runs incomparable."""
    print("\nagainst the earlier run (its time / this one's; above 1: faster now)")
    medians, today = timings(card)
    if unlike := [f"{key} was {setting.get(key)}, is {now}" for key, now in today.items() if setting.get(key) != now]:
        print(f"  note: the runs differ: {'; '.join(unlike)}")
    for name, now in medians.items():
        if name in before:
            print(f"  {name:<36} {before[name] / now:6.2f}x   ({1e3 * before[name]:,.1f} -> {1e3 * now:,.1f} ms)")


def main(argv: Sequence[str] | None = None) -> None:
    """Times, compares, writes, says which bars are met."""
    args = parse_args(argv)
    benchmark.stage2_arguments(args)  # raises on sparsities that do not go together
    earlier = load_timings(args.compare) if args.compare else None
    folder = args.save_dir or args.root / "benchmark" / args.m_name
    lock = hold_folder(folder, "--save_dir")
    partial = folder / "episodes.partial.csv"
    with tempfile.TemporaryDirectory() as temporary:
        run = benchmark.open_benchmark(args, Path(temporary))
        run.held.add(lock)
        seconds, episodes = benchmark.time_episodes(run, args, warmups=1, log=partial)
        repeats = min(args.num_runs, 5)
        comparisons = [benchmark.update_row(name, episode, run.device, repeats) for name, episode in episodes.items()]
        comparisons += [*benchmark.loader_rows(run, repeats), benchmark.lamp_row(run.device, repeats)]
        schedules = [benchmark.schedule_row(run, name, args.start_sparsity) for name in benchmark.MASK_SCHEDULES]
    stages, bars = benchmark.stage_rows(seconds), benchmark.bars(run, comparisons + schedules)
    weights = sum(next(iter(episodes.values())).allocation.values())
    setting = {"m_name": args.m_name, "data": run.data_label, "start_sparsity": args.start_sparsity,
               "target_sparsity": args.target_sparsity, "regrown": weights, "num_images": len(run.data.train_images),
               "precision": run.precision, "threads": environment(run.device)["threads"]}
    checkpoint.save_csv(stages, folder / "stages.csv")
    checkpoint.save_csv(comparisons, folder / "comparisons.csv")
    checkpoint.save_csv(schedules, folder / "mask_updates.csv")
    card = run.card(setting=setting, stages=stages, comparisons=comparisons, mask_updates=schedules, bars=bars,
                    peak_memory_mb=peak_memory_mb(run.device))
    checkpoint.save_json(card, folder / "benchmark.json")
    partial.replace(folder / "episodes.csv")
    device = card["environment"]["device"]
    title = f"{args.m_name} on {device}, {run.precision}: {weights:,} weights return"
    plots.plot_benchmark([row for row in stages if row["stage"] != benchmark.TOTAL], folder / "benchmark.png", title)
    print(f"\n{title}\n{run.data_label}, torch {card['environment']['torch']}, {setting['threads']} threads, "
          f"{args.num_runs} runs, peak memory {card['peak_memory_mb']:,.0f} MB")
    benchmark.print_stages(stages)
    benchmark.print_comparisons(comparisons)
    benchmark.print_bars(bars)
    if earlier:
        print_changes(*earlier, card)
    print(f"\ntables, figure and benchmark.json: {folder}")


if __name__ == "__main__":
    script(main, resumable=False)
