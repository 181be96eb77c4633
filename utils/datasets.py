"""Where images come from: CIFAR-10, any image folder, and photographs that ship inside scikit-image.

An image folder, `train|test/<class>/*.png|jpg|jpeg`, is decoded once in parallel and cached as one file beside its
images. The photographs need no network: 32x32 crops, the same bytes on every machine.
"""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import socket
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.common import SIDE, UserError, note, write_atomic

SPLITS = ("train", "test")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOS = ("brick", "camera", "coffee", "coins", "grass", "gravel", "ihc", "moon", "motorcycle_left", "page")

# --- data sets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set in memory. Images are uint8 (N, S, S, 3), targets int64 (N,) with indices into `classes`.

    `name` is the registry name, or that of the user's own folder; `source` says where the bytes come from
    ('torchvision', 'image folder (JPEG)', 'embedded') and labels results. Raises ValueError for other arrays.
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

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over all images, targets and class names: the same data, wherever it came from, has the same.

        Computed once (about 0.2 s for CIFAR-10); the arrays must not be changed afterwards.
        """
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
    data_dir = Path(os.path.expanduser(data_dir))
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir} is a file; --data_dir needs a folder, such as its parent {data_dir.parent}")
    return load_folder(data_dir, image_size) if name == "folder" else DATASETS[name](data_dir)


def load_cifar10(data_dir: Path) -> ImageDataset:
    """CIFAR-10 from the first of: torchvision's folder, its archive, an image folder, a download through torchvision.

    What is there but damaged is an error (UserError), never a reason to look further. An image folder that is not the
    whole of CIFAR-10 is used, but never in silence.
    """
    if (data_dir / _FOLDER).is_dir():
        return _read_torchvision(data_dir)
    if (data_dir / _ARCHIVE).is_file():
        return _install(data_dir, data_dir / _ARCHIVE)
    if not _has_image_folder(data_dir):
        return _download(data_dir)
    data = _read_image_folder("cifar10", data_dir, SIDE, resize=False)
    found = (len(data.train_images), len(data.test_images))
    if found != (50_000, 10_000) or data.classes != CIFAR10_CLASSES:
        note(f"the image folder in {data_dir} is not the whole of CIFAR-10: {len(data.classes)} classes "
             f"({', '.join(data.classes[:10])}), {found[0]:,} training and {found[1]:,} test images; for images of "
             "your own there is --dataset folder")
    return data


def load_folder(data_dir: Path, image_size: int = SIDE) -> ImageDataset:
    """The user's own images, `data_dir/train|test/<class>/*`, resized (pixels a side); errors: `_read_image_folder`."""
    if not _has_image_folder(data_dir):
        raise UserError(f"no image folder in --data_dir {data_dir}: it needs train/<class>/* and test/<class>/*")
    return _read_image_folder(data_dir.resolve().name or "folder", data_dir, image_size, resize=True)


def load_photos(data_dir: Path) -> ImageDataset:
    """12,000 training and 3,000 test crops of `PHOTOS`; crop i is of photograph i mod 10. `data_dir` is not read."""
    arrays = []
    for split, per_class in (("train", 1200), ("test", 300)):
        images = np.empty((len(PHOTOS) * per_class, SIDE, SIDE, 3), np.uint8)
        for index, name in enumerate(PHOTOS):
            images[index::len(PHOTOS)] = photo_crops(load_photo(name), index, split, per_class)
        arrays += [images, np.arange(len(images), dtype=np.int64) % len(PHOTOS)]
    return ImageDataset("photos", "embedded", *arrays, classes=PHOTOS)


DATASETS = {"cifar10": load_cifar10, "photos": load_photos, "folder": load_folder}


def _has_image_folder(data_dir: Path) -> bool:
    """Whether `data_dir` has a `train` or `test` folder; UserError naming the parent if it is inside of a data set."""
    if any((data_dir / split).is_dir() for split in SPLITS):
        return True
    if any((data_dir / name).is_file() for name in ("data_batch_1", "batches.meta")):
        raise UserError(f"{data_dir} is the folder of CIFAR-10's files itself; give --data_dir its parent, "
                        f"{data_dir.resolve().parent}, where it must be called {_FOLDER}")
    here = data_dir.resolve()
    for part in (here, here.parent):
        if part.name in SPLITS and here.is_dir() and all((part.parent / split).is_dir() for split in SPLITS):
            raise UserError(f"{data_dir} is inside of an image folder; give --data_dir the parent of its "
                            f"{part.name} folder, {part.parent}")
    return False


