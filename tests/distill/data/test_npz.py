"""``npz:PATH``: layouts, and every way such a file goes wrong."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distillsec.distill.data import raw as data_raw
from distillsec.distill.data.registry import load_dataset

Bytes = NDArray[np.uint8]
Refusal = Callable[..., str]
CheckPixels = Callable[..., None]
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("offline")


def noise(*shape: int) -> Bytes:
    """Random images: no two pixels' places can be exchanged unseen."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


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
def test_npz(
    check_pixels: CheckPixels, packed: Any, layout: Layout, kind: type[np.generic], tmp_path: Path
) -> None:
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
        ({"y_train": np.zeros(4, dtype=int)}, "1 classes, expected 2 or more"),
        ({"y_test": np.array([1, 2])}, "test labels run from 1 to 2"),
        ({"classes": np.array(["a", "b", "c"])}, "no training image has the label 2 (c)"),
        ({"classes": np.array([1, 2])}, "classes is int64"),
        ({"classes": np.array(["a", "b"], dtype=object)}, "classes holds Python objects"),
        ({"x_train": np.array([None] * 4)}, "x_train holds Python objects"),
    ],
)
def test_bad_npz(refusal: Refusal, changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", **arrays(**changes))
    refusal(f"npz:{tmp_path / 'set.npz'}", tmp_path, tmp_path / "set.npz", fault)


def test_unreadable_npz(refusal: Refusal, tmp_path: Path) -> None:
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
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(data_raw, "MAX_BYTES", 2000)  # of 540 pixels, as bytes and floats
    monkeypatch.setattr(np.lib.format, "read_array", None)  # the arrays are never reached
    assert re.search(r"x_test: .* GiB", refusal(f"npz:{path}", tmp_path, path))


def test_other_keys_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays(x_val=noise(1, 3, 5, 6), y_val=np.array([0])))
    load_dataset(f"npz:{path}", data_dir=tmp_path)
    assert caplog.messages == [f"distillsec: warning: npz:{path}: left out: x_val, y_val"]


def test_a_key_that_is_there_twice_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    """numpy reads ``x_train`` where a header was checked as ``x_train.npy``."""
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train", archive.read("x_train.npy"))
    refusal(f"npz:{path}", tmp_path, path, "holds the key x_train twice")


def test_names_without_bytes_are_counted(refusal: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<U0", "fortran_order": False, "shape": (10**9,)}
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("classes.npy", header.getvalue())
    refusal(f"npz:{path}", tmp_path, path, "(1000000000,) names; at most 100000")
    np.savez(path, **arrays(classes=np.array(["a", ""])))
    refusal(f"npz:{path}", tmp_path, path, "class 1 has 0 characters")
