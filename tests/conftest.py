"""Small data and models that every test file can use."""
from __future__ import annotations

import gc
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from utils.data_loader import loaders_from
from utils.datasets import ImageDataset

REPOSITORY = Path(__file__).resolve().parents[1]

TINY_COUNTS = (60, 50, 40, 30, 20)  # training images of each class: as folders are, class by class and unequal
FOLDER_COUNTS = (17, 14, 11, 9, 8, 7, 5, 4, 3, 2)


def make_images(per_class: int | Sequence[int], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Learnable 32x32 images, class by class: each class has its own stripe frequency and tint, plus noise.

    per_class: images of every class, or of each.
    """
    random = np.random.RandomState(seed)
    targets = np.repeat(np.arange(classes), per_class)
    stripes = np.sin(np.arange(32) * (targets[:, None] + 1) * 0.35)[:, :, None, None]
    tint = np.stack([np.cos(targets), np.sin(targets), np.cos(2 * targets)], axis=1)[:, None, None, :]
    pixels = 127 + 50 * stripes + 30 * tint + 20 * random.randn(len(targets), 32, 32, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8), targets.astype(np.int64)


@pytest.fixture(scope="session")
def tiny_dataset() -> ImageDataset:
    """200 training (`TINY_COUNTS`) and 50 test images of five classes, in memory, class by class."""
    train, test = make_images(TINY_COUNTS, 5, 0), make_images(10, 5, 1)
    return ImageDataset("tiny", "test", *train, *test, classes=tuple("abcde"))


@pytest.fixture
def tiny_loaders(tiny_dataset):
    """(train, validation, test) loaders over `tiny_dataset`."""
    return loaders_from(tiny_dataset, batch_size=32, eval_batch_size=64)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """An image folder train|test/<class>/*.png of ten classes: 80 training (`FOLDER_COUNTS`) and 20 test images."""
    root = tmp_path_factory.mktemp("image_folder")
    for part, per_class, seed in (("train", FOLDER_COUNTS, 0), ("test", 2, 1)):
        images, targets = make_images(per_class, 10, seed)
        for number, (image, target) in enumerate(zip(images, targets)):
            folder = root / part / f"class_{target}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture
def small_cnn() -> nn.Module:
    """conv - batch norm - conv - linear for 32x32 RGB and five classes; 952 prunable weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
                         nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 5))


@pytest.fixture
def run_script():
    """Runs a script of the repository as a user would; returns the finished process with its output as text."""
    def run(*words: object, timeout: float = 240, cwd: Path | None = None) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "TQDM_MININTERVAL": "60"}
        return subprocess.run([sys.executable, REPOSITORY / str(words[0]), *map(str, words[1:])], cwd=cwd,
                              env=environment, text=True, capture_output=True, timeout=timeout)
    return run


def run_here(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """As `run_script`, with one thread too, but in this process: what takes seconds to import is imported already."""
    threads, out, err = torch.get_num_threads(), io.StringIO(), io.StringIO()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd or Path.cwd())
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", [str(REPOSITORY / str(words[0])), *map(str, words[1:])])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:  # as every script ends
            code = end.code
    torch.set_num_threads(threads)
    gc.collect()  # what the run held, its folder too, is free again
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def heed_sigint() -> None:
    """For a child's `preexec_fn`: Ctrl-C works in it although the background of a shell, with the tests, ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def assert_user_error(process: subprocess.CompletedProcess, *words: str) -> None:
    """The process ended with exit code 2 and one line on stderr (notes on the data aside) that holds all `words`."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip() and not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0], f"'{word}' is missing in: {lines[0]}"