# --- CIFAR-10 through torchvision, which is imported only when needed: that takes a second --------------------------

_FOLDER, _ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"  # torchvision's names
_ANSWER_S = 15  # how long the download server may stay silent


def _read_torchvision(data_dir: Path) -> ImageDataset:
    """Reads torchvision's extracted folder; UserError if a file is missing or fails torchvision's md5 check."""
    from torchvision.datasets import CIFAR10

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer numpy warns about how the files, of 2009, were pickled
            train, test = (CIFAR10(data_dir, train=train) for train in (True, False))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"{data_dir / _FOLDER} is incomplete or damaged (torchvision's checksums do not match); delete "
                        f"it, and it is made anew from {_ARCHIVE} in {data_dir} or from a download") from error
    arrays = [array for split in (train, test)
              for array in (np.ascontiguousarray(split.data), np.asarray(split.targets, dtype=np.int64))]
    return ImageDataset("cifar10", "torchvision", *arrays, classes=tuple(train.classes))


def _install(data_dir: Path, archive: Path) -> ImageDataset:
    """Extracts the archive in a temporary folder, reads it, and moves it to `data_dir`.

    So a run that is interrupted leaves nothing that looks complete; a read-only `data_dir` is served without the move.
    Raises UserError for a damaged archive or a full disk.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise UserError(f"{archive} is incomplete or damaged (its md5 is not {CIFAR10.tgz_md5}); place it again, "
                        "or delete it for a download")
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".cifar10_", dir=data_dir)
    except OSError:  # cannot be written
        temporary = tempfile.TemporaryDirectory(prefix="cifar10_")
    with temporary as place:
        try:
            extract_archive(os.fspath(archive), place)
        except OSError as error:
            raise UserError(f"cannot extract {archive}: {error.strerror or error}") from error
        dataset = _read_torchvision(Path(place))
        with contextlib.suppress(OSError):
            os.replace(Path(place, _FOLDER), data_dir / _FOLDER)
    return dataset


def _download(data_dir: Path) -> ImageDataset:
    """Downloads CIFAR-10 to `data_dir`; UserError with what was tried and the three ways on if it cannot be had."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_ANSWER_S)  # torchvision sets none: a dead connection would hang for ever
    try:
        with tempfile.TemporaryDirectory(prefix="cifar10_") as place, contextlib.redirect_stdout(io.StringIO()):
            download_url(CIFAR10.url, place, _ARCHIVE, CIFAR10.tgz_md5)
            data_dir.mkdir(parents=True, exist_ok=True)
            return _install(data_dir, Path(place, _ARCHIVE))
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # no network, a broken answer, a wrong md5
        place = f"{data_dir.resolve()} {'has' if data_dir.is_dir() else 'does not exist, so it has'}"
        raise UserError(f"CIFAR-10 cannot be had: {place} neither the folder {_FOLDER}, nor the archive "
                        f"{_ARCHIVE}, nor an image folder train|test/<class>/*.png|jpg|jpeg, and a download of "
                        f"{CIFAR10.url} failed ({getattr(error, 'reason', error)}). Ways on: place the archive there, "
                        "place an image folder there, or use --dataset photos, which needs no network") from error
    finally:
        socket.setdefaulttimeout(before)


# --- image folders -------------------------------------------------------------------------------------------------

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_File = tuple[str, int, int]  # path relative to the data folder, size in bytes, time of the last change in ns


