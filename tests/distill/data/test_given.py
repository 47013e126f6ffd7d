"""Data that is given in Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from distillsec.distill.data.given import given_dataset
from distillsec.distill.data.registry import ImageSet, load_dataset
from distillsec.distill.plugins import objects_by_name
from distillsec.distill.types import RequestError

IMAGES = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 3


def load(data: Any, **options: Any) -> ImageSet:
    with objects_by_name({"given:data": given_dataset(data)}):
        return load_dataset("given:data", **options)


class Pictures(Dataset[tuple[Image.Image, int]]):
    """PIL images with class names, as torchvision's data sets have them."""

    classes = ("cat", "dog", "owl")

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        pixels = (IMAGES[number, 0] * 255).round().to(torch.uint8).numpy()
        return Image.fromarray(pixels), int(LABELS[number])


def test_a_pair_of_tensors_is_split(recwarn: pytest.WarningsRecorder) -> None:
    data = load((IMAGES, LABELS))
    assert (len(data.train), len(data.test), data.classes) == (24, 6, ("0", "1", "2"))
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    rows = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, IMAGES.flatten(1).tolist()))


@pytest.mark.parametrize(
    "data",
    [
        {"x": IMAGES, "y": LABELS},
        TensorDataset(IMAGES, LABELS),
        (IMAGES[:, 0].numpy(), LABELS.numpy()),
        (IMAGES.movedim(1, 3), LABELS),
        [IMAGES, LABELS.tolist()],
    ],
    ids=["mapping", "data set", "arrays", "channels last", "list"],
)
def test_the_forms_give_the_same_data(data: Any) -> None:
    expected, found = load((IMAGES, LABELS)), load(data)
    assert torch.equal(found.train.images, expected.train.images)
    assert torch.equal(found.test.labels, expected.test.labels)


def test_a_split_of_ones_own_stays() -> None:
    pair = load((TensorDataset(IMAGES[:24], LABELS[:24]), TensorDataset(IMAGES[24:], LABELS[24:])))
    mapping = load(
        {
            "x_train": IMAGES[:24],
            "y_train": LABELS[:24],
            "x_test": IMAGES[24:],
            "y_test": LABELS[24:],
            "classes": ["a", "b", "c"],
        }
    )
    for data in (pair, mapping):
        assert torch.equal(data.train.images, IMAGES[:24])
        assert torch.equal(data.test.labels, LABELS[24:])
    assert mapping.classes == ("a", "b", "c")


def test_pictures_keep_their_pixels_and_class_names() -> None:
    data = load(Pictures())
    assert data.classes == ("cat", "dog", "owl")
    exact = {tuple(row) for row in ((IMAGES * 255).round() / 255).flatten(1).tolist()}
    assert {tuple(row) for row in data.train.images.flatten(1).tolist()} <= exact
    assert load(Pictures(), image_size=4).image_shape == (1, 4, 4)


def test_a_loaded_set_keeps_its_normalisation() -> None:
    digits = load_dataset("digits")
    again = load(digits)
    assert again.describe() == {**digits.describe(), "name": "given:data"}
    assert (again.mean, again.std, again.flips) == (digits.mean, digits.std, False)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(IMAGES)


class Ragged(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8 + number, 8), 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES, "Tensor is no data set"),
        ({"images": IMAGES}, "is no data set"),
        ((IMAGES, LABELS, LABELS), "is no data set"),
        ((IMAGES + 1, LABELS), r"\[0, 1\] is allowed"),
        ((IMAGES, LABELS[:5]), "labels are integers of shape"),
        ((IMAGES, LABELS.float()), "labels are integers"),
        ((IMAGES.to(torch.int32), LABELS), "images are uint8"),
        (TensorDataset(IMAGES), "is no pair"),
        (TensorDataset(IMAGES[:0], LABELS[:0]), "is empty"),
        (Endless(), "has no length"),
        (Ragged(), "has images of"),
        ((np.zeros((4, 2, 8, 8)), LABELS[:4]), "is none of NHWC"),
        (
            {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[..., :4], "y_test": LABELS},
            r"test \(1, 8, 4\)",
        ),
    ],
)
def test_what_is_no_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(data)
