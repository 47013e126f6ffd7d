"""The few values that cross every module boundary: batches, recipes, distilled sets, errors.

Image tensors are ``float32``, ``(N, C, H, W)``, in pixel space [0, 1], on the run's device.
Labels are ``int64 (N,)`` or, where a set carries soft labels, ``float32 (N, classes)``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


class DistillsecError(Exception):
    """Base of the errors that the suite raises on purpose; the message is one clear line."""


class RequestError(DistillsecError):
    """What was asked for is impossible or malformed (exit code 2)."""


class RunError(DistillsecError):
    """A run that was rightly asked for has failed (exit code 1)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some images with their labels.

    images: ``float32 (N, C, H, W)``, pixel space [0, 1] (a distilled set may leave it).
    labels: ``int64 (N,)`` or ``float32 (N, classes)``.
    index: ``int64 (N,)``, the rows of the training set the images come from; ``None`` for images
    that are nobody's rows (a synthetic set).
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def replace(self, **changes: Tensor) -> Batch:
        """A copy of this batch with some fields changed."""
        return dataclasses.replace(self, **changes)

    def rows(self, index: Tensor) -> Batch:
        """The rows at positions ``index`` (int64 or bool mask), as a new batch."""
        kept = None if self.index is None else self.index[index]
        return Batch(images=self.images[index], labels=self.labels[index], index=kept)

    def to(self, device: torch.device | str) -> Batch:
        """This batch on ``device``."""
        return Batch(
            images=self.images.to(device),
            labels=self.labels.to(device),
            index=None if self.index is None else self.index.to(device),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained on a distilled set; it travels in the set's file.

    mean, std: per-channel normalisation, pixel units.
    epochs, lr, momentum, weight_decay, batch_size: SGD; the rate falls to a tenth at half of the
    epochs. augment: siamese-augmentation operations joined by ``_`` (``color_crop_cutout``), each
    image with its own parameters while training; empty for none.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int = 300
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: str = ""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DistilledSet:
    """A distilled data set and all that is needed to train on it.

    batch: the synthetic images (pixel space, possibly outside [0, 1]) and their labels.
    classes: the class names, in label order. recipe: how victims train on it.
    """

    batch: Batch
    classes: tuple[str, ...]
    recipe: Recipe

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.batch.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> DistilledSet:
        """This set on ``device``."""
        return dataclasses.replace(self, batch=self.batch.to(device))


def hard_labels(labels: Tensor) -> Tensor:
    """``int64 (N,)`` class numbers from hard or soft labels."""
    return labels if labels.ndim == 1 else labels.argmax(dim=1)
