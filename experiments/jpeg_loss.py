#!/usr/bin/env python
"""What JPEG coding of the images costs: validation accuracy of trained models on the images as they are, and coded once
more. Explains why accuracies on a JPEG copy of CIFAR-10 lie below those on the original bytes.

The second coding is shifted by half a block (4 pixels), so that it loses anew what the first one already lost once.
"""
from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

import utils  # noqa: E402, F401, I001  (first: it says which packages are missing)
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from utils import stage1  # noqa: E402
from utils.checkpoint import save_csv, save_json  # noqa: E402
from utils.data_loader import BatchLoader, channel_statistics, split_indices  # noqa: E402
from utils.run import ArgumentParser, Run, add_model_option, add_run_options, open_run, script  # noqa: E402
from utils.training import evaluate  # noqa: E402

HALF_BLOCK = 4  # pixels
CODINGS = {"as they are": None, "quality 95, full colour": (95, 0), "quality 75, full colour": (75, 0),
           "quality 75, half colour resolution": (75, 2)}  # (quality, Pillow's chroma subsampling)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="trained models to evaluate")
    parser.add_argument("--save_dir", type=Path, help="default: jpeg_loss under --root")
    add_run_options(parser)
    return parser.parse_args(argv)


def coded(image: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    """A uint8 (H, W, 3) image after one more JPEG coding on a grid of blocks shifted by half a block."""
    padded = np.pad(image, ((HALF_BLOCK,) * 2, (HALF_BLOCK,) * 2, (0, 0)), mode="reflect")
    file = io.BytesIO()
    Image.fromarray(padded).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))[HALF_BLOCK:-HALF_BLOCK, HALF_BLOCK:-HALF_BLOCK]


def validation_loaders(run: Run) -> dict[str, BatchLoader]:
    """The run's validation images under each of `CODINGS`."""
    mean, std = channel_statistics(run.data.train_images)
    _, chosen = split_indices(len(run.data.train_images), run.val_split)
    images, targets = run.data.train_images[chosen], run.data.train_targets[chosen]
    loaders = {}
    for name, coding in CODINGS.items():
        print(f"coding {len(images):,} images: {name}", flush=True)
        version = images if coding is None else np.stack([coded(image, *coding) for image in images])
        loaders[name] = BatchLoader(version, targets, 500, mean=mean, std=std, device=run.device)
    return loaders


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates every checkpoint on every version; prints and saves the table."""
    args = parse_args(argv)
    run = open_run(args)
    models = [stage1.load_outcome(run, path) for path in args.checkpoints]
    loaders = validation_loaders(run)
    rows: list[dict[str, Any]] = []
    for path, outcome in zip(args.checkpoints, models):
        for name, loader in loaders.items():
            accuracy = evaluate(outcome.model, loader, run.precision).accuracy
            rows.append({"checkpoint": str(path), "coding": name, "val_acc": accuracy,
                         "change": accuracy - next((row["val_acc"] for row in rows
                                                    if row["checkpoint"] == str(path)), accuracy)})
            print(f"{path}  {name:<36} {accuracy:6.2f} %  {rows[-1]['change']:+6.2f}")
    folder = args.save_dir or run.root / "jpeg_loss"
    save_csv(rows, folder / "jpeg_loss.csv")
    save_json(run.card(data=run.data_label, rows=rows), folder / "jpeg_loss.json")
    print(f"table and card: {folder / 'jpeg_loss.csv'}, {folder / 'jpeg_loss.json'}")


if __name__ == "__main__":
    script(main, resumable=False)
