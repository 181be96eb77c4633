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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.checkpoint import write_atomic
from utils.common import UserError, note

SIDE = 32  # pixels, the side of an image unless asked otherwise
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
SPLITS = ("train", "test")
_CHUNK = 256  # images per task: enough to make the hand-over between threads cheap, few enough for a live bar


class FolderImages(NamedTuple):
    """What an image folder holds. Images are uint8 (N, S, S, 3), targets int64 (N,), in the order of the listing."""

    train_images: np.ndarray
    train_targets: np.ndarray
    test_images: np.ndarray
    test_targets: np.ndarray
    classes: tuple[str, ...]
    formats: str             # 'JPEG', 'PNG' or 'JPEG and PNG'


class _File(NamedTuple):
    """One image file: path relative to the data folder, size in bytes, time of the last change."""

    path: str
    size: int
    mtime_ns: int


_Listing = dict[str, list[_File]]  # class name -> its files, both in lexicographic order


def has_image_folder(data_dir: Path) -> bool:
    """Whether `data_dir` has a `train` or `test` folder, so that an image folder was meant (it may be incomplete)."""
    return any((data_dir / split).is_dir() for split in SPLITS)


def cache_path(data_dir: Path, side: int = SIDE, resize: bool = False) -> Path:
    """Where the decoded images of a folder are kept."""
    return data_dir / f".image_cache_{side}x{side}{'_resized' if resize else ''}.npz"


def load_image_folder(data_dir: Path, side: int = SIDE, resize: bool = False) -> FolderImages:
    """Reads `data_dir/train|test/<class>/*`: PNG or JPEG files, greyscale and palette images turned to RGB.

    side: of the square images, in pixels; with `resize` images of other sizes are cut to a square around their centre
    and resized (bicubic), else they are errors. Classes and files come in lexicographic order. The first call decodes
    every file, with a progress bar, and leaves a cache in `data_dir`; later calls read the cache unless a file was
    added, removed or changed (path, size, mtime). Raises UserError naming the file or class for: a missing `train` or
    `test`, fewer than two classes, an empty class, class sets that differ, a file that cannot be decoded or has
    another size.
    """
    left_out: list[str] = []
    listings = {split: _list_split(data_dir, split, left_out) for split in SPLITS}
    _check_classes(data_dir, listings["train"], listings["test"])
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        note(f"{len(left_out):,} files in {data_dir} are left out ({', '.join(left_out[:3])}{more}); read are "
             f"train|test/<class>/*{'|'.join(FORMATS)}")
    files = [file for listing in listings.values() for group in listing.values() for file in group]
    images = _cached_or_decoded(cache_path(data_dir, side, resize), files, side, resize)
    targets = {split: _targets(listing) for split, listing in listings.items()}
    border = len(targets["train"])
    return FolderImages(images[:border], targets["train"], images[border:], targets["test"],
                        classes=tuple(listings["train"]), formats=_format_names(files))


# --- listing -------------------------------------------------------------------------------------------------------


def _list_split(data_dir: Path, split: str, left_out: list[str]) -> _Listing:
    """The classes of one split and their files; UserError for a missing folder, no class or an empty class.

    left_out: gets the files that are not read.
    """
    folder = data_dir / split
    if not folder.is_dir():
        raise UserError(f"the image folder {data_dir} has no {split} folder; it needs train/<class>/* and "
                        f"test/<class>/*")
    with _scan(folder) as entries:
        visible = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    left_out += [f"{split}/{name}" for name, is_folder in visible if not is_folder]
    classes = [name for name, is_folder in visible if is_folder]
    if not classes:
        raise UserError(f"{folder} has no class folders; images belong in {folder / '<class>'}")
    return {name: _list_class(data_dir, f"{split}/{name}", left_out) for name in classes}


