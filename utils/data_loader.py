"""Image batches built on the compute device: the data set lies there as uint8 and no worker process is needed.

On a CPU the random crops are copied out of a sliding-windows view of the padded images (no per-image Python work);
on a GPU the same gather runs as one kernel. Every random choice comes from the loader's own seeded generator.
"""
from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.common import UserError, generator
from utils.datasets import ImageDataset, load_dataset

PADDING = 4  # pixels of zeros on each side before the random crop (He et al., CVPR 2016, section 4.2)
Batch = tuple[Tensor, Tensor]


class BatchLoader:
    """Iterates over (inputs, targets) batches, any number of times, like a PyTorch ``DataLoader``.

    inputs: float32 (B, C, H, W) in channels_last memory, normalised per channel; targets: int64 (B,).
    With ``augment`` each image is zero-padded (by `PADDING`, or as `with_padding` says), cropped at random and flipped
    with probability 1/2; with ``shuffle`` every pass has a new order. A last batch of a single image is left out of
    shuffled passes, since batch normalisation cannot train on it.
    """

    def __init__(self, images: np.ndarray, targets: np.ndarray, batch_size: int, *, mean: np.ndarray, std: np.ndarray,
                 device: str | torch.device = "cpu", augment: bool = False, shuffle: bool = False, seed: int = 0):
        """images: uint8 (N, H, W, C); targets: int (N,); mean, std: (C,) in pixel units 0..255."""
        if len(images) != len(targets) or len(images) == 0:
            raise ValueError(f"need as many images as targets and at least one, got {len(images)} and {len(targets)}")
        self.device = torch.device(device)
        self.images = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        self.targets = torch.from_numpy(np.asarray(targets, dtype=np.int64)).to(self.device)
        self.mean, self.std = mean, std
        self.scale = torch.tensor(1.0 / std, dtype=torch.float32, device=self.device)
        self.shift = torch.tensor(-mean / std, dtype=torch.float32, device=self.device)
        self.batch_size, self.augment, self.shuffle = batch_size, augment, shuffle
        self.padding = PADDING
        self.windows = self._windows() if augment else None
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Restarts the loader's generator: the passes that follow depend on `seed` alone."""
        self.generator = generator(seed, "loader")

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state between two passes."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues exactly where `state_dict` was taken."""
        self.generator.set_state(state["generator"])

    @property
    def num_images(self) -> int:
        """Images in one pass (before a single left-over image is dropped)."""
        return len(self.images)

    def __len__(self) -> int:
        full, rest = divmod(self.num_images, self.batch_size)
        return max(1, full + (rest > (1 if self.shuffle else 0)))

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()

    def with_batch_size(self, batch_size: int) -> BatchLoader:
        """The same images, augmentation and order of seeds in batches of another size; shares memory."""
        return self._with(batch_size=batch_size)

    def with_padding(self, padding: int) -> BatchLoader:
        """The same with so many pixels of zeros on each side before the random crop.

        UserError for as many as an image has or more, where a crop could miss it.
        """
        if padding >= self.images.shape[1]:
            raise UserError(f"a padding of {padding} pixels is too much for images of {self.images.shape[1]} pixels a "
                            f"side: a crop could miss the image; use less, such as {self.images.shape[1] // 8}")
        other, less = self._with(padding=padding), self.padding - padding
        if self.augment and less > 0:  # the crops in the middle are the ones: nothing is copied
            middle = slice(less, less + 2 * padding + 1)
            other.windows = self.windows[:, middle, middle]
        elif self.augment and less < 0:
            other.windows = other._windows()
        return other

    def unaugmented(self, batch_size: int | None = None) -> BatchLoader:
        """The same images in their stored order, neither augmented nor shuffled; shares memory."""
        return self._with(batch_size=batch_size or self.batch_size, augment=False, shuffle=False, windows=None)

    def subset(self, indices: np.ndarray, batch_size: int | None = None) -> BatchLoader:
        """The images at these positions, in this order, neither augmented nor shuffled."""
        where = torch.from_numpy(indices).to(self.device)
        return self.unaugmented(batch_size)._with(images=self.images[where], targets=self.targets[where])

    def part(self, num_images: int | None, seed: int = 0) -> BatchLoader:
        """A class-balanced subset of `num_images` images, augmented and shuffled like the whole; None: all images."""
        if num_images is None or num_images >= self.num_images:
            return self
        where = torch.from_numpy(balanced_indices(self.images, self.targets, num_images, seed)).to(self.device)
        few = self._with(images=self.images[where], targets=self.targets[where])
        few.windows = few._windows() if self.augment else None
        return few

    def _with(self, **changes: Any) -> BatchLoader:
        """A copy in which these attributes are others, with a generator of its own in the same state."""
        other = copy.copy(self)
        vars(other).update(changes, generator=torch.Generator().set_state(self.generator.get_state()))
        return other

    def balanced_sample(self, num_images: int, batch_size: int, seed: int) -> BatchLoader:
        """Un-augmented batches of at most `num_images` images, each with all classes: `balanced_indices`.

        What is estimated from part of the data is estimated from this. A last, smaller batch is left out.
        """
        num_images = min(num_images, self.num_images)
        num_images -= num_images % batch_size if num_images > batch_size else 0
        return self.subset(balanced_indices(self.images, self.targets, num_images, seed), batch_size)

    def skip(self, passes: int) -> None:
        """Leaves out so many passes: the next one has the order and augmentation that it would have had after them."""
        for _ in range(passes):
            self._draw_pass()

    def _windows(self) -> np.ndarray | Tensor:
        """Every crop of the padded images as a strided view (N, 2P+1, 2P+1, H, W, C); only the padding is copied."""
        choices = 2 * self.padding + 1
        padded = torch.nn.functional.pad(self.images, (0, 0, *4 * [self.padding]))
        n, height, width, channels = self.images.shape
        s_n, s_h, s_w, s_c = padded.stride()
        view = padded.as_strided((n, choices, choices, height, width, channels),
                                 (s_n, s_h, s_w, s_h, s_w, s_c))
        return view.numpy() if self.device.type == "cpu" else view  # numpy's gather is ~20x torch's on a CPU

    def _batches(self) -> Iterator[Batch]:
        order, moves = (None if drawn is None else drawn.to(self.device, non_blocking=True)
                        for drawn in self._draw_pass())
        for number in range(len(self)):
            span = slice(number * self.batch_size, (number + 1) * self.batch_size)
            where = span if order is None else order[span]
            pixels = self.images[where] if moves is None else self._crop_and_flip(where, moves[:, span])
            inputs = pixels.float().mul_(self.scale).add_(self.shift)
            yield inputs.permute(0, 3, 1, 2), self.targets[where]  # a channels_last view, without a copy

    def _draw_pass(self) -> tuple[Tensor | None, Tensor | None]:
        """What a pass takes from the generator: the order of the images, and their moves.

        Moves: int64 (3, N), crop row and column in 0..2P and flip 0/1 of each image.
        """
        order = torch.randperm(self.num_images, generator=self.generator) if self.shuffle else None
        if not self.augment:
            return order, None
        crops = torch.randint(2 * self.padding + 1, (2, self.num_images), generator=self.generator)
        flips = torch.randint(2, (1, self.num_images), generator=self.generator)
        return order, torch.cat([crops, flips])

    def _crop_and_flip(self, where: Tensor | slice, moves: Tensor) -> Tensor:
        row, column, flip = moves
        if isinstance(where, slice):
            where = torch.arange(self.num_images, device=self.device)[where]
        if self.device.type == "cpu":
            crops = self.windows[where.numpy(), row.numpy(), column.numpy()]
            flipped = np.flatnonzero(flip.numpy())
            crops[flipped] = crops[flipped, :, ::-1]
            return torch.from_numpy(crops)
        crops = self.windows[where, row, column]
        return torch.where(flip.bool()[:, None, None, None], crops.flip(2), crops)


