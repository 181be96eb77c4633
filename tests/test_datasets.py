"""Where images come from: registry, fingerprint, image folders with their cache, torchvision's files, no network."""
from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from utils import datasets
from utils.common import UserError
from utils.datasets import DATASETS, ImageDataset, load_dataset

CLASSES = ("cat", "ship")
CACHE = ".image_cache_32x32.npz"


def pixels(seed: int, side: int = 32) -> np.ndarray:
    """A random image, uint8 (side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def make_folder(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """An image folder with `counts` = {'train': per class, 'test': per class} random images of two classes."""
    for split, count in counts.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(pixels(1000 * label + i)).save(root / split / name / f"{i:03}{suffix}")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"train": 3, "test": 2})


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files decoded so far, by name."""
    names: list[str] = []
    decode = datasets._decode

    def recording(path: Path, *how: object) -> np.ndarray:
        names.append(f"{path.parent.name}/{path.name}")
        return decode(path, *how)

    monkeypatch.setattr(datasets, "_decode", recording)
    return names


def random_dataset(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> ImageDataset:
    rng = np.random.default_rng(seed)
    arrays = [array for count in (6, 4) for array in (rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
                                                      rng.integers(0, 2, count, dtype=np.int64))]
    return ImageDataset("cifar10", "somewhere", *arrays, classes=classes)


# --- registry and data set -----------------------------------------------------------------------------------------


def test_registry_has_cifar10_first_and_unknown_names_list_the_known() -> None:
    assert list(DATASETS) == ["cifar10", "photos", "folder"]
    with pytest.raises(UserError, match="unknown dataset 'mnist'; known are cifar10, photos, folder"):
        load_dataset("mnist")


def test_data_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        load_dataset("cifar10", tmp_path / "data")


def test_fingerprint_depends_on_every_byte() -> None:
    prints = {random_dataset().fingerprint, random_dataset(1).fingerprint,
              random_dataset(classes=("cat", "dog")).fingerprint}
    for name in ("train_images", "train_targets", "test_images", "test_targets"):
        for position in (0, -1):
            changed = random_dataset()
            getattr(changed, name).reshape(-1)[position] += 1
            prints.add(changed.fingerprint)
    assert len(prints) == 3 + 8
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in prints)
    assert random_dataset().fingerprint == random_dataset().fingerprint


def test_fingerprint_of_a_known_data_set() -> None:
    one, two = np.zeros((1, 32, 32, 3), np.uint8), np.full((2, 32, 32, 3), 7, np.uint8)
    dataset = ImageDataset("cifar10", "x", one, np.array([1]), two, np.array([0, 1]), CLASSES)
    content = (b"cat\0ship" + b"\0" + b"1\0" + bytes(3072) + b"\1" + bytes(7)
               + b"\0" + b"2\0" + b"\7" * 6144 + bytes(8) + b"\1" + bytes(7))
    assert dataset.fingerprint == hashlib.blake2b(content, digest_size=6).hexdigest()


def test_fingerprint_is_computed_once_and_fast() -> None:
    images = np.zeros((60_000, 32, 32, 3), np.uint8)
    dataset = ImageDataset("cifar10", "x", images[:50_000], np.zeros(50_000, np.int64), images[50_000:],
                           np.zeros(10_000, np.int64), CLASSES)
    start = time.process_time()
    first = dataset.fingerprint
    middle = time.process_time()
    assert dataset.fingerprint == first
    assert time.process_time() - middle < 0.01
    assert middle - start < 1.0  # the aim is 0.3 s; a loaded machine gets some room


def test_wrong_arrays_are_programming_errors() -> None:
    good, targets = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64)
    for images, labels in ((good.astype(np.float32), targets), (good[:, :16], targets), (good[:, :16, :16], targets),
                           (good, targets[:1]), (good, targets.astype(np.int32))):
        with pytest.raises(ValueError, match="must be"):
            ImageDataset("cifar10", "x", good, targets, images, labels, CLASSES)


# --- image folder --------------------------------------------------------------------------------------------------