def _list_class(data_dir: Path, place: str, left_out: list[str]) -> list[_File]:
    """The image files in `data_dir/place`, sorted; hidden files are left out, and all others that are not read."""
    suffixes, files, others = tuple(FORMATS), [], []
    with _scan(data_dir / place) as entries:
        for entry in entries:
            path = f"{place}/{entry.name}"
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                inner = sorted(file for file in Path(entry.path).rglob("*") if file.is_file() and file.name[0] != ".")
                others += [f"{path}/{file.relative_to(entry.path).as_posix()}" for file in inner]
            elif entry.name.lower().endswith(suffixes):
                files.append(_File(path, entry.stat().st_size, entry.stat().st_mtime_ns))
            else:
                others.append(path)
    if not files:
        lies = f"; what lies there is not read: {', '.join(sorted(others)[:3])}" if others else ""
        raise UserError(f"the class folder {data_dir / place} has no images ({', '.join(FORMATS)}){lies}")
    left_out += sorted(others)
    return sorted(files)


@contextlib.contextmanager
def _scan(folder: Path) -> Iterator[Iterator[os.DirEntry]]:
    """`os.scandir` that reports a folder or file it cannot look at (a dangling link, say) as UserError."""
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _check_classes(data_dir: Path, train: _Listing, test: _Listing) -> None:
    """UserError naming the classes that only one of the two splits has, or when there is but one class."""
    for here, there, names in (("train", "test", train.keys() - test.keys()),
                               ("test", "train", test.keys() - train.keys())):
        if names:
            raise UserError(f"{data_dir / there} lacks the classes that {data_dir / here} has: "
                            f"{', '.join(sorted(names))}")
    if len(train) < 2:
        raise UserError(f"{data_dir / 'train'} has but one class, {', '.join(train)}; a classifier needs two or more")


def _targets(listing: _Listing) -> np.ndarray:
    """Class indices, int64, one for each file."""
    return np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()]).astype(np.int64)


def _format_names(files: Iterable[_File]) -> str:
    """The formats that the file names tell: 'JPEG', 'PNG' or 'JPEG and PNG'."""
    suffixes = {file.path[file.path.rindex("."):] for file in files}
    return " and ".join(sorted({FORMATS[suffix.lower()] for suffix in suffixes}))


# --- cache ---------------------------------------------------------------------------------------------------------


def _cached_or_decoded(cache: Path, files: list[_File], side: int, resize: bool) -> np.ndarray:
    """The images of `files`, uint8 (N, S, S, 3): from the cache where it fits, else decoded and then cached."""
    digest = _digest(files)
    images = _read_cache(cache, digest)
    if images is None or images.shape != (len(files), side, side, 3) or images.dtype != np.uint8:
        images = _decode_all(cache.parent, [file.path for file in files], side, resize)
        _write_cache(cache, digest, images)
    return images


def _digest(files: list[_File]) -> str:
    """Names a listing: another path, size or time of change gives another digest."""
    lines = "".join(f"{path}\0{size}\0{mtime_ns}\n" for path, size, mtime_ns in files)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _read_cache(cache: Path, digest: str) -> np.ndarray | None:
    """The cached images if the cache is whole (zip checksums) and made from the listing `digest`, else None."""
    try:
        with np.load(cache, allow_pickle=False) as content:
            return content["images"] if str(content["digest"]) == digest else None
    except Exception:  # a damaged zip file raises a dozen types; whatever it was, the cache is made anew
        return None


def _write_cache(cache: Path, digest: str, images: np.ndarray) -> None:
    """Saves the cache; a place where that is not possible costs the next start its decoding, nothing else."""
    buffer = io.BytesIO()
    np.savez(buffer, images=images, digest=np.array(digest))
    try:
        write_atomic(cache, buffer.getbuffer())
    except UserError as error:
        note(f"the decoded images are not cached and are decoded again next time ({error})")


# --- decoding ------------------------------------------------------------------------------------------------------


