"""Image sets as in-memory tensors, loaded by name."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..class_names import check_class_names
from ..notices import warn
from ..plugins import given_object, is_given
from ..preprocessing import MAX_DIMENSIONS, Preprocessing, Zca, fit_zca
from ..types import Batch, RequestError
from .datasets import DATASETS, DatasetEntry
from .raw import DataRequest

MAX_IMAGE_SIZE = 1024


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """A data set to distil from, whole and in memory.

    train, test: images ``float32 (N, C, H, W)`` in [0, 1], labels ``int64 (N,)``, index
    ``arange(N)``. classes: names in label order. mean, std: per channel, pixel units. zca: a
    whitening of the training images, used in place of mean and std; ``None`` for none.
    flips: whether a horizontal flip keeps an image's label.
    """

    name: str
    train: Batch
    test: Batch
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool
    zca: Zca | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """What networks do with pixels first."""
        if self.zca is None:
            return Preprocessing(self.mean, self.std)
        channels = self.image_shape[0]
        return Preprocessing((0.0,) * channels, (1.0,) * channels, self.zca)

    def with_preprocessing(self, preprocessing: Preprocessing) -> ImageSet:
        """This set with ``preprocessing``, on its device, as what networks do with pixels first."""
        zca = preprocessing.zca
        if zca is not None:
            return dataclasses.replace(self, zca=zca)
        return dataclasses.replace(self, mean=preprocessing.mean, std=preprocessing.std, zca=None)

    def whitened(self) -> ImageSet:
        """This set with a ZCA whitening fitted on its training images.

        Errors: ``RequestError`` for images too large for the matrix.
        """
        dimensions = math.prod(self.image_shape)
        if dimensions > MAX_DIMENSIONS:
            raise RequestError(
                f"zca: images of {self.image_shape} have {dimensions} values, at most "
                f"{MAX_DIMENSIONS} can be whitened: choose a smaller --image-size"
            )
        return dataclasses.replace(self, zca=fit_zca(self.train.images))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def describe(self) -> dict[str, Any]:
        """What a record says of the set; the fingerprint is a digest of all images and labels."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return {
            "name": self.name,
            "classes": list(self.classes),
            "train": len(self.train),
            "test": len(self.test),
            "image_shape": list(self.image_shape),
            "fingerprint": digest.hexdigest(),
        }

    def in_order(self, numbers: Sequence[int]) -> ImageSet:
        """This set with its classes in another order: class ``i`` is now ``numbers[i]``."""
        renumbered = torch.tensor(numbers).argsort().to(self.train.labels.device)
        train, test = (
            batch.replace(labels=renumbered[batch.labels]) for batch in (self.train, self.test)
        )
        classes = tuple(self.classes[number] for number in numbers)
        return dataclasses.replace(self, train=train, test=test, classes=classes)

    def to(self, device: torch.device | str) -> ImageSet:
        """This set on ``device``."""
        zca = None if self.zca is None else self.zca.to(device)
        train, test = self.train.to(device), self.test.to(device)
        return dataclasses.replace(self, train=train, test=test, zca=zca)


