"""Image sets from small files in their true on-disk formats, and every way such files go wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import socket
import struct
import tarfile
import urllib.error
import urllib.request
import zipfile
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
from sklearn.datasets import load_digits

from distillsec.distill import data_files
from distillsec.distill.data import DATASETS, ImageSet, dataset_entry, load_dataset, pixels
from distillsec.distill.types import RequestError

Bytes = NDArray[np.uint8]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no system data, and no data folder but the test's."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data_files, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.delenv("DISTILLSEC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def refusal(name: str, data_dir: Path, *texts: object, **options: Any) -> str:
    """The one line with which the set is refused; it holds every one of ``texts``."""
    with pytest.raises(RequestError) as caught:
        load_dataset(name, data_dir=data_dir, **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert str(text) in message
    return message


def check_pixels(data: ImageSet, train: Bytes, test: Bytes, labels: Any, test_labels: Any) -> None:
    """The set holds exactly these images (uint8 NCHW) and labels, in this order."""
    for batch, images, wanted in (
        (data.train, train, labels),
        (data.test, test, test_labels),
    ):
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, torch.from_numpy(np.ascontiguousarray(images)) / 255)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == list(wanted)
        assert batch.index is not None
        assert batch.index.tolist() == list(range(len(images)))


def noise(*shape: int) -> Bytes:
    """Random images: no two pixels' places can be exchanged unseen."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def plain(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- the dictionary and the names -----------------------------------------------------------


def test_every_entry_describes_itself() -> None:
    for name, entry in DATASETS.items():
        assert entry.description and "\n" not in entry.description
        assert (entry.image_shape is None) == (entry.classes is None) == name.endswith(":PATH")
        if entry.mean is not None and entry.std is not None and entry.image_shape is not None:
            assert len(entry.mean) == len(entry.std) == entry.image_shape[0]
    assert {name for name, entry in DATASETS.items() if not entry.flips} == {
        "digits",
        "mnist",
        "svhn",
        "gtsrb",
    }


def test_unknown_names_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    refusal("cifar-10", tmp_path, "'cifar-10'", "did you mean cifar10?", "svhn", "npz:PATH")
    refusal("FashionMNIST", tmp_path, "did you mean fashion-mnist?")
    assert "did you mean" not in refusal("zzz", tmp_path, "digits")
    refusal("folders:x", tmp_path, "'folders:x'", "folder:PATH")
    refusal("npz:", tmp_path, "'npz:'", "npz:PATH")
    assert dataset_entry("npz:a:b") is DATASETS["npz:PATH"]


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_impossible_sizes_are_refused(size: int, tmp_path: Path) -> None:
    refusal("digits", tmp_path, size, "1024", image_size=size)


# --- digits, resizing, statistics -----------------------------------------------------------


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    data = load_dataset("digits", data_dir=tmp_path)
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.test), len(data.classes)) == (1297, 500, 10)
    known = {
        (image.tobytes(), int(label))
        for image, label in zip(load_digits().images / 16, load_digits().target, strict=True)
    }
    for batch in (data.train, data.test):
        for image, label in zip(batch.images.double().numpy(), batch.labels, strict=True):
            assert (image[0].tobytes(), int(label)) in known
        assert torch.bincount(batch.labels).min() >= 0.09 * len(batch)  # stratified
    train = data.train.images.double()
    assert data.mean == pytest.approx([float(train.mean())], abs=1e-6)
    assert data.std == pytest.approx([float(train.std(correction=0))], abs=1e-6)
    again = load_dataset("digits", data_dir=tmp_path)
    assert torch.equal(again.train.images, data.train.images)
    assert not (tmp_path / ".cache").exists()


def test_resizing_is_antialiased_and_stays_in_range() -> None:
    images = torch.zeros(1500, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 4:] = 255
    images[1400] = 255
    small = pixels(images, 2)
    reference = Image.fromarray(images[0, 0].numpy()).resize((2, 2), Image.Resampling.BILINEAR)
    assert torch.allclose(small[0, 0] * 255, torch.tensor(np.array(reference)).float(), atol=0.51)
    assert 0 < small[0, 0, 0, 0] < 0.5 < small[0, 0, 0, 1] < 1
    assert torch.equal(small[1400], torch.ones(1, 2, 2))  # beyond the first portion
    assert torch.equal(pixels(images, 8), images / 255)