def test_image_folder_content_and_order(folder: Path) -> None:
    data = load_dataset("cifar10", folder)
    assert (data.name, data.source, data.classes) == ("cifar10", "image folder (PNG)", CLASSES)
    assert data.train_targets.tolist() == [0, 0, 0, 1, 1, 1] and data.test_targets.tolist() == [0, 0, 1, 1]
    assert np.array_equal(data.train_images, [pixels(seed) for seed in (0, 1, 2, 1000, 1001, 1002)])
    assert np.array_equal(data.test_images, [pixels(seed) for seed in (0, 1, 1000, 1001)])


def test_image_folder_formats(tmp_path: Path) -> None:
    assert load_dataset("cifar10", make_folder(tmp_path / "a", {"train": 1, "test": 1}, ".JPG")).source == \
        "image folder (JPEG)"
    both = make_folder(make_folder(tmp_path / "b", {"train": 1, "test": 1}), {"train": 1}, ".jpeg")
    assert load_dataset("cifar10", both).source == "image folder (JPEG and PNG)"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "P with transparency"])
def test_other_modes_become_rgb(folder: Path, mode: str, recwarn: pytest.WarningsRecorder) -> None:
    target = folder / "train" / "cat" / "001.png"
    image = Image.fromarray(pixels(5)).convert(mode[:4].strip() if mode[0] != "P" else "P")
    image.save(target, **({"transparency": bytes(range(256))} if "with" in mode else {}))
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_dataset("cifar10", folder).train_images[1], expected)
    assert not [warning for warning in recwarn if "alette" in str(warning.message)]


def test_part_of_cifar10_is_used_with_a_note(folder: Path, capsys: pytest.CaptureFixture) -> None:
    load_dataset("cifar10", folder)
    assert "not the whole of CIFAR-10: 2 classes (cat, ship), 6 training and 4 test images" in capsys.readouterr().err


