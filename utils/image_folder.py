"""Image folders: `train|test/<class>/*.png|jpg|jpeg`, decoded once in parallel and cached as one file beside them."""
from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.checkpoint import write_atomic
from utils.errors import UserError

SIDE = 32
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
SPLITS = ("train", "test")
CACHE_NAME = ".image_cache_32x32.npz"
_CHUNK = 256  # images per task: enough to make the hand-over between threads cheap, few enough for a live bar


class FolderImages(NamedTuple):
    """What an image folder holds. Images are uint8 (N, 32, 32, 3), targets int64 (N,), in the order of the listing."""

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


def load_image_folder(data_dir: Path) -> FolderImages:
    """Reads `data_dir/train|test/<class>/*`: 32x32 PNG or JPEG files, greyscale and palette images turned to RGB.

    Classes and files come in lexicographic order. The first call decodes every file, with a progress bar, and leaves a
    cache in `data_dir`; later calls read the cache unless a file was added, removed or changed (path, size, mtime).
    Raises UserError naming the file or class for: a missing `train` or `test`, an empty class, class sets that differ,
    a file that cannot be decoded or has another size.
    """
    listings = {split: _list_split(data_dir, split) for split in SPLITS}
    _check_same_classes(data_dir, listings["train"], listings["test"])
    files = [file for listing in listings.values() for group in listing.values() for file in group]
    images = _cached_or_decoded(data_dir, files)
    targets = {split: _targets(listing) for split, listing in listings.items()}
    border = len(targets["train"])
    return FolderImages(images[:border], targets["train"], images[border:], targets["test"],
                        classes=tuple(listings["train"]), formats=_format_names(files))


# --- listing -------------------------------------------------------------------------------------------------------


def _list_split(data_dir: Path, split: str) -> _Listing:
    """The classes of one split and their files; UserError for a missing folder, no class or an empty class."""
    folder = data_dir / split
    if not folder.is_dir():
        raise UserError(f"the image folder {data_dir} has no {split} folder; it needs train/<class>/* and "
                        f"test/<class>/*")
    with _scan(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders; images belong in {folder / '<class>'}")
    return {name: _list_class(data_dir, f"{split}/{name}") for name in classes}


def _list_class(data_dir: Path, place: str) -> list[_File]:
    """The image files in `data_dir/place`, sorted; hidden files and other file types are left out."""
    suffixes = tuple(FORMATS)
    with _scan(data_dir / place) as entries:
        files = [_File(f"{place}/{entry.name}", entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries
                 if entry.name.lower().endswith(suffixes) and entry.name[0] != "." and not entry.is_dir()]
    if not files:
        raise UserError(f"the class folder {data_dir / place} has no images ({', '.join(FORMATS)})")
    return sorted(files)


@contextlib.contextmanager
def _scan(folder: Path) -> Iterator[Iterator[os.DirEntry]]:
    """`os.scandir` that reports a folder or file it cannot look at (a dangling link, say) as UserError."""
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _check_same_classes(data_dir: Path, train: _Listing, test: _Listing) -> None:
    """UserError naming the classes that only one of the two splits has."""
    for here, there, names in (("train", "test", train.keys() - test.keys()),
                               ("test", "train", test.keys() - train.keys())):
        if names:
            raise UserError(f"{data_dir / there} lacks the classes that {data_dir / here} has: "
                            f"{', '.join(sorted(names))}")


def _targets(listing: _Listing) -> np.ndarray:
    """Class indices, int64, one for each file."""
    return np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()]).astype(np.int64)


def _format_names(files: Iterable[_File]) -> str:
    """The formats that the file names tell: 'JPEG', 'PNG' or 'JPEG and PNG'."""
    suffixes = {file.path[file.path.rindex("."):] for file in files}
    return " and ".join(sorted({FORMATS[suffix.lower()] for suffix in suffixes}))


# --- cache ---------------------------------------------------------------------------------------------------------


def _cached_or_decoded(data_dir: Path, files: list[_File]) -> np.ndarray:
    """The images of `files`, uint8 (N, 32, 32, 3): from the cache where it fits, else decoded and then cached."""
    cache, digest = data_dir / CACHE_NAME, _digest(files)
    images = _read_cache(cache, digest)
    if images is None or images.shape != (len(files), SIDE, SIDE, 3) or images.dtype != np.uint8:
        images = _decode_all(data_dir, [file.path for file in files])
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
        print(f"note: the decoded images are not cached and are decoded again next time ({error})", file=sys.stderr)


# --- decoding ------------------------------------------------------------------------------------------------------


def _decode_all(data_dir: Path, paths: list[str]) -> np.ndarray:
    """Decodes all files in threads (PIL releases the interpreter lock while it decodes), with one progress bar."""
    images = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)

    def decode_chunk(start: int) -> int:
        chunk = paths[start:start + _CHUNK]
        for offset, path in enumerate(chunk):
            images[start + offset] = _decode(data_dir / path)
        return len(chunk)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, \
            tqdm(total=len(paths), desc=f"decoding {data_dir}", unit="img", disable=None) as bar:
        for done in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
            bar.update(done)
    return images


def _decode(path: Path) -> np.ndarray:
    """One image as uint8 (32, 32, 3); UserError naming the file if it is broken or has another size or depth."""
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if image.size == (SIDE, SIDE) and image.mode[0] not in "IF":
                return np.asarray(_to_rgb(image))
            found = f"{image.size[0]}x{image.size[1]} pixels, mode {image.mode}"
    except Exception as error:  # PIL reports broken files by OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"cannot decode the image {path} ({error or type(error).__name__}); replace or remove it") \
            from error
    raise UserError(f"the image {path} has {found}; needed are {SIDE}x{SIDE} pixels of 8 bits")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is dropped (palettes with transparency go through RGBA, as PIL asks)."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
