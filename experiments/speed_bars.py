#!/usr/bin/env python
"""Measures the speed of stage 1 side by side with the straightforward versions, in one run: the in-memory loader
against a DataLoader with worker processes, a training epoch against the plain loop, LAMP against full sorting.

Writes speed_bars.json and speed_bars.csv to --save_dir; ratios are what counts, absolute times vary with the machine.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

import torch  # noqa: E402
from torch import nn  # noqa: E402

from iclr2021_solution.tools.pruners import weight_pruner_loader  # noqa: E402
from utils.baselines import argsort_lamp_masks, plain_dataloader, plain_training_epoch  # noqa: E402
from utils.checkpoint import save_csv, save_json  # noqa: E402
from utils.data_loader import BatchLoader, channel_statistics  # noqa: E402
from utils.model_loader import model_loader  # noqa: E402
from utils.run import (  # noqa: E402
    ArgumentParser,
    Run,
    add_model_option,
    add_run_options,
    open_run,
    positive_int,
    script,
)
from utils.timing import Timing, measure_in_turn  # noqa: E402
from utils.training import PRETRAIN, Trainer  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--num_images", type=positive_int, default=6400, help="images of an epoch that is timed")
    parser.add_argument("--num_runs", type=positive_int, default=3, help="repeats of each measurement")
    parser.add_argument("--save_dir", type=Path, help="default: speed_bars under --root")
    add_run_options(parser)
    return parser.parse_args(argv)


def compare(name: str, work: float, unit: str, ours: Timing, plain: Timing, bar_ratio: float) -> dict[str, Any]:
    """One row: rates of both versions (`work` units per run) and their ratio, from the medians."""
    ratio = plain.median / ours.median
    row = {"measurement": name, "unit": unit, "ours": work / ours.median, "plain": work / plain.median, "ratio": ratio,
           "bar_ratio": bar_ratio, "met": ratio >= bar_ratio, "ours_median_s": ours.median,
           "ours_slowest_s": ours.slowest, "plain_median_s": plain.median, "plain_slowest_s": plain.slowest,
           "repeats": ours.repeats}
    print(f"{name:<28} {row['ours']:>12,.4g} {unit:<10} plain {row['plain']:>10,.4g}   ratio {ratio:6.1f}x  "
          f"(bar {bar_ratio:g}x: {'met' if row['met'] else 'missed'})")
    return row


def loader_row(run: Run, ours: BatchLoader, plain: torch.utils.data.DataLoader, repeats: int) -> dict[str, Any]:
    """Augmented images per second: ours against the DataLoader."""
    def consume(loader: Any) -> None:
        for _ in loader:
            pass
    works = [partial(consume, loader) for loader in (ours, plain)]
    timings = measure_in_turn(works, run.device, repeats=repeats)
    return compare("loader with augmentation", ours.num_images, "images/s", *timings, bar_ratio=8)


def training_row(run: Run, ours: BatchLoader, plain: torch.utils.data.DataLoader, repeats: int) -> dict[str, Any]:
    """Images per second through a training epoch, data included: ours against the plain loop."""
    recipe = replace(PRETRAIN, epochs=1, patience=None)
    nothing = ours.unaugmented().with_batch_size(500)
    nothing.images, nothing.targets = nothing.images[:1], nothing.targets[:1]

    def fast(model: nn.Module) -> None:
        Trainer(model, ours, nothing, recipe, seed=0, precision=run.precision).run(show=False)

    def slow(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        plain_training_epoch(model.to(memory_format=torch.contiguous_format), plain, optimizer)
    timings = measure_in_turn([fast, slow], run.device, repeats=repeats, prepare=run.new_model)
    return compare(f"training {run.m_name} ({run.precision})", ours.num_images, "images/s", *timings, bar_ratio=3)


def lamp_row(run: Run, repeats: int) -> dict[str, Any]:
    """LAMP to a sparsity of 0.99 on VGG16, per second: ours against sorting all scores."""
    def new_vgg16() -> nn.Module:
        return model_loader("vgg16", run.device, seed=0)

    def plain(model: nn.Module) -> None:
        weights = [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        argsort_lamp_masks(weights, round(0.01 * sum(weight.numel() for weight in weights)))
    pruner = weight_pruner_loader("lamp")
    timings = measure_in_turn([lambda model: pruner(model, 0.99), plain], run.device, repeats=repeats,
                              prepare=new_vgg16)
    return compare("LAMP 0.99 on vgg16", 1, "prunings/s", *timings, bar_ratio=10)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and saves the three comparisons."""
    args = parse_args(argv)
    run = open_run(args)
    images, targets = run.data.train_images[:args.num_images], run.data.train_targets[:args.num_images]
    mean, std = channel_statistics(run.data.train_images)
    ours = BatchLoader(images, targets, PRETRAIN.batch_size, mean=mean, std=std, device=run.device, augment=True,
                       shuffle=True)
    plain = plain_dataloader(images, targets, PRETRAIN.batch_size, mean / 255, std / 255)
    rows = [loader_row(run, ours, plain, args.num_runs), training_row(run, ours, plain, args.num_runs),
            lamp_row(run, args.num_runs)]
    folder = args.save_dir or run.root / "speed_bars"
    save_csv(rows, folder / "speed_bars.csv")
    save_json(run.card(data=run.data_label, rows=rows), folder / "speed_bars.json")
    print(f"written: {folder / 'speed_bars.csv'}, {folder / 'speed_bars.json'}")


if __name__ == "__main__":
    script(main, resumable=False)