class TestSetReadTwice(RuntimeError):
    """The test set was about to be read a second time without being asked for by name."""

    __test__ = False  # not a test class, whatever pytest thinks of its name


class TestLoader(BatchLoader):
    """The test set: read once, for the final report.

    A second pass raises `TestSetReadTwice`, so that no selection or early stopping can come to depend on it by
    mistake. A report on several models asks for each further pass by name with `read_as`; `reads` lists them all.
    """

    __test__ = False

    def __init__(self, *args, **kwargs):
        """Takes the arguments of `BatchLoader`."""
        super().__init__(*args, **kwargs)
        self.reads: list[str] = []

    def __iter__(self) -> Iterator[Batch]:
        if self.reads:
            raise TestSetReadTwice(f"the test set has been read already ({', '.join(self.reads)}); choose models on "
                                   "the validation set, or name the purpose: loader.read_as('...')")
        self.reads.append("final report")
        return self._batches()

    def read_as(self, purpose: str) -> TestLoader:
        """A loader for one more pass with a purpose of its own; the same purpose twice raises `TestSetReadTwice`."""
        if purpose in self.reads:
            raise TestSetReadTwice(f"the test set has been read for '{purpose}' already")
        self.reads.append(purpose)
        once = copy.copy(self)
        once.reads = []
        return once


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel in pixel units; images: uint8 (N, H, W, C), results: (C,).

    Exact and order-independent: both come from the histogram of the 256 pixel values.
    """
    values = np.arange(256, dtype=np.float64)
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    total = counts.sum(axis=1)
    mean = counts @ values / total
    variance = counts @ values**2 / total - mean**2
    return mean, np.sqrt(np.maximum(variance, 1e-6))


def balanced_indices(images: np.ndarray | Tensor, targets: np.ndarray | Tensor, num_images: int,
                     seed: int) -> np.ndarray:
    """Where a class-balanced random sample of `num_images` images lies; images: uint8 (N, ...), targets: int (N,).

    Every class gives equally many; one with too few gives all it has, and the others fill up evenly. The order spreads
    each class evenly over the sample. Which images, and in which order, follows from the seed and their pixels alone:
    the same set of images gives the same sample, however they are sorted and their classes numbered.
    """
    pixels, targets = np.ascontiguousarray(torch.as_tensor(images).cpu()), np.asarray(torch.as_tensor(targets).cpu())
    key = seed.to_bytes(8, "big")
    draws = np.frombuffer(b"".join(hashlib.blake2b(image, digest_size=8, key=key).digest() for image in pixels), ">u8")
    counts, ranks = np.bincount(targets), np.empty(len(targets), dtype=np.int64)
    ranks[np.lexsort((draws, targets))] = np.concatenate([np.arange(count) for count in counts])  # within its class
    chosen = np.lexsort((draws, ranks))[:num_images]
    taken = np.bincount(targets[chosen], minlength=len(counts))
    shares = (ranks[chosen] + 0.5) / taken[targets[chosen]]
    return chosen[np.lexsort((draws[chosen], shares))]


def split_indices(num_images: int, val_split: float, split_seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted training and validation indices: a seeded random `val_split` of the images goes to validation.

    Raises UserError unless both parts get at least one image.
    """
    num_val = round(num_images * val_split)
    if not 0 < num_val < num_images:
        raise UserError(f"--val_split {val_split} leaves an empty part of {num_images} training images; "
                        "use a fraction between 0 and 1 such as 0.2")
    order = torch.randperm(num_images, generator=generator(split_seed, "split")).numpy()
    return np.sort(order[num_val:]), np.sort(order[:num_val])


