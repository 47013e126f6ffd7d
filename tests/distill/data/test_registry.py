"""Data sets by name: the table's entries, digits, and the sets in IDX files."""

from __future__ import annotations

import gzip
import hashlib
import io
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from distillsec.distill.data import published as data_published
from distillsec.distill.data.datasets import DATASETS
from distillsec.distill.data.registry import dataset_entry, load_dataset, pixels

Bytes = NDArray[np.uint8]
Refusal = Callable[..., str]
CheckPixels = Callable[..., None]
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("offline")


def noise(*shape: int) -> Bytes:
    """Random images: no two pixels' places can be exchanged unseen."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


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


def test_unknown_names_are_refused_with_a_suggestion(refusal: Refusal, tmp_path: Path) -> None:
    refusal("cifar-10", tmp_path, "'cifar-10'", "did you mean cifar10?", "svhn", "npz:PATH")
    refusal("FashionMNIST", tmp_path, "did you mean fashion-mnist?")
    assert "did you mean" not in refusal("zzz", tmp_path, "digits")
    refusal("folders:x", tmp_path, "'folders:x'", "folder:PATH")
    refusal("npz:", tmp_path, "'npz:'", "npz:PATH")
    assert dataset_entry("npz:a:b") is DATASETS["npz:PATH"]


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_impossible_sizes_are_refused(refusal: Refusal, size: int, tmp_path: Path) -> None:
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
def test_idx_files(check_pixels: CheckPixels, place: str, packed: bool, tmp_path: Path) -> None:
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


def test_broken_idx_files_are_named(refusal: Refusal, tmp_path: Path) -> None:
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
            (gzip.compress(content[:4] + b"\xff" * 12), "GiB"),
        ):
            path.write_bytes(broken)
            refusal("mnist", tmp_path, path, fault)
        path.write_bytes(good)
    plain(tmp_path / "t10k-labels-idx1-ubyte", idx(np.zeros(4, dtype=np.uint8)))
    refusal("mnist", tmp_path, tmp_path / "t10k-labels-idx1-ubyte", "4 labels for 5 images")
    plain(tmp_path / "train-images-idx3-ubyte", idx(noise(20, 28, 27)))
    refusal("mnist", tmp_path, tmp_path / "train-images-idx3-ubyte", "28x28")


def test_labels_out_of_range_and_classes_without_images(refusal: Refusal, tmp_path: Path) -> None:
    mnist(tmp_path, packed=False)
    labels = np.arange(20, dtype=np.uint8) % 10
    plain(tmp_path / "train-labels-idx1-ubyte", idx(labels + 1))
    refusal("mnist", tmp_path, "mnist", "from 1 to 10", "0 to 9")
    plain(tmp_path / "train-labels-idx1-ubyte", idx(np.where(labels == 3, 4, labels)))
    refusal("mnist", tmp_path, "no training image has the label 3")


def test_mnist_does_not_pass_for_fashion_mnist(refusal: Refusal, tmp_path: Path) -> None:
    mnist(tmp_path, packed=False)
    test = np.array([7, 2, 1, 0, 4, 1, 4, 9, 5, 9], dtype=np.uint8)  # MNIST's first test labels
    plain(tmp_path / "t10k-labels-idx1-ubyte", idx(test))
    plain(tmp_path / "t10k-images-idx3-ubyte", idx(noise(10, 28, 28)))
    load_dataset("mnist", data_dir=tmp_path)
    refusal("fashion-mnist", tmp_path, tmp_path, "files of MNIST")


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_published, "SYSTEM_DIR", DEBIAN.parent)
    data = load_dataset("fashion-mnist", data_dir=tmp_path, download=False)
    assert (len(data.train), len(data.test), data.image_shape) == (60000, 10000, (1, 28, 28))
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert float(data.train.images.mean()) == pytest.approx(data.mean[0], abs=1e-4)
    assert float(data.train.images.std()) == pytest.approx(data.std[0], abs=1e-4)
    refusal("mnist", DEBIAN, DEBIAN, "files of FashionMNIST")


# --- absent sets and downloads --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n, e in DATASETS.items() if e.image_shape and n != "digits"]
)
def test_absent_and_offline(refusal: Refusal, name: str, tmp_path: Path) -> None:
    timeout = socket.getdefaulttimeout()
    home = tmp_path / "new"
    message = refusal(name, home, f"{name} not found", home / name, "system", "no network")
    assert ("apt-get install dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    assert socket.getdefaulttimeout() == timeout
    assert list(home.iterdir()) == []  # nothing half-made stays
    refusal(name, home, "switched off", download=False)


def test_an_unwritable_data_folder(refusal: Refusal, tmp_path: Path) -> None:
    plain(tmp_path / "file", b"")
    refusal("cifar10", tmp_path / "file", "download failed")


class Server:
    """Answers urlopen with the content of files, by name."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.asked: list[str] = []

    def __call__(self, request: urllib.request.Request) -> Any:
        assert socket.getdefaulttimeout() == data_published.NETWORK_TIMEOUT
        name = request.full_url.rsplit("/", 1)[1]
        self.asked.append(name)

        class Response(io.BytesIO):
            url = request.full_url
            length = len(self.contents[name])

        return Response(self.contents[name])


def test_downloads(
    check_pixels: CheckPixels,
    refusal: Refusal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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


def test_classes_in_another_order_keep_their_images() -> None:
    data = load_dataset("digits")
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    turned = data.in_order(order)
    assert turned.classes == tuple("3140592687")
    for before, after in ((data.train, turned.train), (data.test, turned.test)):
        assert torch.equal(torch.tensor(order)[after.labels], before.labels)
        assert after.images is before.images
