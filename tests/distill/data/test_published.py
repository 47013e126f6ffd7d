"""Published sets from small files in torchvision's true on-disk formats."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from distillsec.distill.data.registry import load_dataset

Bytes = NDArray[np.uint8]
Refusal = Callable[..., str]
CheckPixels = Callable[..., None]
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("offline")


def noise(*shape: int) -> Bytes:
    """Random images: no two pixels' places can be exchanged unseen."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def plain(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- CIFAR's format -------------------------------------------------------------------------


def python2_pickle(value: object) -> bytes:
    """``bytes`` as Python 2 wrote its strings, and numpy as it was then: the CIFAR files' form."""

    def save_bytes(pickler: Any, content: bytes) -> None:
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    def save_bool(pickler: Any, value: bool) -> None:
        pickler.write(pickle.BININT1 + bytes([value]))  # numpy's flags were 0 and 1

    file = io.BytesIO()
    pickler: Any = vars(pickle)["_Pickler"](file, protocol=2)
    pickler.dispatch = {**pickler.dispatch, bytes: save_bytes, bool: save_bool}
    pickler.dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def cifar(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """A tiny CIFAR tree, its MD5 sums patched into torchvision."""
    source = getattr(torchvision.datasets, kind)
    classes = 10 if kind == "CIFAR10" else 100
    key = b"labels" if kind == "CIFAR10" else b"fine_labels"
    pool = noise(classes * 2 + 3, 3, 32, 32)
    labels = [label % classes for label in range(len(pool))]
    folder = root / source.base_folder
    names = [name for name, _ in source.train_list]
    cut = np.array_split(np.arange(classes * 2), len(names))
    cut.append(np.arange(classes * 2, len(pool)))
    sums = []
    for name, rows in zip([*names, source.test_list[0][0]], cut, strict=True):
        batch = {b"data": pool[rows].reshape(len(rows), -1), key: [labels[row] for row in rows]}
        sums.append([name, md5(plain(folder / name, python2_pickle(batch)))])
    meta = {source.meta["key"].encode(): [f"class {label}".encode() for label in range(classes)]}
    path = plain(folder / source.meta["filename"], python2_pickle(meta))
    monkeypatch.setattr(source, "train_list", sums[:-1])
    monkeypatch.setattr(source, "test_list", sums[-1:])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(path)})
    return pool[: classes * 2], pool[classes * 2 :], labels[: classes * 2], labels[classes * 2 :]


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("place", [".", "own"])
def test_cifar(
    check_pixels: CheckPixels,
    kind: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = kind.lower()
    contents = cifar(tmp_path / (name if place == "own" else "."), kind, monkeypatch)
    data = load_dataset(name, data_dir=tmp_path)
    check_pixels(data, *contents)
    assert data.classes[:2] == ("class 0", "class 1") and data.flips


def test_cifar_is_not_unpickled_with_a_wrong_sum(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar(tmp_path, "CIFAR10", monkeypatch)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    for name in ("data_batch_3", "test_batch", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        good = path.read_bytes()
        path.write_bytes(pickle.dumps(Trap()))
        refusal("cifar10", tmp_path, path, "MD5")
        path.unlink()
        refusal("cifar10", tmp_path, path, "missing")
        path.write_bytes(good)
    assert not (tmp_path / "ran").exists()
    load_dataset("cifar10", data_dir=tmp_path)


def test_an_archive_in_the_data_folder_is_unpacked_offline(
    check_pixels: CheckPixels, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = cifar(tmp_path / "made", "CIFAR10", monkeypatch)
    source = torchvision.datasets.CIFAR10
    archive = tmp_path / "home" / source.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "made" / source.base_folder, source.base_folder)
    refusal("cifar10", archive.parent, "no network")  # its sum is unknown: not touched
    monkeypatch.setattr(source, "tgz_md5", md5(archive))
    check_pixels(load_dataset("cifar10", data_dir=archive.parent, download=False), *contents)
    assert sorted(path.name for path in archive.parent.iterdir()) == [
        source.base_folder,
        archive.name,
    ]


# --- SVHN, STL-10, GTSRB --------------------------------------------------------------------


def test_svhn(
    check_pixels: CheckPixels, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = {}
    contents: dict[str, Any] = {}
    for split, rows in (("train", 20), ("test", 3)):
        images, labels = noise(rows, 3, 32, 32), np.arange(rows) % 10
        path = tmp_path / f"{split}_32x32.mat"
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        sums[split] = [f"http://host/{path.name}", path.name, md5(path)]
        contents[split] = images, labels
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)
    data = load_dataset("svhn", data_dir=tmp_path)
    (images, labels), (test, test_labels) = contents["train"], contents["test"]
    check_pixels(data, images, test, labels, test_labels)
    assert data.classes == tuple("0123456789") and not data.flips
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    refusal("svhn", tmp_path, path, "MD5")
    path.unlink()
    refusal("svhn", tmp_path, "not found", "test_32x32.mat", "no network")


def test_stl10(
    check_pixels: CheckPixels, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stl10_binary"
    images, test = noise(20, 3, 96, 96), noise(2, 3, 96, 96)
    labels = np.arange(20) % 10
    columns = {"train_X.bin": images, "test_X.bin": test, "unlabeled_X.bin": noise(1, 3, 96, 96)}
    contents = {name: array.swapaxes(2, 3).tobytes() for name, array in columns.items()}
    contents["train_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
    contents["test_y.bin"] = bytes([10, 1])
    sums = {name: md5(plain(folder / name, content)) for name, content in contents.items()}
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    plain(folder / "class_names.txt", "\n".join(names).encode())
    for key in ("train_list", "test_list"):
        files = [[name, sums[name]] for name, _ in getattr(torchvision.datasets.STL10, key)]
        monkeypatch.setattr(torchvision.datasets.STL10, key, files)
    whole = load_dataset("stl10", data_dir=tmp_path, image_size=96)
    check_pixels(whole, images, test, labels, [9, 0])
    data = load_dataset("stl10", data_dir=tmp_path)
    assert data.image_shape == (3, 32, 32) and list(data.classes) == names
    reference = Image.fromarray(images[3].transpose(1, 2, 0)).resize(
        (32, 32), Image.Resampling.BILINEAR
    )
    wanted = torch.from_numpy(np.array(reference).transpose(2, 0, 1)) / 255
    assert torch.allclose(data.train.images[3], wanted, atol=1.5 / 255)
    (folder / "train_y.bin").write_bytes(bytes(20))
    refusal("stl10", tmp_path, folder / "train_y.bin", "MD5")


def gtsrb(root: Path) -> tuple[Bytes, Bytes]:
    base = root / "gtsrb" / "GTSRB"
    images, test = noise(43, 32, 32, 3), noise(2, 32, 32, 3)
    for label, image in enumerate(images):
        path = base / "Training" / f"{label:05d}" / "00000_00000.ppm"
        path.parent.mkdir(parents=True)
        Image.fromarray(image).save(path)
        plain(path.parent / f"GT-{label:05d}.csv", b"Filename;Width\n")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    (base / "Final_Test" / "Images").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(test, (16, 1), strict=True)):
        Image.fromarray(image).save(base / "Final_Test" / "Images" / f"{number:05d}.ppm")
        rows.append(f"{number:05d}.ppm;32;32;5;5;27;27;{label}")
    plain(root / "gtsrb" / "GT-final_test.csv", "\n".join(rows).encode())
    return images.transpose(0, 3, 1, 2), test.transpose(0, 3, 1, 2)


def test_gtsrb(check_pixels: CheckPixels, refusal: Refusal, tmp_path: Path) -> None:
    images, test = gtsrb(tmp_path)
    data = load_dataset("gtsrb", data_dir=tmp_path)
    check_pixels(data, images, test, range(43), [16, 1])
    assert data.classes[16] == "00016" and not data.flips
    training = tmp_path / "gtsrb" / "GTSRB" / "Training"
    larger = Image.new("RGB", (40, 50), (255, 0, 0))  # the real files are of many sizes
    larger.save(training / "00007" / "00000_00000.ppm")
    seven = load_dataset("gtsrb", data_dir=tmp_path).train.images[7]
    assert seven.shape == (3, 32, 32) and seven[0].min() == 1 and seven[1:].max() == 0
    (training / "00009").rename(tmp_path / "00009")
    refusal("gtsrb", tmp_path, "00010", "00009 was expected")
    (tmp_path / "00009").rename(training / "00009")
    table = tmp_path / "gtsrb" / "GT-final_test.csv"
    plain(table, table.read_bytes().replace(b"ClassId", b"Class"))
    refusal("gtsrb", tmp_path, "ClassId", tmp_path)
    plain(table, table.read_bytes().replace(b"Class", b"ClassId").replace(b"00001.p", b"00005.p"))
    refusal("gtsrb", tmp_path, "00005.ppm")