def _decode_all(data_dir: Path, paths: list[str], side: int, resize: bool) -> np.ndarray:
    """Decodes all files in threads (PIL releases the interpreter lock while it decodes), with one progress bar."""
    images = np.empty((len(paths), side, side, 3), np.uint8)

    def decode_chunk(start: int) -> int:
        chunk = paths[start:start + _CHUNK]
        for offset, path in enumerate(chunk):
            images[start + offset] = _decode(data_dir / path, side, resize)
        return len(chunk)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, \
            tqdm(total=len(paths), desc=f"decoding {data_dir}", unit="img", disable=None) as bar:
        for done in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
            bar.update(done)
    return images


def _decode(path: Path, side: int, resize: bool) -> np.ndarray:
    """One image as uint8 (S, S, 3); UserError naming the file if it is broken or has another size or depth."""
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if (resize or image.size == (side, side)) and image.mode[0] not in "IF":
                return np.asarray(_to_square(_to_rgb(image), side) if resize else _to_rgb(image))
            found = f"{image.size[0]}x{image.size[1]} pixels, mode {image.mode}"
    except Exception as error:  # PIL reports broken files by OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"cannot decode the image {path} ({error or type(error).__name__}); replace or remove it") \
            from error
    raise UserError(f"the image {path} has {found}; needed are {'' if resize else f'{side}x{side} pixels of '}8 bits"
                    f"{'' if resize else '. --dataset folder takes images of any size'}")


def _to_square(image: Image.Image, side: int) -> Image.Image:
    """The largest square around the centre, upright as the camera noted it, with `side` pixels a side."""
    return ImageOps.fit(ImageOps.exif_transpose(image), (side, side), Image.Resampling.BICUBIC)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is dropped (palettes with transparency go through RGBA, as PIL asks)."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


PHOTOS = ("brick", "camera", "coffee", "coins", "grass", "gravel", "ihc", "moon", "motorcycle_left", "page")
TRAIN_PER_CLASS, TEST_PER_CLASS = 1200, 300
STRIPES = 5
STRIPES_OF = {"train": (0, 2, 4), "test": (1, 3)}

# Fixed point: Qn is an integer in units of 2**-n.
_STEP = (170, 400)           # Q8: photograph pixels per crop pixel, 0.66 to 1.56
_HALF_SIZE_FROM = 320        # Q8: from 1.25 pixels per step on, sample the level averaged 2x2 (no aliasing)
_TURN = 68                   # Q8 of tan(angle / 2): rotations within +-30 degrees
_CANDIDATES = 4              # places tried for each crop, the one with the most detail is taken
_DETAIL_REACH = 10           # pixels; less than the smallest crop reaches
_COLOUR = (0, 160)           # Q8: 0 is grey, 256 the photograph's own colour
_CONTRAST = (128, 300)       # Q8
_BRIGHTNESS = (-40, 40)      # grey levels
_MEAN = (48, 208)            # grey levels: the mean of a crop is kept inside, so that none drowns in black or white
_CAST = (205, 307)           # Q8: gain of each channel
_NOISE = (8, 64)             # Q8 of a triangular noise with standard deviation 105 grey levels
_MARGIN = 3 << 15            # Q16: 1.5 pixels, the reach of the interpolation on the half-size level


class _Draws(NamedTuple):
    """The geometry of n crops, arrays of shape (n,)."""

    step: np.ndarray         # Q8
    cos: np.ndarray          # Q14
    sin: np.ndarray          # Q14
    y: np.ndarray            # Q16, the centre inside the stripe
    x: np.ndarray            # Q16