def _read_image_folder(name: str, data_dir: Path, side: int, resize: bool) -> ImageDataset:
    """Reads `data_dir/train|test/<class>/*`: PNG or JPEG files, greyscale and palette images turned to RGB.

    side: of the square images, in pixels; with `resize` images of other sizes are cut to a square around their centre
    and resized (bicubic), else they are errors. Classes and files come in lexicographic order. What else lies there
    (other endings, sub-folders, files outside of a class) is left out, and a note says so. Raises UserError naming the
    file or class for: a missing `train` or `test`, fewer than two classes, an empty class, class sets that differ.
    """
    left_out: list[str] = []
    try:
        train, test = (_list_split(data_dir, split, left_out) for split in SPLITS)
    except OSError as error:  # a dangling link, say
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    for lacking, having, names in (("test", "train", train.keys() - test), ("train", "test", test.keys() - train)):
        if names:
            raise UserError(f"{data_dir / lacking} lacks the classes that {data_dir / having} has: "
                            f"{', '.join(sorted(names))}")
    if len(train) < 2:
        raise UserError(f"{data_dir / 'train'} has but one class, {', '.join(train)}; a classifier needs two or more")
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        note(f"{len(left_out):,} files in {data_dir} are left out ({', '.join(left_out[:3])}{more}); read are "
             f"train|test/<class>/*{'|'.join(FORMATS)}")
    files = [file for listing in (train, test) for group in listing.values() for file in group]
    images = _cached_or_decoded(data_dir, files, side, resize)
    numbers = np.arange(len(train), dtype=np.int64)
    train_targets, test_targets = (np.repeat(numbers, [*map(len, listing.values())]) for listing in (train, test))
    formats = {FORMATS[os.path.splitext(path)[1].lower()] for path, _, _ in files}
    source = f"image folder ({' and '.join(sorted(formats))})" + (f" at {side}x{side}" if side != SIDE else "")
    border = len(train_targets)
    return ImageDataset(name, source, images[:border], train_targets, images[border:], test_targets, tuple(train))


def _list_split(data_dir: Path, split: str, left_out: list[str]) -> dict[str, list[_File]]:
    """The classes of one split and their files, sorted; what is not read, apart from hidden files, goes to left_out."""
    folder = data_dir / split
    if not folder.is_dir():
        raise UserError(f"the image folder {data_dir} has no {split} folder; needed are {split}/<class>/*")
    visible = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    left_out += [f"{split}/{path.name}" for path in visible if not path.is_dir()]
    classes = {path.name: _list_class(path, f"{split}/{path.name}", left_out) for path in visible if path.is_dir()}
    if not classes:
        raise UserError(f"{folder} has no class folders; images belong in {folder / '<class>'}")
    return classes


def _list_class(folder: Path, place: str, left_out: list[str]) -> list[_File]:
    """The image files in the folder of a class, sorted; place: its path relative to the data folder."""
    files, others = [], []
    for entry in os.scandir(folder):
        path = f"{place}/{entry.name}"
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            inner = [file for file in Path(entry.path).rglob("*") if file.is_file() and file.name[0] != "."]
            others += [f"{place}/{file.relative_to(folder).as_posix()}" for file in inner]
        elif entry.name.lower().endswith(tuple(FORMATS)):
            files.append((path, entry.stat().st_size, entry.stat().st_mtime_ns))
        else:
            others.append(path)
    if not files:
        lies = f"; what lies there is not read: {', '.join(sorted(others)[:3])}" if others else ""
        raise UserError(f"the class folder {folder} has no images ({', '.join(FORMATS)}){lies}")
    left_out += sorted(others)
    return sorted(files)


def _cached_or_decoded(data_dir: Path, files: list[_File], side: int, resize: bool) -> np.ndarray:
    """The images of `files`, uint8 (N, S, S, 3): from the cache where that is whole and of this listing, else decoded.

    UserError naming a file that cannot be decoded. If no cache can be written, the next start decodes again.
    """
    cache = data_dir / f".image_cache_{side}x{side}{'_resized' if resize else ''}.npz"
    lines = "".join(f"{path}\0{size}\0{mtime_ns}\n" for path, size, mtime_ns in files)
    digest = hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()
    with contextlib.suppress(Exception), np.load(cache, allow_pickle=False) as content:  # damage raises a dozen types
        images = content["images"]
        if (str(content["digest"]), images.shape, images.dtype) == (digest, (len(files), side, side, 3), np.uint8):
            return images
    try:
        images = np.empty((len(files), side, side, 3), np.uint8)
    except (MemoryError, ValueError) as error:
        raise UserError(f"{len(files):,} images of {side}x{side} pixels do not fit in memory; take a smaller "
                        "--image_size") from error
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # PIL releases the interpreter lock while it decodes
        decoded = pool.imap(lambda file: _decode(data_dir / file[0], side, resize), files, chunksize=256)
        for number, image in enumerate(tqdm(decoded, f"decoding {data_dir}", len(files), unit="img", disable=None)):
            images[number] = image
    buffer = io.BytesIO()
    np.savez(buffer, images=images, digest=np.array(digest))
    try:
        write_atomic(cache, buffer.getbuffer())
    except UserError as error:
        note(f"the decoded images are not cached and are decoded again next time ({error})")
    return images