def test_files_that_are_not_read_are_counted_and_named_in_one_note(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("cat/.hidden.png", "cat/Thumbs.db", "ship/z.webp", "loose.png", ".loose.png"):
        (folder / "train" / name).write_bytes(b"x")
    (folder / "train" / ".checkpoints").mkdir()
    for name in ("more/001.png", "more/deep/002.jpg", "folder.png/003.gif"):
        path = folder / "test" / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for _ in range(2):
        data = load_dataset("folder", folder)
        assert len(data.train_images) == 6 and len(data.test_images) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: 6 files in {folder} are left out (train/loose.png, train/cat/Thumbs.db, "
                           "train/ship/z.webp and 3 more)") and "train|test/<class>/*.png|.jpg|.jpeg" in line
    for path in (folder / "test" / "cat").glob("*.png"):
        path.is_dir() or path.unlink()
    with pytest.raises(UserError, match=r"test/cat has no images \(.*not read: test/cat/folder.png/003.gif, "):
        load_dataset("folder", folder)


def test_other_sizes_are_resized_once_for_a_folder_of_ones_own(folder: Path, decoded: list[str]) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the square around the centre
    Image.fromarray(wide).save(folder / "train" / "cat" / "001.png")
    turned = Image.fromarray(np.concatenate([np.zeros((8, 16, 3), np.uint8), np.full((8, 16, 3), 200, np.uint8)]))
    turned.save(folder / "train" / "cat" / "002.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"
                                                         b"\0\x03\0\0\0\0\0\0")  # orientation 3: upside down
    data = load_dataset("folder", folder, image_size=16)
    assert (data.name, data.source, data.image_size) == ("data", "image folder (PNG) at 16x16", 16)
    assert (data.train_images[1] > 180).all() and data.train_images.shape == (6, 16, 16, 3)
    assert (data.train_images[2, :8] > 180).all() and (data.train_images[2, 8:] < 20).all()
    assert len(decoded) == 10
    load_dataset("folder", folder, image_size=16)
    assert len(decoded) == 10
    at_32 = load_dataset("folder", folder)
    assert at_32.source == "image folder (PNG)" and np.array_equal(at_32.train_images[0], pixels(0))
    with pytest.raises(UserError, match="001.png has 60x20 pixels.*--dataset folder"):
        load_dataset("cifar10", folder)  # what was resized above is not taken for it
    with pytest.raises(UserError, match="--image_size 16: the images of --dataset cifar10 are 32x32"):
        load_dataset("cifar10", folder, image_size=16)


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_a_place_inside_of_a_data_set_is_answered_with_its_parent(folder: Path, name: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    for inside in ("train", "test/", "train/cat"):
        with pytest.raises(UserError, match=f"parent of its (train|test) folder, {folder}$"):
            load_dataset(name, folder / inside)
    monkeypatch.chdir(folder / "train")
    with pytest.raises(UserError, match=f"parent of its train folder, {folder}$"):
        load_dataset(name, ".")
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(b"x")
    with pytest.raises(UserError, match=f"cifar-10-batches-py is the folder of .* its parent, {folder}, where"):
        load_dataset(name, batches)
    with pytest.raises(UserError, match="data_batch_1 is a file.*its parent"):
        load_dataset(name, batches / "data_batch_1")


def test_a_folder_of_ones_own_needs_a_folder_and_two_classes(folder: Path) -> None:
    with pytest.raises(UserError, match="no image folder in .*train/<class>"):
        load_dataset("folder", folder / "nowhere")
    for split in ("train", "test"):
        remove(folder / split / "ship")
    with pytest.raises(UserError, match="train has but one class, cat; a classifier needs two"):
        load_dataset("folder", folder)


def test_broken_images_are_named(folder: Path) -> None:
    target = folder / "test" / "ship" / "001.png"
    whole = target.read_bytes()
    for broken in (b"", b"not an image", whole[: len(whole) // 2], whole[:40] + b"\0" * 200, b"GIF89a" + whole):
        target.write_bytes(broken)
        with pytest.raises(UserError, match=r"test/ship/001\.png"):
            load_dataset("cifar10", folder)
    target.write_bytes(whole)
    assert len(load_dataset("cifar10", folder).test_images) == 4


def test_wrong_size_or_depth_is_named(folder: Path) -> None:
    target = folder / "train" / "cat" / "002.png"
    Image.fromarray(pixels(0, side=33)).save(target)
    with pytest.raises(UserError, match=r"cat/002\.png has 33x33 pixels.*needed are 32x32"):
        load_dataset("cifar10", folder)
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(target)
    with pytest.raises(UserError, match=r"cat/002\.png has 32x32 pixels, mode I.*8 bits"):
        load_dataset("cifar10", folder)


def test_dangling_link_is_named(folder: Path) -> None:
    (folder / "train" / "cat" / "009.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(UserError, match=r"cannot read .*009\.png: No such file"):
        load_dataset("cifar10", folder)


def remove(path: Path) -> None:
    """Deletes a folder with its files."""
    for inner in path.iterdir():
        remove(inner) if inner.is_dir() else inner.unlink()
    path.rmdir()


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda root: remove(root / "test"), "has no test folder"),
    (lambda root: remove(root / "train"), "has no train folder"),
    (lambda root: remove(root / "test" / "cat"), r"test lacks the classes that .*train has: cat"),
    (lambda root: remove(root / "train" / "ship"), r"train lacks the classes that .*test has: ship"),
    (lambda root: [path.unlink() for path in (root / "test" / "ship").iterdir()], r"test/ship has no images"),
    (lambda root: [remove(root / "train" / name) for name in CLASSES], "train has no class folders"),
])
def test_incomplete_folders_are_errors(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", folder)


# --- its cache -----------------------------------------------------------------------------------------------------


def test_second_load_reads_the_cache(folder: Path, decoded: list[str]) -> None:
    first = load_dataset("cifar10", folder)
    assert len(decoded) == 10
    second = load_dataset("cifar10", folder)
    assert len(decoded) == 10 and second.fingerprint == first.fingerprint
    assert [path.name for path in folder.iterdir() if path.is_file()] == [CACHE]


def replace_same_size(root: Path) -> None:
    target = root / "train" / "cat" / "000.png"
    content = target.read_bytes()
    os.utime(target, ns=(0, target.stat().st_mtime_ns + 1))
    assert target.read_bytes() == content


def rename_swap(root: Path) -> None:
    (root / "train" / "cat" / "000.png").rename(root / "train" / "cat" / "010.png")


@pytest.mark.parametrize(("change", "count"), [
    (replace_same_size, 10),
    (rename_swap, 10),
    (lambda root: Image.fromarray(pixels(77)).save(root / "test" / "ship" / "077.png"), 11),
    (lambda root: (root / "test" / "cat" / "001.png").unlink(), 9),
    (lambda root: Image.new("RGB", (32, 32)).save(root / "train" / "ship" / "001.png"), 10),
], ids=["touched", "renamed", "added", "removed", "changed"])
def test_cache_notices(folder: Path, decoded: list[str], change, count: int) -> None:
    load_dataset("cifar10", folder)
    change(folder)
    decoded.clear()
    data = load_dataset("cifar10", folder)
    assert len(decoded) == len(data.train_images) + len(data.test_images) == count
    (folder / CACHE).unlink()
    assert load_dataset("cifar10", folder).fingerprint == data.fingerprint


def test_corrupt_cache_is_rebuilt(folder: Path, decoded: list[str]) -> None:
    expected = load_dataset("cifar10", folder).fingerprint
    cache = folder / CACHE
    whole = cache.read_bytes()
    rng = np.random.default_rng(0)
    spoiled = [b"", b"PK", whole[:-1], whole[: len(whole) // 2], whole[1000:], b"x" * len(whole)]
    for position in rng.integers(0, len(whole), 25):
        spoiled.append(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1:])
    for content in spoiled:
        cache.write_bytes(content)
        assert load_dataset("cifar10", folder).fingerprint == expected
    decoded.clear()
    load_dataset("cifar10", folder)
    assert decoded == []


def test_cache_of_another_kind_is_not_believed(folder: Path) -> None:
    expected = load_dataset("cifar10", folder).fingerprint
    cache = folder / CACHE
    with np.load(cache) as content:
        digest = content["digest"]
    for images in (np.zeros((10, 32, 32, 3), np.float32), np.zeros((9, 32, 32, 3), np.uint8),
                   np.array([{"hostile": 1}], dtype=object)):
        np.savez(cache, images=images, digest=digest)
        assert load_dataset("cifar10", folder).fingerprint == expected


def test_no_cache_where_none_can_be_written(folder: Path, decoded: list[str], capsys: pytest.CaptureFixture) -> None:
    (folder / CACHE / "in the way").mkdir(parents=True)
    load_dataset("cifar10", folder)
    assert capsys.readouterr().err.count("not cached") == 1
    load_dataset("cifar10", folder)
    assert len(decoded) == 20
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


# --- torchvision ---------------------------------------------------------------------------------------------------


def pickled_files() -> dict[str, bytes]:
    """The seven files of CIFAR-10 in miniature: four images a batch."""
    files = {"batches.meta": pickle.dumps({"label_names": list(datasets.CIFAR10_CLASSES)})}
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        rows = np.stack([pixels(10 * i + k).transpose(2, 0, 1).reshape(-1) for k in range(4)])
        files[name] = pickle.dumps({"data": rows, "labels": [i, 1, 2, 9]})
    return files


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature archive, whose checksums torchvision is made to expect; the server is out of reach."""
    files, place = pickled_files(), tmp_path / "source" / CIFAR10.base_folder
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    path = tmp_path / "source" / CIFAR10.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(place, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{k}", md5(files[f"data_batch_{k}"])]
                                                for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path.read_bytes()))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    return path


@pytest.fixture
def placed(archive: Path, tmp_path: Path) -> Path:
    """A data folder with the archive placed in it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CIFAR10.filename).write_bytes(archive.read_bytes())
    return tmp_path / "data"


def check_miniature(data: ImageDataset) -> None:
    assert (data.name, data.source, data.classes) == ("cifar10", "torchvision", datasets.CIFAR10_CLASSES)
    assert data.train_targets.tolist() == [t for i in range(5) for t in (i, 1, 2, 9)]
    assert np.array_equal(data.train_images, [pixels(10 * i + k) for i in range(5) for k in range(4)])
    assert np.array_equal(data.test_images, [pixels(50 + k) for k in range(4)])
    assert data.train_images.flags.c_contiguous


def test_archive_is_extracted_once_and_read(placed: Path, capsys: pytest.CaptureFixture) -> None:
    check_miniature(load_dataset("cifar10", placed))
    assert sorted(path.name for path in placed.iterdir()) == [CIFAR10.base_folder, CIFAR10.filename]
    (placed / CIFAR10.filename).unlink()
    check_miniature(load_dataset("cifar10", placed))
    assert capsys.readouterr().out == ""


def test_torchvision_goes_before_an_image_folder(placed: Path) -> None:
    make_folder(placed, {"train": 1, "test": 1})
    check_miniature(load_dataset("cifar10", placed))


def test_damaged_archive_is_an_error_and_stays(placed: Path) -> None:
    make_folder(placed, {"train": 1, "test": 1})  # must not be taken instead
    path = placed / CIFAR10.filename
    path.write_bytes(path.read_bytes()[:-10])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is incomplete or damaged"):
        load_dataset("cifar10", placed)
    assert path.read_bytes() == before
    assert sorted(path.name for path in placed.iterdir()) == [CIFAR10.filename, "test", "train"]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_torchvision_folder_is_an_error(placed: Path, name: str) -> None:
    load_dataset("cifar10", placed)
    make_folder(placed, {"train": 1, "test": 1})  # must not be taken instead
    path = placed / CIFAR10.base_folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"cifar-10-batches-py is incomplete or damaged .* delete it"):
        load_dataset("cifar10", placed)
    path.unlink()
    with pytest.raises(UserError, match="is incomplete or damaged"):
        load_dataset("cifar10", placed)


def test_data_folder_that_cannot_be_written_is_served(placed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = datasets.tempfile.TemporaryDirectory

    def refusing(prefix: str, dir: Path | None = None):
        if dir is not None:
            raise PermissionError(13, "Permission denied")
        return temporary(prefix=prefix)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(datasets.tempfile, "TemporaryDirectory", refusing)
    monkeypatch.setattr(datasets.os, "replace", refuse)
    check_miniature(load_dataset("cifar10", placed))
    assert [path.name for path in placed.iterdir()] == [CIFAR10.filename]


# --- download ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A local server for the archive; its handler's `content` and `promised` length can be changed."""
    class Handler(http.server.BaseHTTPRequestHandler):
        content, promised = archive.read_bytes(), archive.stat().st_size

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(self.promised))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(self.content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{listening.server_port}/{CIFAR10.filename}")
        yield Handler
        listening.shutdown()
        thread.join()


def test_download(server: type, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    check_miniature(load_dataset("cifar10", tmp_path / "new" / "data"))
    assert [path.name for path in (tmp_path / "new" / "data").iterdir()] == [CIFAR10.base_folder]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", ["cut", "other bytes"])
def test_failed_download_leaves_nothing(server: type, tmp_path: Path, fault: str) -> None:
    server.content = server.content[:100] if fault == "cut" else bytes(len(server.content))
    with pytest.raises(UserError, match="a download of http"):
        load_dataset("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_out_of_reach_is_one_message_with_the_ways_on(archive: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        load_dataset("cifar10", tmp_path / "nothing")
    assert time.monotonic() - start < 20
    message = str(raised.value)
    for part in (f"{tmp_path / 'nothing'} does not exist, so it has neither", "folder cifar-10-batches-py",
                 "archive cifar-10-python.tar.gz",
                 "<class>/*.png|jpg|jpeg", "download of http://127.0.0.1:9/nothing failed (", "refused",
                 "place the archive there", "place an image folder there", "--dataset photos"):
        assert part in message
    assert not (tmp_path / "nothing").exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/x", "https://127.0.0.1:{}/x"])
def test_a_server_that_never_answers_is_given_up(archive: Path, tmp_path: Path, url: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(CIFAR10, "url", url.format(silent.getsockname()[1]))
        start = time.monotonic()
        with pytest.raises(UserError, match=r"failed \(.*timed out.*\). Ways on"):
            load_dataset("cifar10", tmp_path / "nothing")
    assert time.monotonic() - start < 12 and socket.getdefaulttimeout() is None
    assert not (tmp_path / "nothing").exists()


def test_a_server_that_falls_silent_half_way_is_given_up(server: type, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def send_half(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.do_HEAD()
        handler.wfile.write(handler.content[:100])
        done.wait(10)

    monkeypatch.setattr(datasets, "_ANSWER_S", 0.3)
    monkeypatch.setattr(server, "do_GET", send_half)
    with pytest.raises(UserError, match=r"failed \(timed out\). Ways on"):
        load_dataset("cifar10", tmp_path / "data")
    done.set()
    assert not (tmp_path / "data").exists()