def load_photo(name: str) -> np.ndarray:
    """The photograph `name` of the installed scikit-image as uint8 (H, W, 3); UserError if it is not there."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"the photograph {path} of scikit-image cannot be read ({error}); reinstall scikit-image") \
            from error


def stripe_bounds(width: int) -> list[tuple[int, int]]:
    """First and last-plus-one column of the five stripes of a photograph `width` pixels wide."""
    edges = [width * i // STRIPES for i in range(STRIPES + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def photo_crops(photo: np.ndarray, index: int, split: str, count: int) -> np.ndarray:
    """`count` crops, uint8 (count, 32, 32, 3), of the `split` ('train' or 'test') stripes of `photo` (H, W, 3).

    `index` seeds the draws together with the split; the stripes of the split take turns. Raises ValueError for a
    photograph whose stripes are narrower than the largest crop (about 70 pixels).
    """
    rng = np.random.RandomState([2511, index, sorted(STRIPES_OF).index(split)])
    bounds = stripe_bounds(photo.shape[1])
    stripes = STRIPES_OF[split]
    crops = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for turn, stripe in enumerate(stripes):
        low, high = bounds[stripe]
        places = crops[turn::len(stripes)]
        places[...] = _finish(rng, _stripe_samples(rng, photo[:, low:high], len(places)))
    return crops


def generate_split(split: str, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops, uint8 (10 * per_class, 32, 32, 3), and targets, int64, of one split; crop i is of class i mod 10."""
    classes = len(PHOTOS)
    images = np.empty((classes * per_class, SIDE, SIDE, 3), np.uint8)
    for index, name in enumerate(PHOTOS):
        images[index::classes] = photo_crops(load_photo(name), index, split, per_class)
    return images, np.arange(classes * per_class, dtype=np.int64) % classes