def _decode(path: Path, side: int, resize: bool) -> np.ndarray:
    """One image as uint8 (S, S, 3), without transparency; UserError naming a file that is broken or does not fit.

    With `resize` it is the largest square around the centre, upright as the camera noted it.
    """
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if (resize or image.size == (side, side)) and image.mode[0] not in "IF":
                palette = image.mode == "P" and "transparency" in image.info  # goes through RGBA, as PIL asks
                rgb = (image.convert("RGBA") if palette else image).convert("RGB")
                if resize:
                    rgb = ImageOps.fit(ImageOps.exif_transpose(rgb), (side, side), Image.Resampling.BICUBIC)
                return np.asarray(rgb)
            found = f"{image.size[0]}x{image.size[1]} pixels, mode {image.mode}"
    except Exception as error:  # PIL reports broken files by OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"cannot decode {path} ({error or type(error).__name__}); replace or remove it") from error
    raise UserError(f"{path} has {found}; needed are {side}x{side} pixels (any size with --dataset folder) of 8 bits")


# --- photographs ---------------------------------------------------------------------------------------------------
# PNGs that lie in every scikit-image wheel since 0.22; the class of a crop is the photograph it was cut from. All is
# integer arithmetic on `RandomState`, whose stream numpy has frozen: the same bytes everywhere. Qn: in units of 2**-n.


def load_photo(name: str) -> np.ndarray:
    """The photograph `name` of the installed scikit-image as uint8 (H, W, 3); UserError if it is not there."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} of scikit-image cannot be read ({error}); reinstall scikit-image") from error


def photo_crops(photo: np.ndarray, index: int, split: str, count: int) -> np.ndarray:
    """`count` crops, uint8 (count, 32, 32, 3), of the `split` ('train' or 'test') of `photo` (H, W, 3).

    Train and test share no pixel: of five vertical stripes of the photograph the second and the fourth are for testing,
    and a crop lies inside one stripe, with the reach of the interpolation. The stripes of the split take turns; `index`
    seeds the draws together with the split. Raises ValueError for stripes narrower than the largest crop (70 pixels).
    """
    seed, stripes = {"test": (0, (1, 3)), "train": (1, (0, 2, 4))}[split]
    rng = np.random.RandomState([2511, index, seed])
    edges = [photo.shape[1] * i // 5 for i in range(6)]
    crops = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for turn, stripe in enumerate(stripes):
        places = crops[turn::len(stripes)]
        places[...] = _finish(rng, _stripe_samples(rng, photo[:, edges[stripe]:edges[stripe + 1]], len(places)))
    return crops


def _stripe_samples(rng: np.random.RandomState, stripe: np.ndarray, count: int) -> np.ndarray:
    """`count` turned and scaled squares of one stripe (H, W, 3), int32 (count, 1024, 3) in Q4 grey levels."""
    height, width = (extent // 2 * 2 for extent in stripe.shape[:2])
    full = stripe[:height, :width].astype(np.int32)
    half = (full[::2, ::2] + full[1::2, ::2] + full[::2, 1::2] + full[1::2, 1::2] + 2) >> 2
    draws = _draw(rng, count, full)
    y, x = _positions(*draws)
    samples = np.empty((count, SIDE * SIDE, 3), np.int32)
    for level, pixels in enumerate((full, half)):
        crops = (draws[0] >= 320) == level  # from 1.25 pixels a step on, sample the half-size level (no aliasing)
        samples[crops] = _bilinear(pixels, (y[crops] >> level) - (1 << 15), (x[crops] >> level) - (1 << 15))
    return samples


def _draw(rng: np.random.RandomState, count: int, stripe: np.ndarray) -> tuple[np.ndarray, ...]:
    """Step (Q8), cos and sin (Q14), y and x of the centre (Q16), each int64 (count,), of crops inside (H, W, 3)."""
    step = rng.randint(170, 401, count, np.int64)  # Q8: photograph pixels per crop pixel, 0.66 to 1.56
    turn = rng.randint(-68, 69, count, np.int64)   # Q8 of tan(angle / 2): rotations within +-30 degrees
    square = 256 * 256 + turn * turn          # cos and sin from tan(angle / 2), exact in integers
    cos, sin = ((256 * 256 - turn * turn) << 14) // square, ((2 * 256 * turn) << 14) // square
    reach = ((np.abs(cos) + np.abs(sin)) * (SIDE - 1) * step >> 7) + (3 << 15)  # 1.5 pixels for interpolation
    if 2 * reach.max() > min(stripe.shape[:2]) << 16:
        raise ValueError(f"a stripe of {stripe.shape[0]}x{stripe.shape[1]} pixels is too small for the largest crop")
    y, x = (reach + (((extent << 16) - 2 * reach) * rng.randint(1 << 16, size=(4, count), dtype=np.int64) >> 16)
            for extent in stripe.shape[:2])   # of four places the one with the most detail is taken
    best = _detail(stripe, y >> 16, x >> 16).argmax(axis=0)
    return step, cos, sin, y[best, np.arange(count)], x[best, np.arange(count)]


def _detail(stripe: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How much the grey level varies around each place (y, x): the sum of its steps within 10 pixels."""
    grey = stripe.astype(np.int64).sum(axis=2)
    steps = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    total = np.pad(steps.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    top, bottom, left, right = y - 10, y + 10, x - 10, x + 10  # less than the smallest crop reaches
    return total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]


