"""Where images come from: CIFAR-10 (torchvision's files, an image folder, a download), any other image folder, and the
embedded photographs.
"""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import queue
import socket
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils import photos
from utils.errors import UserError, note
from utils.image_folder import SIDE, SPLITS, has_image_folder, load_image_folder

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_TRAIN, CIFAR10_TEST = 50_000, 10_000  # images
_FOLDER, _ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"  # torchvision's names
_ANSWER_S = 15  # how long the download server may stay silent
_DOWNLOAD_FAULTS = (OSError, http.client.HTTPException, RuntimeError)  # no network, a broken answer, a wrong md5


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set in memory. Images are uint8 (N, S, S, 3), targets int64 (N,) with indices into `classes`.

    `name` is the registry name, or that of the user's own folder; `source` says where the bytes come from
    ('torchvision', 'image folder (JPEG)', 'embedded') and labels results. Raises ValueError for arrays of another shape
    or type.
    """

    name: str
    source: str
    train_images: np.ndarray
    train_targets: np.ndarray
    test_images: np.ndarray
    test_targets: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (self.image_size, self.image_size, 3)
        for images, targets in ((self.train_images, self.train_targets), (self.test_images, self.test_targets)):
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                raise ValueError(f"images must be uint8 {('N', *shape)}, got {images.dtype} {images.shape}")
            if targets.dtype != np.int64 or targets.shape != images.shape[:1]:
                raise ValueError(f"targets must be int64 ({len(images)},), got {targets.dtype} {targets.shape}")

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.train_images.shape[1]

    def fingerprint(self) -> str:
        """12 hex digits over all images, targets and class names: the same data, wherever it came from, has the same.

        Computed once (about 0.2 s for CIFAR-10); the arrays must not be changed afterwards.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b("\0".join(self.classes).encode(errors="surrogateescape"), digest_size=6)
        for images, targets in ((self.train_images, self.train_targets), (self.test_images, self.test_targets)):
            digest.update(f"\0{len(images)}\0".encode())
            digest.update(np.ascontiguousarray(images))
            digest.update(np.ascontiguousarray(targets, dtype="<i8"))
        return digest.hexdigest()


def load_dataset(name: str, data_dir: str | Path = "./data", image_size: int = SIDE) -> ImageDataset:
    """The data set `name` of `DATASETS`, complete in memory.

    image_size: side of the images in pixels; 'folder' alone has others than 32. Raises UserError for an unknown name
    (listing the known ones), for data that is missing or damaged and for a size that the data set does not have.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}'; known are {', '.join(DATASETS)}")
    if image_size != SIDE and name != "folder":
        raise UserError(f"--image_size {image_size}: the images of --dataset {name} are {SIDE}x{SIDE}; other sizes "
                        "are for --dataset folder")
    data_dir = Path(data_dir).expanduser()
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"the data folder {data_dir} is a file; --data_dir needs a folder, such as its parent "
                        f"{data_dir.parent}")
    return load_folder(data_dir, image_size) if name == "folder" else DATASETS[name](data_dir)


def load_photos(data_dir: Path) -> ImageDataset:
    """The embedded photographs (see `utils.photos`): 12,000 training and 3,000 test crops; `data_dir` is not read."""
    return ImageDataset("photos", "embedded", *photos.generate_split("train", photos.TRAIN_PER_CLASS),
                        *photos.generate_split("test", photos.TEST_PER_CLASS), classes=photos.PHOTOS)


def load_cifar10(data_dir: Path) -> ImageDataset:
    """CIFAR-10 from the first of: torchvision's folder, its archive, an image folder, a download through torchvision.

    What is there but damaged is an error (UserError), never a reason to look further.
    """
    if (data_dir / _FOLDER).is_dir():
        return _read_torchvision(data_dir)
    if (data_dir / _ARCHIVE).is_file():
        return _install(data_dir, _extract_placed)
    if has_image_folder(data_dir):
        return _cifar10_folder(data_dir)
    _refuse_inner_folder(data_dir)
    try:
        _require_answer(_torchvision_class().url)
        data_dir.mkdir(parents=True, exist_ok=True)
        return _install(data_dir, _download)
    except _DOWNLOAD_FAULTS as error:
        raise UserError(_out_of_reach(data_dir, str(getattr(error, "reason", error)))) from error


def load_folder(data_dir: Path, image_size: int = SIDE) -> ImageDataset:
    """The user's own images, `data_dir/train|test/<class>/*`, resized to `image_size` pixels; named as the folder is.

    Raises UserError for what cannot be used, see `load_image_folder`.
    """
    if not has_image_folder(data_dir):
        _refuse_inner_folder(data_dir)
        raise UserError(f"no image folder in {data_dir}: --dataset folder needs train/<class>/* and test/<class>/* in "
                        "--data_dir")
    return _from_folder(data_dir.resolve().name or "folder", data_dir, image_size, resize=True)


DATASETS: dict[str, Callable[[Path], ImageDataset]] = {
    "cifar10": load_cifar10, "photos": load_photos, "folder": load_folder}


# --- an image folder -----------------------------------------------------------------------------------------------


def _from_folder(name: str, data_dir: Path, image_size: int = SIDE, resize: bool = False) -> ImageDataset:
    folder = load_image_folder(data_dir, image_size, resize)
    source = f"image folder ({folder.formats})" + (f" at {image_size}x{image_size}" if image_size != SIDE else "")
    return ImageDataset(name, source, folder.train_images, folder.train_targets, folder.test_images,
                        folder.test_targets, folder.classes)


def _cifar10_folder(data_dir: Path) -> ImageDataset:
    """The image folder in `data_dir` as CIFAR-10; one that is not all of it is used, but never in silence."""
    data = _from_folder("cifar10", data_dir)
    found = (len(data.train_images), len(data.test_images))
    if found != (CIFAR10_TRAIN, CIFAR10_TEST) or data.classes != CIFAR10_CLASSES:
        note(f"the image folder in {data_dir} is not the whole of CIFAR-10: {len(data.classes)} classes "
             f"({', '.join(data.classes[:10])}), {found[0]:,} training and {found[1]:,} test images; for images of "
             "your own there is --dataset folder")
    return data


def _refuse_inner_folder(data_dir: Path) -> None:
    """UserError when `data_dir` is not the place of a data set but a folder inside of one, naming its parent."""
    if any((data_dir / name).is_file() for name in ("data_batch_1", "batches.meta")):
        raise UserError(f"{data_dir} is the folder of CIFAR-10's files itself; give --data_dir its parent, "
                        f"{data_dir.resolve().parent}, where it must be called {_FOLDER}")
    here = data_dir.resolve()
    for part in (here, here.parent):
        if part.name in SPLITS and here.is_dir() and all((part.parent / split).is_dir() for split in SPLITS):
            raise UserError(f"{data_dir} is inside of an image folder; give --data_dir the parent of its "
                            f"{part.name} folder, {part.parent}")


# --- torchvision ---------------------------------------------------------------------------------------------------


def _torchvision_class() -> type:
    """`torchvision.datasets.CIFAR10`, imported only when it is needed: the import takes a second."""
    from torchvision.datasets import CIFAR10

    return CIFAR10


def _read_torchvision(data_dir: Path) -> ImageDataset:
    """Reads torchvision's extracted folder; UserError if a file is missing or fails torchvision's md5 check."""
    cifar10 = _torchvision_class()
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # newer numpy warns about how the files, of 2009, were pickled
            train, test = (cifar10(data_dir, train=train) for train in (True, False))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"{data_dir / _FOLDER} is incomplete or damaged (torchvision's checksums do not match); delete "
                        f"it, and it is made anew from {_ARCHIVE} in {data_dir} or from a download") from error
    arrays = [array for split in (train, test)
              for array in (np.ascontiguousarray(split.data), np.asarray(split.targets, dtype=np.int64))]
    return ImageDataset("cifar10", "torchvision", *arrays, classes=tuple(train.classes))


def _install(data_dir: Path, fill: Callable[[Path, Path], None]) -> ImageDataset:
    """Lets `fill(data_dir, place)` make torchvision's folder in a temporary place, reads it and moves it to `data_dir`.

    So a run that is interrupted leaves nothing that looks complete; a read-only `data_dir` is served without the move.
    """
    with _temporary_folder(data_dir) as place:
        fill(data_dir, place)
        dataset = _read_torchvision(place)
        with contextlib.suppress(OSError):
            os.replace(place / _FOLDER, data_dir / _FOLDER)
    return dataset


@contextlib.contextmanager
def _temporary_folder(data_dir: Path) -> Iterator[Path]:
    """A folder that is deleted in the end: in `data_dir` if that can be written, else where the system puts such."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".cifar10_", dir=data_dir)
    except OSError:
        folder = tempfile.TemporaryDirectory(prefix="cifar10_")
    with folder as path:
        yield Path(path)


