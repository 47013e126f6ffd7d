"""Numpy's archives and others' safetensors files: by shape, then by name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from distillsec.distill.files import safe as files
from distillsec.distill.files.formats import read_received
from distillsec.distill.types import RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]
IMAGES = np.random.default_rng(0).random((4, 1, 3, 2), dtype=np.float32)
LABELS = np.array([0, 1, 1, 0])
Save = Callable[..., Path]


def save_npz(folder: Path, **arrays: NDArray[Any]) -> Path:
    path = folder / "x.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def save_safetensors(folder: Path, **arrays: NDArray[Any]) -> Path:
    path = folder / "x.safetensors"
    save_file({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, path)
    return path


@pytest.fixture(params=[save_npz, save_safetensors], ids=["npz", "safetensors"])
def save(request: pytest.FixtureRequest) -> Save:
    found: Save = request.param
    return found


def test_arrays_are_known_by_their_shapes(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path, synthetic=IMAGES, classes_of=LABELS, lr=np.array([0.5]))
    form, found = read_received(path)
    assert form == path.suffix[1:] and found.labels is not None
    assert torch.equal(found.images, torch.from_numpy(IMAGES))
    assert found.labels.tolist() == LABELS.tolist()
    assert (found.rate, found.notes) == (0.5, ("learning rate 0.5 of the file",))


def test_names_decide_where_shapes_do_not(refused: Refused, tmp_path: Path, save: Save) -> None:
    more = {"initial": IMAGES, "iterations": LABELS}
    found = read_received(save(tmp_path, images=IMAGES + 1, targets=LABELS, **more))[1]
    assert torch.equal(found.images, torch.from_numpy(IMAGES) + 1)
    assert found.notes == ("left out of the file: initial, iterations",)
    path = save(tmp_path, first=IMAGES, second=IMAGES, labels=LABELS)
    with refused(path, "several arrays that could be its images: first, second"):
        read_received(path)
    path = save(tmp_path, images=IMAGES, first=LABELS, second=LABELS)
    with refused(path, "several arrays that could be its labels: first, second"):
        read_received(path)


def test_grey_images_soft_labels_and_none(refused: Refused, tmp_path: Path, save: Save) -> None:
    soft = np.eye(2, dtype=np.float32)[LABELS]
    found = read_received(save(tmp_path, images=IMAGES[:, 0], labels=soft))[1]
    assert found.images.shape == IMAGES.shape and found.labels is not None
    assert torch.equal(found.labels, torch.from_numpy(soft))
    assert read_received(save(tmp_path, images=IMAGES))[1].labels is None
    path = save(tmp_path, labels=LABELS)
    with refused(path, "holds labels, and no images (N, C, H, W)"):
        read_received(path)
    with refused(path, "there is no set 1"):
        read_received(path, 1)


def test_names_of_classes_are_read(tmp_path: Path) -> None:
    path = save_npz(tmp_path, images=IMAGES, labels=LABELS, classes=np.array(["cat", "dog"]))
    assert read_received(path)[1].classes == ("cat", "dog")


def test_objects_and_damaged_archives_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = save_npz(tmp_path, images=IMAGES, labels=np.array([{}, {}, {}, {}], dtype=object))
    with refused(path, "labels holds Python objects"):
        read_received(path)
    path = save_npz(tmp_path, images=IMAGES, labels=np.array(list("abcd")))
    with refused(path, "not numbers"):
        read_received(path)
    path = save_npz(tmp_path, images=IMAGES, labels=LABELS)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["images.npy"] = parts["images.npy"].replace(b"(4, 1, 3, 2)", b"(9, 9, 9, 9)")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with refused(path, "images is truncated"):
        read_received(path)


def test_a_million_million_names_of_no_length(refused: Refused, tmp_path: Path) -> None:
    path = save_npz(tmp_path, images=IMAGES, labels=LABELS)
    header = "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("classes.npy", b"\x93NUMPY\x01\x00v\x00" + header.encode() + b"\n")
    with refused(path, "classes has (1000000000000,) names, at most 100000"):
        read_received(path)


def test_what_would_be_built_is_bounded_before(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    path = save(tmp_path, images=IMAGES, labels=LABELS)
    monkeypatch.setattr(files, "BUILT_CAP", 300)
    with refused(path, "bytes of memory to read, at most 300"):
        read_received(path)


def test_types_that_torch_cannot_compute_with_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"images": torch.from_numpy(IMAGES).to(torch.float8_e4m3fn)}, path)
    with refused(path, "holds the types F8_E4M3"):
        read_received(path)