def dataset_entry(name: str) -> DatasetEntry:
    """The entry of ``DATASETS`` that ``name`` (``cifar10``, ``folder:/some/where``) means.

    A data set that is given as an object has the entry under its name (``objects_by_name``).
    Raises RequestError for an unknown name, and for a prefix without a path.
    """
    if is_given(name):
        given: DatasetEntry = given_object(name)
        return given
    prefix, colon, path = name.partition(":")
    entry = DATASETS.get(f"{prefix}:PATH" if colon else name)
    if entry is None:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        raise RequestError(
            f"unknown dataset {name!r}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; there are {', '.join(DATASETS)}"
        )
    if colon and not path:
        raise RequestError(f"dataset {name!r} lacks the path: expected {prefix}:PATH")
    return entry


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    download: bool = True,
    progress: bool = False,
) -> ImageSet:
    """Load a data set into memory, on the CPU.

    name: a key of ``DATASETS``, with a path for the forms that end in ``PATH``.
    data_dir: where files are looked for, downloaded to and cached; by default
    ``$DISTILLSEC_DATA``, if set, and then ``data`` in the working directory. Debian's folder for
    data sets is looked at after these.
    image_size: resize every image to this square (antialiased, bilinear); by default the
    literature's size, or that of the files. download: whether a missing set may be fetched.
    progress: show bars on stderr while downloading and decoding.

    What of the files was left out, and what was done to pixels, is written to the log.

    Raises RequestError, in one line: unknown name, impossible size, a set that is not found and
    cannot be downloaded, a corrupt or unsuitable file.
    """
    entry = dataset_entry(name)
    if image_size is not None and not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise RequestError(f"image_size {image_size}: 1 to {MAX_IMAGE_SIZE} is allowed")
    given = (
        (str(data_dir),) if data_dir is not None else (os.environ.get("DISTILLSEC_DATA"), "data")
    )
    request = DataRequest(
        name=name,
        path=name.partition(":")[2],
        roots=tuple(Path(root).expanduser() for root in given if root),
        image_size=image_size,
        download=download,
        progress=progress,
    )
    raw = entry.load(request)
    size = image_size or (entry.image_shape[1] if entry.image_shape else None)
    train, test = (
        Batch(images=pixels(images, size), labels=labels, index=torch.arange(len(labels)))
        for images, labels in (raw.train, raw.test)
    )
    mean, std = entry.mean, entry.std
    if mean is None or std is None:
        deviation, average = torch.std_mean(train.images, dim=(0, 2, 3), correction=0)
        # A constant channel has nothing to scale: 1 keeps the division harmless.
        mean, std = tuple(average.tolist()), tuple(value or 1.0 for value in deviation.tolist())
    result = ImageSet(
        name=name,
        train=train,
        test=test,
        classes=raw.classes,
        mean=mean,
        std=std,
        flips=entry.flips,
    )
    _check(result, entry)
    for note in raw.notes:
        warn(f"{name}: {note}")
    return result


def pixels(images: Tensor, size: int | None = None) -> Tensor:
    """``float32 (N, C, H, W)`` in [0, 1] from ``uint8`` or ``float32`` images.

    size: resize to this square (antialiased, bilinear, in portions); ``None`` keeps the size.
    """
    if size is None or images.shape[2:] == (size, size):
        return images.to(torch.float32) if images.is_floating_point() else images / 255
    resized = torch.empty(*images.shape[:2], size, size)
    for start in range(0, len(images), 1024):
        portion = pixels(images[start : start + 1024])
        resized[start : start + 1024] = interpolate(
            portion, size=(size, size), mode="bilinear", antialias=True, align_corners=False
        ).clamp_(0, 1)
    return resized


def _check(data: ImageSet, entry: DatasetEntry) -> None:
    """Check what ``ImageSet`` guarantees; RequestError names the set."""
    classes = len(data.classes)
    if classes < 2 or entry.classes not in (None, classes):
        raise RequestError(
            f"{data.name}: {classes} classes, expected {entry.classes or '2 or more'}"
        )
    try:
        check_class_names(data.classes)
    except RequestError as error:
        raise RequestError(f"{data.name}: {error}") from error
    if entry.image_shape and entry.image_shape[0] != data.image_shape[0]:
        raise RequestError(f"{data.name}: images are {data.image_shape}, not {entry.image_shape}")
    for split, batch in (("train", data.train), ("test", data.test)):
        if len(batch) == 0 or len(batch.labels) != len(batch):
            raise RequestError(
                f"{data.name}: {len(batch)} images and {len(batch.labels)} labels in {split}"
            )
        low, high = torch.aminmax(batch.images)
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise RequestError(f"{data.name}: {split} images hold NaN or leave [0, 1]")
        least, most = (int(label) for label in torch.aminmax(batch.labels))
        if least < 0 or most >= classes:
            raise RequestError(
                f"{data.name}: {split} labels run from {least} to {most}; "
                f"with {classes} classes 0 to {classes - 1} is allowed"
            )
    counts = torch.bincount(data.train.labels, minlength=classes)
    if counts.min() == 0:
        label = int(counts.argmin())
        raise RequestError(
            f"{data.name}: no training image has the label {label} ({data.classes[label]})"
        )
