#!/usr/bin/env python
"""One regrowth episode by each method, timed stage by stage in a short table; half a minute on a laptop.

The whole benchmark, with repeats, figures and files, is benchmark_regrowth_methods.py.
"""
from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from utils import benchmark
from utils.run import ArgumentParser, environment, script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    benchmark.add_setting_options(parser, num_runs=1, num_images=2_000)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Times and prints."""
    args = parse_args(argv)
    benchmark.stage2_arguments(args)  # raises on sparsities that do not go together
    with tempfile.TemporaryDirectory() as temporary:
        run = benchmark.open_benchmark(args, Path(temporary))
        seconds, episodes = benchmark.time_episodes(run, args)
    rows = [benchmark.update_row(name, episode, run.device, args.num_runs) for name, episode in episodes.items()]
    hardware = environment(run.device)
    print(f"{args.m_name} on {hardware['device']}, {run.precision}, torch {hardware['torch']}, "
          f"{hardware['threads']} threads; {run.data_label}, {len(run.data.train_images):,} images")
    benchmark.print_stages(benchmark.stage_rows(seconds))
    benchmark.print_comparisons(rows)
    benchmark.print_bars(benchmark.bars(run, rows))


if __name__ == "__main__":
    script(main, resumable=False)
