"""Files of sets, triggers and 8-bit images: exact round trips, and every fault as one line."""

from __future__ import annotations

import dataclasses
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from distillsec.distill.files import artifact
from distillsec.distill.files.artifact import (
    export_png,
    load_set,
    load_trigger,
    pixel_range,
    quantised,
    save_set,
    save_trigger,
)
from distillsec.distill.files.safe import write_tensors
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]


def make_set(
    shape: tuple[int, int, int] = (3, 4, 5), count: int = 6, *, soft: bool = False, seed: int = 0
) -> DistilledSet:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    batch = Batch(
        images=torch.randn(count, *shape, generator=rng),
        labels=torch.randn(count, 3, generator=rng) if soft else labels,
    )
    recipe = Recipe(
        preprocessing=Preprocessing((0.1,) * shape[0], (0.3,) * shape[0]),
        lr=1 / 3,
        augment="color_crop",
    )
    return DistilledSet(batch=batch, classes=("cat", "großer Hund", "a/b"), recipe=recipe)


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    count=st.integers(1, 7),
    soft=st.booleans(),
)
def test_set_round_trip(shape: tuple[int, int, int], count: int, soft: bool) -> None:
    distilled = make_set(shape, count, soft=soft)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distilled.safetensors"
        save_set(path, distilled)
        found = load_set(path)
    assert torch.equal(found.batch.images, distilled.batch.images)
    assert torch.equal(found.batch.labels, distilled.batch.labels)
    assert found.batch.labels.dtype == distilled.batch.labels.dtype
    assert (found.classes, found.recipe) == (distilled.classes, distilled.recipe)


def test_every_truncation_and_flipped_header_byte_is_refused_or_harmless(
    refused: Refused, tmp_path: Path
) -> None:
    good, path = tmp_path / "good", tmp_path / "bad"
    save_set(good, make_set((1, 2, 2), 3))
    content = good.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with refused(path, ": "):
            load_set(path)
    for position in range(0, len(content) - 72, 3):
        broken = bytearray(content)
        broken[position] ^= 0x15
        path.write_bytes(broken)
        try:
            load_set(path)  # a flip in a class name is a different, valid file
        except RequestError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)


def test_the_file_holds_a_fixed_set_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "distilled.safetensors"
    save_set(path, make_set())
    header = header_of(path)
    assert set(header) == {"images", "labels", "__metadata__"}
    info = json.loads(header["__metadata__"]["distillsec"])
    assert set(info) == {"format_version", "classes", "image_shape", "recipe"}
    tensors = {"zca", "initial"}  # stored as tensors, not as metadata
    assert set(info["recipe"]) == set(make_set().recipe.describe()) - tensors


IMAGES, LABELS = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
BAD_TENSORS: list[tuple[dict[str, Tensor], str]] = [
    ({"images": IMAGES}, "holds the tensors images;"),
    ({"images": IMAGES, "labels": LABELS, "trigger": IMAGES}, "images, labels, trigger;"),
    ({"images": IMAGES.double(), "labels": LABELS}, "torch.float64"),
    ({"images": IMAGES[0], "labels": LABELS}, "shape (1, 2, 2)"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "none 0"),
    ({"images": torch.zeros(2, 1, 1, 4097), "labels": LABELS}, "4096"),
    ({"images": torch.zeros(2, 1, 2, 3), "labels": LABELS}, "metadata says (1, 2, 2)"),
    ({"images": IMAGES / 0, "labels": LABELS}, "NaN"),
    ({"images": IMAGES + float("inf"), "labels": LABELS}, "infinite"),
    ({"images": IMAGES, "labels": LABELS[:1]}, "shape (1,), expected (2,)"),
    ({"images": IMAGES, "labels": LABELS.int()}, "torch.int32"),
    ({"images": IMAGES, "labels": LABELS + 1}, "run from 1 to 2, expected 0 to 1"),
    ({"images": IMAGES, "labels": LABELS - 1}, "run from -1 to 0"),
    ({"images": IMAGES, "labels": torch.zeros(2, 3)}, "expected (2, 2)"),
    ({"images": IMAGES, "labels": torch.zeros(2, 2) / 0}, "labels hold NaN"),
]


def info_with(**changes: Any) -> dict[str, Any]:
    recipe = {"mean": [0.5], "std": [0.2], "epochs": 3, "lr": 0.1, "momentum": 0.9}
    recipe |= {"weight_decay": 0.0, "batch_size": 2, "augment": ""}
    info = {"format_version": 1, "classes": ["a", "b"], "image_shape": [1, 2, 2]}
    recipe |= {key[2:]: changes.pop(key) for key in list(changes) if key.startswith("r_")}
    return info | {"recipe": recipe} | changes


