"""Data that is given in Python: tensors or arrays, torch data sets, a loaded ``ImageSet``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..types import RequestError
from .datasets import DatasetEntry
from .npz import images_from, labels_from
from .raw import TEST_SHARE, DataRequest, RawSet, check_size, pixel_bytes, stratified

_WHERE: Final = "dataset"
_SPLIT: Final = ("x_train", "y_train", "x_test", "y_test")
_POOL: Final = ("x", "y")
_FORMS: Final = (
    "a data set is a name, a torch Dataset, a pair (train, test) of them, a pair (images, labels), "
    "or a mapping of x_train, y_train, x_test and y_test, or of x and y"
)


def given_dataset(data: Any) -> DatasetEntry:
    """The entry of a data set that is given as an object; it is read when it is loaded.

    data: a torch ``Dataset`` of images with class numbers (one fifth of each class becomes the test
    set), a pair ``(train, test)`` of them, a pair ``(images, labels)`` of tensors or arrays, a
    mapping with the keys of an ``.npz`` (``x_train, y_train, x_test, y_test`` or ``x, y``, with
    ``classes`` if they have names), or whatever has ``train``, ``test``, ``classes``, ``mean`` and
    ``std``, as ``load_dataset`` returns it. Images are ``uint8`` or floating point in [0, 1],
    ``(N, C, H, W)``, ``(N, H, W, C)`` or ``(N, H, W)``; a ``Dataset`` may also hold PIL images.
    Errors: ``RequestError`` for anything else; faults of the content are found when it is loaded.
    """
    if all(hasattr(data, name) for name in ("train", "test", "classes", "mean", "std", "flips")):
        return _loaded(data)
    arrays = _arrays(data)
    if arrays is None:
        raise RequestError(f"dataset: {type(data).__name__} is no data set; {_FORMS}")
    return DatasetEntry(description="given in Python", load=lambda _: _raw(arrays))


def _loaded(data: Any) -> DatasetEntry:
    def load(_: DataRequest) -> RawSet:
        train, test = ((batch.images, batch.labels) for batch in (data.train, data.test))
        return RawSet(train=train, test=test, classes=data.classes)

    return DatasetEntry(
        description="given in Python", load=load, mean=data.mean, std=data.std, flips=data.flips
    )


def _arrays(data: Any) -> Mapping[str, Any] | None:
    """What is given by the keys of an ``.npz``; data sets are not read yet."""
    if isinstance(data, Mapping):
        found = next((keys for keys in (_SPLIT, _POOL) if data.keys() >= set(keys)), None)
        return None if found is None else {k: data[k] for k in (*found, "classes") if k in data}
    if isinstance(data, Dataset):
        return {"x": data, "classes": getattr(data, "classes", None)}
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return None
    if all(isinstance(part, Dataset) for part in data):
        classes = getattr(data[0], "classes", None)
        return {"x_train": data[0], "x_test": data[1], "classes": classes}
    return dict(zip(_POOL, data, strict=True))


def _raw(arrays: Mapping[str, Any]) -> RawSet:
    pairs = {
        name: _pair(name, arrays[name], arrays.get(name.replace("x", "y", 1)))
        for name in ("x_train", "x_test", "x")
        if name in arrays
    }
    if "x" in pairs:
        images, labels = pairs["x"]
        rows = stratified(_WHERE, labels, TEST_SHARE)
        train, test = ((images[part], labels[part]) for part in rows)
    else:
        train, test = pairs["x_train"], pairs["x_test"]
        if train[0].shape[1:] != test[0].shape[1:]:
            shapes = tuple(train[0].shape[1:]), tuple(test[0].shape[1:])
            raise RequestError(f"{_WHERE}: images (C, H, W) are {shapes[0]}, test {shapes[1]}")
    names = arrays.get("classes")
    count = min(int(train[1].max()) + 1, len(train[1]) + 1)  # a huge label is refused later
    classes = [*range(count)] if names is None else names
    return RawSet(train=train, test=test, classes=tuple(str(name) for name in classes))


def _pair(name: str, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    if isinstance(images, Dataset):
        images, labels = _read(name, images)
    checked = images_from(_WHERE, name, _array(images))
    return checked, labels_from(_WHERE, f"the labels of {name}", _array(labels), len(checked))


def _array(values: Any) -> NDArray[Any]:
    found: NDArray[Any] = np.asarray(
        values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    )
    return found


def _read(name: str, data: Dataset[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """All items of a data set: arrays of images and of labels."""
    if not hasattr(data, "__len__"):
        raise RequestError(f"{_WHERE}: {name} has no length: a data set to be stored is needed")
    items: list[tuple[NDArray[Any], Any]] = []
    for number in range(len(data)):
        item = data[number]
        if not isinstance(item, Sequence) or len(item) != 2:
            raise RequestError(f"{_WHERE}: item {number} of {name} is no pair (image, label)")
        image = _array(item[0])
        if not items:
            size = math.prod(image.shape) * len(data)
            check_size(f"{_WHERE}: {name}", pixel_bytes(size, image.itemsize))
        elif image.shape != items[0][0].shape:
            shapes = items[0][0].shape, image.shape
            raise RequestError(f"{_WHERE}: {name} has images of {shapes[0]} and of {shapes[1]}")
        items.append((image, item[1]))
    if not items:
        raise RequestError(f"{_WHERE}: {name} is empty")
    labels = torch.as_tensor([int(label) for _, label in items])
    return np.stack([image for image, _ in items]), labels.numpy()