def _stripe_samples(rng: np.random.RandomState, stripe: np.ndarray, count: int) -> np.ndarray:
    """`count` turned and scaled squares of one stripe (H, W, 3), int32 (count, 1024, 3) in Q4 grey levels."""
    height, width = (extent // 2 * 2 for extent in stripe.shape[:2])
    draws = _draw(rng, count, stripe[:height, :width])
    level0 = stripe[:height, :width].astype(np.int64)
    level1 = (level0[::2, ::2] + level0[1::2, ::2] + level0[::2, 1::2] + level0[1::2, 1::2] + 2) >> 2
    pixels = np.concatenate([_pack(level0), _pack(level1)])
    y, x = _positions(draws)
    level = (draws.step >= _HALF_SIZE_FROM).astype(np.int64)[:, None]
    return _bilinear(pixels, (y >> level) - (1 << 15), (x >> level) - (1 << 15), width >> level, level * height * width)


def _draw(rng: np.random.RandomState, count: int, stripe: np.ndarray) -> _Draws:
    """Random scale, rotation and a centre from which the whole crop lies inside the stripe (H, W, 3)."""
    step = _integers(rng, _STEP, count)
    turn = _integers(rng, (-_TURN, _TURN), count)
    square = 256 * 256 + turn * turn          # cos and sin from tan(angle / 2), exact in integers
    cos, sin = ((256 * 256 - turn * turn) << 14) // square, ((2 * 256 * turn) << 14) // square
    reach = ((np.abs(cos) + np.abs(sin)) * (SIDE - 1) * step >> 7) + _MARGIN
    if 2 * reach.max() > min(stripe.shape[:2]) << 16:
        raise ValueError(f"a stripe of {stripe.shape[0]}x{stripe.shape[1]} pixels is too small for the largest crop")
    y, x = (reach + ((extent << 16) - 2 * reach) * _integers(rng, (0, (1 << 16) - 1), (_CANDIDATES, count)) // (1 << 16)
            for extent in stripe.shape[:2])
    best = _detail(stripe, y >> 16, x >> 16).argmax(axis=0)
    crop = np.arange(count)
    return _Draws(step, cos, sin, y[best, crop], x[best, crop])


def _integers(rng: np.random.RandomState, low_high: tuple[int, int], size: int | tuple[int, ...]) -> np.ndarray:
    """Integers from low to high, both included; int64 by name, since numpy's default depends on the platform."""
    return rng.randint(low_high[0], low_high[1] + 1, size=size, dtype=np.int64)


def _detail(stripe: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How much the grey level varies around each place (y, x): the sum of its steps within `_DETAIL_REACH` pixels."""
    grey = stripe.astype(np.int64).sum(axis=2)
    steps = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    total = np.pad(steps.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    top, bottom, left, right = y - _DETAIL_REACH, y + _DETAIL_REACH, x - _DETAIL_REACH, x + _DETAIL_REACH
    return total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]


def _positions(draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Where the 1024 pixel centres of each crop lie in the stripe: y and x, int64 (n, 1024) in Q16."""
    offset = 2 * np.arange(SIDE, dtype=np.int64) - (SIDE - 1)          # half pixels from the centre of the crop
    down, right = (grid.reshape(1, -1) for grid in np.meshgrid(offset, offset, indexing="ij"))
    cos, sin, step = (value[:, None] for value in (draws.cos, draws.sin, draws.step))
    y = draws.y[:, None] + ((cos * down + sin * right) * step >> 7)
    x = draws.x[:, None] + ((cos * right - sin * down) * step >> 7)
    return y, x


def _pack(level: np.ndarray) -> np.ndarray:
    """The three channels of (H, W, 3) side by side in one int64 (H * W,), 21 bits each: one gather serves all three."""
    return (level[..., 0] | level[..., 1] << 21 | level[..., 2] << 42).ravel()


def _bilinear(pixels: np.ndarray, y: np.ndarray, x: np.ndarray, stride: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Interpolated values, int32 (n, 1024, 3) in Q4, at the positions y, x (Q16, from pixel centres)."""
    corner = base + (y >> 16) * stride + (x >> 16)
    down, right = (y >> 10) & 63, (x >> 10) & 63                       # Q6
    upper = pixels.take(corner) * (64 - right) + pixels.take(corner + 1) * right
    corner += stride
    lower = pixels.take(corner) * (64 - right) + pixels.take(corner + 1) * right
    packed = upper * (64 - down) + lower * down                        # Q12 in each 21-bit field
    values = np.empty((*packed.shape, 3), np.int32)
    for channel in range(3):
        values[..., channel] = (packed >> 21 * channel + 8) & 0x1FFF
    return values


def _finish(rng: np.random.RandomState, crops: np.ndarray) -> np.ndarray:
    """Colour, contrast, brightness, cast and noise on crops (n, 1024, 3) in Q4; gives uint8 (n, 32, 32, 3)."""
    def draw(low_high: tuple[int, int], channels: int = 1) -> np.ndarray:
        return _integers(rng, low_high, (len(crops), 1, channels)).astype(np.int32)

    grey = (crops @ np.array([[77], [151], [28]], np.int32)) >> 8
    mean = (grey.sum(axis=1, keepdims=True) // (SIDE * SIDE)).astype(np.int32)
    crops = (crops - grey) * draw(_COLOUR) >> 8
    crops += grey - mean
    crops = crops * draw(_CONTRAST) >> 8
    crops += np.clip(mean + 16 * draw(_BRIGHTNESS), 16 * _MEAN[0], 16 * _MEAN[1])
    crops = crops * draw(_CAST, channels=3) >> 8
    noise = rng.randint(0, 256, size=(2, *crops.shape), dtype=np.uint8)
    crops += (noise[0].astype(np.int32) - noise[1]) * draw(_NOISE) >> 4
    return np.clip(crops >> 4, 0, 255).astype(np.uint8).reshape(-1, SIDE, SIDE, 3)


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
    """The embedded photographs (see `utils.datasets`): 12,000 training and 3,000 test crops; `data_dir` is not read."""
    return ImageDataset("photos", "embedded", *generate_split("train", TRAIN_PER_CLASS),
                        *generate_split("test", TEST_PER_CLASS), classes=PHOTOS)


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