@pytest.mark.parametrize(("tensors", "fault"), BAD_TENSORS)
def test_bad_tensors_are_refused(
    refused: Refused, tmp_path: Path, tensors: dict[str, Tensor], fault: str
) -> None:
    path = tmp_path / "distilled.safetensors"
    write_tensors(path, tensors, info_with())
    with refused(path, fault):
        load_set(path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": None}, "format_version is None"),
        ({"trigger": 1}, "metadata trigger"),
        ({"classes": []}, "metadata classes"),
        ({"classes": "ab"}, "metadata classes"),
        ({"classes": ["a", 3]}, "metadata classes.1"),
        ({"classes": ["a", "\x1b[2J"]}, "control characters"),
        ({"classes": ["a", "x" * 201]}, "the name of class 1 has 201 characters"),
        ({"image_shape": [1, 2]}, "metadata image_shape"),
        ({"recipe": None}, "metadata recipe"),
        ({"r_mean": [0.5, 0.5]}, "mean has 2 numbers for 1 channels"),
        ({"r_std": [0.0]}, "metadata recipe.std.0"),
        ({"r_epochs": 0}, "metadata recipe.epochs"),
        ({"r_epochs": True}, "metadata recipe.epochs"),
        ({"r_epochs": 10**12}, "metadata recipe.epochs"),
        ({"r_lr": -1}, "metadata recipe.lr"),
        ({"r_lr": "0.1"}, "metadata recipe.lr"),
        ({"r_lr": 10**400}, "metadata recipe.lr"),
        ({"r_momentum": 1.5}, "metadata recipe.momentum"),
        ({"r_weight_decay": -1e-4}, "metadata recipe.weight_decay"),
        ({"r_augment": "../x"}, "metadata recipe.augment"),
        ({"r_extra": 1}, "metadata recipe.extra"),
    ],
)
def test_bad_metadata_is_refused(
    refused: Refused, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    path = tmp_path / "distilled.safetensors"
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info_with())
    assert load_set(path).classes == ("a", "b")
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info_with(**changes))
    with refused(path, fault):
        load_set(path)


def test_an_invalid_set_is_never_written(refused: Refused, tmp_path: Path) -> None:
    distilled, path = make_set(), tmp_path / "distilled.safetensors"
    save_set(path, distilled)
    before = path.read_bytes()
    bad = distilled.batch.replace(images=distilled.batch.images * float("nan"))
    with refused(path, "NaN"):
        save_set(path, dataclasses.replace(distilled, batch=bad))
    assert path.read_bytes() == before


def test_triggers(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    tensors = {"pattern": torch.rand(1, 4, 4), "mask": torch.ones(1, 4, 4)}
    info = {"kind": "patch", "target": 3, "range": "pixel", "size": 2}
    save_trigger(path, tensors, info)
    found, described = load_trigger(path)
    assert described == info
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with refused(path, "lacks target, range"):
        save_trigger(path, tensors, {"kind": "patch"})
    with refused(path, "pattern holds NaN"):
        save_trigger(path, {"pattern": torch.tensor([float("nan")])}, info)
    write_tensors(path, tensors, {})
    with refused(path, "lacks kind"):
        load_trigger(path)


# Eight bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_export_keeps_what_quantised_says(
    refused: Refused, tmp_path: Path, channels: int
) -> None:
    distilled = make_set((channels, 4, 5), 7)
    paths = export_png(tmp_path / "png", distilled)
    names = [str(path.relative_to(tmp_path / "png")) for path in paths[:4]]
    assert names == ["0_cat/000.png", "1_gro_er_Hund/000.png", "2_a_b/000.png", "0_cat/001.png"]
    kept = quantised(distilled)
    opened = [Image.open(path) for path in paths]
    assert {image.mode for image in opened} == {"L" if channels == 1 else "RGB"}
    stored = torch.stack([pil_to_tensor(image) for image in opened])
    assert torch.equal(stored.float() / 255, kept.batch.images)
    assert pixel_range(kept.batch.images) == (0.0, 1.0)
    assert torch.equal(quantised(kept).batch.images, kept.batch.images)
    assert (kept.batch.images - distilled.batch.images.clamp(0, 1)).abs().max() <= 0.5001 / 255
    assert [label for _, label in ImageFolder(tmp_path / "png").samples] == [0, 0, 0, 1, 1, 2, 2]
    with refused(tmp_path / "png", "is not empty"):
        export_png(tmp_path / "png", distilled)


def test_hostile_class_names_stay_inside_the_folder(refused: Refused, tmp_path: Path) -> None:
    names = ("../../evil", "/etc", "..")
    paths = export_png(tmp_path / "png", dataclasses.replace(make_set(), classes=names))
    assert all(path.resolve().is_relative_to(tmp_path / "png") for path in paths)
    (tmp_path / "file").touch()
    with refused(tmp_path / "file", "File exists"):
        export_png(tmp_path / "file", make_set())
    with refused(tmp_path / "two", "1 or 3 channels"):
        export_png(tmp_path / "two", make_set((2, 3, 3)))


def test_pixel_range_is_the_true_one() -> None:
    assert pixel_range(torch.tensor([[-0.5, 2.0], [0.0, 1.0]])) == (-0.5, 2.0)
    assert artifact.FORMAT_VERSION == 1