def test_image_size_and_device(tmp_path: Path) -> None:
    data = load_dataset("digits", data_dir=tmp_path, image_size=16).to("cpu")
    assert data.image_shape == (1, 16, 16)
    assert data.train.images.min() >= 0 and data.train.images.max() <= 1


# --- MNIST's format -------------------------------------------------------------------------


def idx(array: Bytes) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, *, packed: bool) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    labels = np.arange(20, dtype=np.uint8) % 10
    arrays = (noise(20, 28, 28), labels, noise(5, 28, 28), labels[:5])
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, array in zip(names, arrays, strict=True):
        content = idx(array)
        ending = ".gz" if packed else ""
        plain(folder / f"{name}-ubyte{ending}", gzip.compress(content) if packed else content)
    return arrays


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_idx_files(place: str, packed: bool, tmp_path: Path) -> None:
    images, labels, test, test_labels = mnist(tmp_path / place, packed=packed)
    data = load_dataset("fashion-mnist", data_dir=tmp_path)
    check_pixels(data, images[:, None], test[:, None], labels, test_labels)
    assert data.classes[0] == "T-shirt/top" and data.flips
    assert (data.mean, data.std) == ((0.2861,), (0.3530,))


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> float:
        return float(load_dataset("mnist").train.images.sum())

    marks = {}
    for place in ("system/mnist", "data/mnist", "env/MNIST/raw"):
        images, *_ = mnist(tmp_path / place, packed=True)
        marks[place] = float((torch.from_numpy(images) / 255).sum())
        if place.startswith("env"):
            monkeypatch.setenv("DISTILLSEC_DATA", str(tmp_path / "env"))
        assert found() == marks[place]
    other = load_dataset("mnist", data_dir=tmp_path / "elsewhere")
    assert float(other.train.images.sum()) == marks["system/mnist"]


