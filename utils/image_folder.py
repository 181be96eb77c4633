"""Image folders: `train|test/<class>/*.png|jpg|jpeg`, decoded once in parallel and cached as one file beside them.

What else lies there (other endings, sub-folders, files outside of a class) is left out, and a note says so.
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.checkpoint import write_atomic
from utils.errors import UserError, note

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