def _positions(*draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the 1024 pixel centres of each crop of `_draw` lie in the stripe: y and x, int64 (n, 1024) in Q16."""
    step, cos, sin, y, x = (value[:, None] for value in draws)
    offset = 2 * np.arange(SIDE, dtype=np.int64) - (SIDE - 1)          # half pixels from the centre of the crop
    down, right = np.repeat(offset, SIDE), np.tile(offset, SIDE)
    return y + ((cos * down + sin * right) * step >> 7), x + ((cos * right - sin * down) * step >> 7)


def _bilinear(level: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values, int32 (n, 1024, 3) in Q4, of `level`, int32 (H, W, 3), at y, x (Q16, from pixel centres)."""
    row, column = y >> 16, x >> 16
    down, right = ((part[..., None] >> 10 & 63).astype(np.int32) for part in (y, x))  # Q6
    upper = level[row, column] * (64 - right) + level[row, column + 1] * right
    lower = level[row + 1, column] * (64 - right) + level[row + 1, column + 1] * right
    return upper * (64 - down) + lower * down >> 8


def _finish(rng: np.random.RandomState, crops: np.ndarray) -> np.ndarray:
    """Colour, contrast, brightness, cast and noise on crops (n, 1024, 3) in Q4; gives uint8 (n, 32, 32, 3)."""
    def draw(low: int, high: int, channels: int = 1) -> np.ndarray:
        return rng.randint(low, high + 1, (len(crops), 1, channels), np.int64).astype(np.int32)

    grey = crops @ np.array([[77], [151], [28]], np.int32) >> 8
    mean = (grey.sum(axis=1, keepdims=True) // (SIDE * SIDE)).astype(np.int32)
    crops = (crops - grey) * draw(0, 160) >> 8                               # Q8: 256 is the photograph's own colour
    crops += grey - mean
    crops = crops * draw(128, 300) >> 8                                      # Q8: contrast
    crops += np.clip(mean + 16 * draw(-40, 40), 16 * 48, 16 * 208)           # none drowns in black or white
    crops = crops * draw(205, 307, channels=3) >> 8                          # Q8: gain of each channel
    noise = rng.randint(0, 256, size=(2, *crops.shape), dtype=np.uint8)
    crops += (noise[0].astype(np.int32) - noise[1]) * draw(8, 64) >> 4       # Q8: triangular, deviation 105 grey levels
    return np.clip(crops >> 4, 0, 255).astype(np.uint8).reshape(-1, SIDE, SIDE, 3)