def loaders_from(data: ImageDataset, *, batch_size: int = 128, val_split: float = 0.2, seed: int = 0,
                 device: str | torch.device = "cpu", eval_batch_size: int = 500
                 ) -> tuple[BatchLoader, BatchLoader, TestLoader]:
    """Train, validation and test loaders over a data set in memory; only the training images are augmented.

    val_split: fraction of the training images held out, the same ones for every seed; seed: order and augmentation.
    """
    mean, std = channel_statistics(data.train_images)
    train, val = split_indices(len(data.train_images), val_split)
    common = {"mean": mean, "std": std, "device": device}
    return (BatchLoader(data.train_images[train], data.train_targets[train], batch_size, augment=True, shuffle=True,
                        seed=seed, **common),
            BatchLoader(data.train_images[val], data.train_targets[val], eval_batch_size, **common),
            TestLoader(data.test_images, data.test_targets, eval_batch_size, **common))


def data_loader(data_dir: str | Path = "./data", dataset: str = "cifar10", *, image_size: int = 32,
                **options: Any) -> tuple[BatchLoader, BatchLoader, TestLoader]:
    """`loaders_from`, which takes the options, of a data set by its name in `utils.datasets.DATASETS`.

    data_dir, image_size, and errors (UserError): as of `utils.datasets.load_dataset`.
    """
    return loaders_from(load_dataset(dataset, data_dir, image_size), **options)