def test_broken_idx_files_are_named(tmp_path: Path) -> None:
    mnist(tmp_path, packed=True)
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = tmp_path / f"{name}.gz"
        good = path.read_bytes()
        content = gzip.decompress(good)
        for broken, fault in (
            (good[: len(good) // 2], "not readable"),
            (content, "not readable"),
            (good[:-6] + b"\0" + good[-5:], "not readable"),
            (gzip.compress(b""), "nothing"),
            (gzip.compress(b"\0\0\x0d" + content[3:]), "not an IDX file"),
            (gzip.compress(content[:-1]), "promises"),
            (gzip.compress(content + b"\0"), "more"),
            (gzip.compress(content[:4] + b"\xff" * 12), "GiB" if "images" in name else "promises"),
        ):
            path.write_bytes(broken)
            refusal("mnist", tmp_path, path, fault)
        path.write_bytes(good)
    plain(tmp_path / "t10k-labels-idx1-ubyte", idx(np.zeros(4, dtype=np.uint8)))
    refusal("mnist", tmp_path, tmp_path / "t10k-labels-idx1-ubyte", "4 labels for 5 images")
    plain(tmp_path / "train-images-idx3-ubyte", idx(noise(20, 28, 27)))
    refusal("mnist", tmp_path, tmp_path / "train-images-idx3-ubyte", "28x28")


def test_labels_out_of_range_and_classes_without_images(tmp_path: Path) -> None:
    mnist(tmp_path, packed=False)
    labels = np.arange(20, dtype=np.uint8) % 10
    plain(tmp_path / "train-labels-idx1-ubyte", idx(labels + 1))
    refusal("mnist", tmp_path, "mnist", "from 1 to 10", "0 to 9")
    plain(tmp_path / "train-labels-idx1-ubyte", idx(np.where(labels == 3, 4, labels)))
    refusal("mnist", tmp_path, "no training image has the label 3")


def test_mnist_does_not_pass_for_fashion_mnist(tmp_path: Path) -> None:
    mnist(tmp_path, packed=False)
    test = np.array([7, 2, 1, 0, 4, 1, 4, 9, 5, 9], dtype=np.uint8)  # MNIST's first test labels
    plain(tmp_path / "t10k-labels-idx1-ubyte", idx(test))
    plain(tmp_path / "t10k-images-idx3-ubyte", idx(noise(10, 28, 28)))
    load_dataset("mnist", data_dir=tmp_path)
    refusal("fashion-mnist", tmp_path, tmp_path, "files of MNIST")


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "SYSTEM_DIR", DEBIAN.parent)
    data = load_dataset("fashion-mnist", data_dir=tmp_path, download=False)
    assert (len(data.train), len(data.test), data.image_shape) == (60000, 10000, (1, 28, 28))
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert float(data.train.images.mean()) == pytest.approx(data.mean[0], abs=1e-4)
    assert float(data.train.images.std()) == pytest.approx(data.std[0], abs=1e-4)
    refusal("mnist", DEBIAN, DEBIAN, "files of FashionMNIST")


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
    """A tiny CIFAR tree, with torchvision told its MD5 sums."""
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
def test_cifar(kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = kind.lower()
    contents = cifar(tmp_path / (name if place == "own" else "."), kind, monkeypatch)
    data = load_dataset(name, data_dir=tmp_path)
    check_pixels(data, *contents)
    assert data.classes[:2] == ("class 0", "class 1") and data.flips


def test_cifar_is_not_unpickled_with_a_wrong_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_gtsrb(tmp_path: Path) -> None:
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


# --- absent sets and downloads --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n, e in DATASETS.items() if e.image_shape and n != "digits"]
)
def test_absent_and_offline(name: str, tmp_path: Path) -> None:
    timeout = socket.getdefaulttimeout()
    home = tmp_path / "new"
    message = refusal(name, home, f"{name} not found", home / name, "system", "no network")
    assert ("apt-get install dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    assert socket.getdefaulttimeout() == timeout
    assert list(home.iterdir()) == []  # nothing half-made stays
    refusal(name, home, "switched off", download=False)


def test_an_unwritable_data_folder(tmp_path: Path) -> None:
    plain(tmp_path / "file", b"")
    refusal("cifar10", tmp_path / "file", "download failed")


class Server:
    """Answers urlopen with the content of files, by name."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.asked: list[str] = []

    def __call__(self, request: urllib.request.Request) -> Any:
        assert socket.getdefaulttimeout() == data_files.NETWORK_TIMEOUT
        name = request.full_url.rsplit("/", 1)[1]
        self.asked.append(name)

        class Response(io.BytesIO):
            url = request.full_url
            length = len(self.contents[name])

        return Response(self.contents[name])


def test_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = mnist(tmp_path / "there", packed=True)
    contents = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    source = torchvision.datasets.FashionMNIST
    sums = [(name, hashlib.md5(contents[name]).hexdigest()) for name, _ in source.resources]
    monkeypatch.setattr(source, "resources", sums)
    server = Server({**contents, "t10k-labels-idx1-ubyte.gz": b"corrupt"})
    monkeypatch.setattr(urllib.request, "urlopen", server)
    home = tmp_path / "home"
    refusal("fashion-mnist", home, "download failed", "corrupted")
    assert list(home.iterdir()) == []
    server.contents = contents
    data = load_dataset("fashion-mnist", data_dir=home)
    assert capsys.readouterr() == ("", "")
    check_pixels(data, arrays[0][:, None], arrays[2][:, None], arrays[1], arrays[3])
    assert [path.name for path in home.iterdir()] == ["FashionMNIST"]
    asked = len(server.asked)
    load_dataset("fashion-mnist", data_dir=home)
    assert len(server.asked) == asked
    load_dataset("fashion-mnist", data_dir=tmp_path / "other", progress=True)
    assert "100%" in capsys.readouterr().err


# --- folder:PATH ----------------------------------------------------------------------------


def tree(top: Path, rows: int, mode: str = "RGB", size: int = 6) -> Bytes:
    """``rows`` images in each of the classes ant and bee; the images, NCHW, class by class."""
    images = (
        noise(2 * rows, size, size + 2, 3) if mode == "RGB" else noise(2 * rows, size, size + 2)
    )
    for number, image in enumerate(images):
        path = top / ("ant", "bee")[number // rows] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images.transpose(0, 3, 1, 2) if mode == "RGB" else images[:, None]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder_with_a_split(mode: str, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    train, test = tree(top / "train", 3, mode), tree(top / "test", 1, mode)
    plain(top / "train" / "ant" / "Thumbs.db", b"no image")
    plain(top / "train" / ".hidden" / "x.png", b"no image")
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    check_pixels(data, train, test, [0, 0, 0, 1, 1, 1], [0, 1])
    assert data.classes == ("ant", "bee")
    assert data.mean == pytest.approx((train / 255).mean(axis=(0, 2, 3)), abs=1e-6)
    assert data.std == pytest.approx((train / 255).std(axis=(0, 2, 3)), abs=1e-6)


def test_folder_without_a_split(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    pool = tree(top, 10)
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    assert [torch.bincount(b.labels).tolist() for b in (data.train, data.test)] == [[8, 8], [2, 2]]
    known = {(image / np.float32(255)).tobytes(): row // 10 for row, image in enumerate(pool)}
    seen = set()
    for batch in (data.train, data.test):
        for image, label in zip(batch.images.numpy(), batch.labels, strict=True):
            assert known[image.tobytes()] == label
            seen.add(image.tobytes())
    assert len(seen) == 20
    again = load_dataset(f"folder:{top}", data_dir=tmp_path / "elsewhere")
    assert torch.equal(again.test.images, data.test.images)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    (top / "bee").rename(top / "train")
    assert load_dataset(f"folder:{top}", data_dir=tmp_path / "d").classes == ("ant", "train")


def test_modes_of_images(tmp_path: Path) -> None:
    """Grey among colour becomes three equal channels; palettes and alpha become RGB."""
    top = tmp_path / "tree"
    tree(top / "test", 1)
    grey, colour = noise(6, 8), noise(6, 8, 3)
    clear = Image.fromarray(colour).convert("RGBA")
    palette = Image.fromarray(grey).convert("RGB").quantize(256)
    folder = top / "train" / "ant"
    (top / "train" / "bee").mkdir(parents=True)
    folder.mkdir(parents=True)
    Image.fromarray(grey).save(folder / "0.png")
    Image.fromarray(grey > 127).save(folder / "1.png")
    Image.fromarray(colour).save(top / "train" / "bee" / "2.png")
    clear.save(top / "train" / "bee" / "3.png")
    palette.save(top / "train" / "bee" / "4.png", transparency=bytes(range(256)))
    images = load_dataset(f"folder:{top}", data_dir=tmp_path).train.images * 255
    for row, wanted in enumerate((grey, (grey > 127) * 255, colour, colour)):
        planes = wanted.transpose(2, 0, 1) if wanted.ndim == 3 else np.stack([wanted] * 3)
        assert np.array_equal(images[row].round().numpy(), planes)
    assert np.array_equal(
        images[4].round().numpy(), np.array(palette.convert("RGB")).transpose(2, 0, 1)
    )


def test_mixed_sizes_need_image_size(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top / "train", 2, size=6)
    tree(top / "test", 1, size=9)
    name = f"folder:{top}"
    refusal(name, tmp_path / "d", "9x11", "6x8", "image_size", top / "test" / "ant" / "000.png")
    assert load_dataset(name, data_dir=tmp_path / "d", image_size=5).image_shape == (3, 5, 5)


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, home = tmp_path / "tree", tmp_path / "data"
    tree(top / "train", 2)
    tree(top / "test", 1)
    decoded: list[str] = []
    decode = data_files._decode

    def counted(file: str, size: int | None) -> Bytes:
        decoded.append(file)
        return decode(file, size)

    monkeypatch.setattr(data_files, "_decode", counted)

    def load(**options: Any) -> tuple[int, ImageSet]:
        decoded.clear()
        data = load_dataset(f"folder:{top}", data_dir=home, **options)
        return len(decoded), data

    before = sorted(top.rglob("*"))
    (count, first), (cached, second) = load(), load()
    assert (count, cached) == (6, 0)
    assert torch.equal(first.train.images, second.train.images)
    assert sorted(top.rglob("*")) == before  # nothing in the user's folder
    (stored,) = (home / ".cache").iterdir()
    assert stored.suffix == ".npz"
    stored.write_bytes(stored.read_bytes()[:100])
    assert load()[0] == 6  # a broken cache is made anew
    assert load(image_size=4)[0] == 6
    path = top / "train" / "ant" / "000.png"
    Image.new("RGB", (8, 6)).save(path)
    os.utime(path, (1, 1))
    count, changed = load()
    assert count == 6 and changed.train.images[0].max() == 0


def test_no_cache_where_it_cannot_be_written(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    home = plain(tmp_path / "file", b"")
    assert len(load_dataset(f"folder:{top}", data_dir=home).train) == 8


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, home = tmp_path / "tree", tmp_path / "data"
    name = f"folder:{top}"
    refusal(name, home, top, "no such folder")
    top.mkdir()
    refusal(name, home, top, "0 class folders")
    tree(top / "train", 2)
    refusal(name, home, top, "train/ only")
    tree(top / "test", 1)
    (top / "test" / "bee").rename(top / "test" / "cow")
    refusal(name, home, top, "bee, cow")
    (top / "test" / "cow").rename(top / "test" / "bee")
    (top / "train" / "cow").mkdir()
    refusal(name, home, top / "train" / "cow", "without images")
    (top / "train" / "cow").rmdir()
    path = top / "train" / "bee" / "002.png"
    good = path.read_bytes()
    for broken in (good[:60], b"", b"text"):
        path.write_bytes(broken)
        refusal(name, home, path, "not a readable image")
    Image.fromarray(np.zeros((6, 8), dtype=np.uint16)).save(path)
    refusal(name, home, path, "8-bit")
    path.write_bytes(good)
    monkeypatch.setattr(data_files, "MAX_BYTES", 100)
    refusal(name, home, "GiB")
    assert not (home / ".cache").exists()


def test_a_folder_too_small_to_split(tmp_path: Path) -> None:
    tree(tmp_path / "tree", 1)
    refusal(f"folder:{tmp_path / 'tree'}", tmp_path, tmp_path / "tree", "too few images")


# --- npz:PATH -------------------------------------------------------------------------------


def arrays(**changes: Any) -> dict[str, Any]:
    """A good set of 2 classes, with changes; a change to ``None`` leaves the key out."""
    content = {
        "x_train": noise(4, 3, 5, 6),
        "y_train": np.array([0, 1, 1, 0]),
        "x_test": noise(2, 3, 5, 6),
        "y_test": np.array([1, 0], dtype=np.uint8),
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


Layout = Callable[[NDArray[Any]], NDArray[Any]]


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(0, 2, 3, 1)])
@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float64])
def test_npz(packed: Any, layout: Layout, kind: type[np.generic], tmp_path: Path) -> None:
    content = arrays(classes=np.array(["ant", "bee"]))
    scaled = dict(content)
    for key in ("x_train", "x_test"):
        stored = content[key] if kind == np.uint8 else (content[key] / 255).astype(kind)
        scaled[key] = layout(stored)
    packed(tmp_path / "set.npz", **scaled)
    data = load_dataset(f"npz:{tmp_path / 'set.npz'}", data_dir=tmp_path)
    assert data.classes == ("ant", "bee") and data.image_shape == (3, 5, 6)
    if kind == np.float16:
        assert torch.allclose(
            data.train.images * 255, torch.tensor(content["x_train"]) * 1.0, 0, 0.1
        )
    else:
        check_pixels(data, content["x_train"], content["x_test"], [0, 1, 1, 0], [1, 0])


def test_npz_without_channels_names_or_split(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    images = noise(20, 6, 7)
    np.savez(path, x=images, y=np.arange(20) % 2)
    data = load_dataset(f"npz:{path}", data_dir=tmp_path, image_size=4)
    assert data.image_shape == (1, 4, 4) and data.classes == ("0", "1")
    data = load_dataset(f"npz:{path}", data_dir=tmp_path)
    assert (len(data.train), len(data.test)) == (16, 4)
    known = {(image / np.float32(255)).tobytes(): row % 2 for row, image in enumerate(images)}
    for image, label in zip(data.train.images.numpy(), data.train.labels, strict=True):
        assert known[image.tobytes()] == label


def test_a_constant_channel_does_not_divide_by_zero(tmp_path: Path) -> None:
    black = np.zeros((4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", **arrays(x_train=black, x_test=black[:2]))
    assert load_dataset(f"npz:{tmp_path / 'set.npz'}", data_dir=tmp_path).std == (1.0, 1.0, 1.0)


NAN = np.full((4, 3, 5, 6), 0.5)
NAN[2, 1, 1, 1] = np.nan
INF = np.where(np.isnan(NAN), np.inf, NAN)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"y_test": None}, "has the keys x_test, x_train, y_train; an npz set has"),
        ({"x_train": NAN}, "x_train holds NaN"),
        ({"x_train": INF}, "x_train holds NaN or infinite"),
        ({"x_train": NAN * 0 - 1}, "x_train holds NaN"),
        ({"x_train": np.full((4, 3, 5, 6), 255.0)}, "x_train holds values 255 to 255"),
        ({"x_train": np.full((4, 3, 5, 6), -0.1)}, "[0, 1] is allowed"),
        ({"x_train": np.zeros((4, 3, 5, 6), dtype=np.int64)}, "x_train is int64"),
        ({"x_train": np.zeros((4, 3, 5, 3), dtype=np.uint8)}, "could be NHWC or NCHW"),
        ({"x_train": np.zeros((4, 5, 5, 6), dtype=np.uint8)}, "none of NHWC"),
        ({"x_train": np.zeros((4, 90), dtype=np.uint8)}, "none of NHWC"),
        ({"x_train": np.uint8(3)}, "none of NHWC"),
        ({"x_train": np.zeros((0, 3, 5, 6), dtype=np.uint8)}, "x_train is empty"),
        ({"x_test": noise(2, 1, 5, 6)}, "x_test has (1, 5, 6)"),
        ({"y_train": np.array([0, 1, 1])}, "y_train is int64 (3,)"),
        ({"y_train": np.array([0.0, 1, 1, 0])}, "y_train is float64"),
        ({"y_train": np.array([0, 1, -1, 0])}, "y_train holds the label -1"),
        ({"y_train": np.array([0, 3, 3, 0])}, "no training image has the label 1"),
        ({"y_train": np.array([0, 10**12, 1, 0])}, "labels run from 0 to 1000000000000"),
        ({"y_train": np.array([0, 2**64 - 1, 1, 0], dtype=np.uint64)}, "y_train holds"),
        ({"y_train": np.zeros(4, dtype=int)}, "1 classes, 2 or more wanted"),
        ({"y_test": np.array([1, 2])}, "test labels run from 1 to 2"),
        ({"classes": np.array(["a", "b", "c"])}, "no training image has the label 2 (c)"),
        ({"classes": np.array([1, 2])}, "classes is int64"),
        ({"classes": np.array(["a", "b"], dtype=object)}, "classes holds Python objects"),
        ({"x_train": np.array([None] * 4)}, "x_train holds Python objects"),
    ],
)
def test_bad_npz(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", **arrays(**changes))
    refusal(f"npz:{tmp_path / 'set.npz'}", tmp_path, tmp_path / "set.npz", fault)


def test_unreadable_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    name = f"npz:{path}"
    refusal(name, tmp_path, path, "no such file")
    np.savez(path, **arrays())
    good = path.read_bytes()
    for broken in (good[: len(good) // 2], good[:10], b"", pickle.dumps(1)):
        path.write_bytes(broken)
        refusal(name, tmp_path, path, "not a readable npz file")
    middle = good.index(b"x_train.npy") + 300
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :])
    refusal(name, tmp_path, path, "CRC")


def test_npz_sizes_are_checked_before_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())
    loud = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        loud, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 3, 512, 512)}
    )
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for member, content in members.items():
            target.writestr(member, loud.getvalue() if member == "x_train.npy" else content)
    refusal(f"npz:{path}", tmp_path, path, "x_train is truncated")
    np.savez(path, **arrays())
    monkeypatch.setattr(data_files, "MAX_BYTES", 400)
    monkeypatch.setattr(np, "load", None)  # the arrays are never reached
    assert re.search(r"x_test: .* GiB", refusal(f"npz:{path}", tmp_path, path))