def _extract_placed(data_dir: Path, place: Path) -> None:
    """Extracts the archive that the user placed in `data_dir`; UserError if it is damaged or the disk is full."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive, md5 = data_dir / _ARCHIVE, _torchvision_class().tgz_md5
    if not check_integrity(archive, md5):
        raise UserError(f"{archive} is incomplete or damaged (its md5 is not {md5}); place it again, or delete it for "
                        f"a download")
    try:
        extract_archive(os.fspath(archive), os.fspath(place))
    except OSError as error:
        raise UserError(f"cannot extract {archive}: {error.strerror or error}") from error


# --- download ------------------------------------------------------------------------------------------------------


def _download(data_dir: Path, place: Path) -> None:
    """Downloads and extracts the archive into `place`; one of `_DOWNLOAD_FAULTS` when that fails."""
    from torchvision.datasets.utils import download_and_extract_archive

    cifar10 = _torchvision_class()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_ANSWER_S)  # torchvision sets none: a dead connection would hang for ever
    try:
        with _quiet():
            download_and_extract_archive(cifar10.url, os.fspath(place), filename=_ARCHIVE, md5=cifar10.tgz_md5)
    finally:
        socket.setdefaulttimeout(before)


def _quiet() -> contextlib.AbstractContextManager:
    """Keeps what torchvision prints off stdout ('Files already downloaded and verified')."""
    return contextlib.redirect_stdout(io.StringIO())


def _require_answer(url: str) -> None:
    """Raises what went wrong (one of `_DOWNLOAD_FAULTS`) unless the server answers within `_ANSWER_S` seconds.

    Asked in a thread, because the look-up of a host name knows no timeout.
    """
    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_S).close()
            outcome.put(None)
        except Exception as error:  # whatever it was, it belongs to the one who asked, not to the thread
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = outcome.get(timeout=_ANSWER_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {_ANSWER_S} s") from None
    if error is not None:
        raise error


def _out_of_reach(data_dir: Path, reason: str) -> str:
    """The message when CIFAR-10 cannot be had: what was tried, and the three ways on."""
    return (f"CIFAR-10 cannot be had: {data_dir} has neither the folder {_FOLDER}, nor the archive {_ARCHIVE}, nor an "
            f"image folder train|test/<class>/*.png|jpg|jpeg, and a download of {_torchvision_class().url} failed "
            f"({reason}). Ways on: place the archive there, place an image folder there, or use --dataset photos, "
            "which needs no network")
