"""The few values that cross every module boundary: batches, recipes, distilled sets, errors.

Image tensors are ``float32``, ``(N, C, H, W)``, in pixel space [0, 1], on the run's device.
Labels are ``int64 (N,)`` or, where a set carries soft labels, ``float32 (N, classes)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .preprocessing import Preprocessing, digest

if TYPE_CHECKING:
    from .trained import NetworkFunction

_LONGEST_MESSAGE = 2000

LARGEST_WIDTH = 4096
"""The most channels or units of a layer; published networks have up to 4096."""
LARGEST_DEPTH = 100
"""The most blocks of a network."""


class DistillsecError(Exception):
    """Base of the errors that the suite raises on purpose; the message is one clear line."""

    def __str__(self) -> str:
        """One line of at most 2,000 characters: files and options may hold more."""
        line = " ".join(super().__str__().splitlines())
        half = _LONGEST_MESSAGE // 2 - 2
        return line if len(line) <= _LONGEST_MESSAGE else f"{line[:half]} … {line[-half:]}"


class RequestError(DistillsecError):
    """The request is impossible or malformed (exit code 2)."""


class RunError(DistillsecError):
    """A valid request failed while it ran (exit code 1)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some images with their labels.

    images: ``float32 (N, C, H, W)``, pixel space [0, 1] (a distilled set may leave it).
    labels: ``int64 (N,)`` or ``float32 (N, classes)``.
    index: ``int64 (N,)``, the rows of the training set the images come from; ``None`` for images
    that come from no row (a synthetic set).
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
class Step:
    """One step of gradient descent: the set's ``rows`` that it sees, and its learning ``rate``."""

    rows: tuple[int, ...]
    rate: float


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How a network is trained on a distilled set; stored in the set's file.

    preprocessing: what the network does with pixels first.
    epochs, lr, momentum, weight_decay, batch_size: SGD; the rate falls to a tenth at half of the
    epochs. augment: siamese-augmentation operations joined by ``_`` (``color_crop_cutout``), each
    image with its own parameters while training; empty for none.
    steps: where there are any, training is these steps of plain gradient descent instead.
    initial: ``float32 (P,)``, the weights that training starts from, laid end to end; a network
    with another number of weights starts from its own.
    network: what the set was distilled with: the fields of a ``NetworkSpec`` that are not ``None``;
    ``None`` where it is not known.
    """

    preprocessing: Preprocessing
    epochs: int = 300
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: str = ""
    steps: tuple[Step, ...] = ()
    initial: Tensor | None = None
    network: Mapping[str, str | int] | None = None

    def to(self, device: torch.device | str) -> Recipe:
        """The same with its tensors on ``device``."""
        initial = None if self.initial is None else self.initial.to(device)
        return dataclasses.replace(
            self, preprocessing=self.preprocessing.to(device), initial=initial
        )

    def by_epochs(self, **changes: Any) -> Recipe:
        """The same with some fields changed, and training by epochs in place of learned steps."""
        return dataclasses.replace(self, **changes, steps=(), initial=None)

    def describe(self) -> dict[str, Any]:
        """The recipe as values that JSON can hold; tensors by their digest."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["preprocessing"]
        if self.network is None:  # as in sets from before there was this field
            del values["network"]
        values["steps"] = [{"rows": list(step.rows), "rate": step.rate} for step in self.steps]
        values["initial"] = None if self.initial is None else digest(self.initial)
        return self.preprocessing.describe() | values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(repr(self.describe()))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Distillate:
    """The result of a distillation so far: synthetic images, and how networks train on them."""

    batch: Batch
    recipe: Recipe


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DistilledSet(Dataset[tuple[Tensor, Tensor]]):
    """A distilled data set with all that is needed to train on it; a torch ``Dataset``.

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
        return dataclasses.replace(self, batch=self.batch.to(device), recipe=self.recipe.to(device))

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Image ``number`` ``(C, H, W)`` in pixel space, and its label: a class number, or
        ``(classes,)`` probabilities."""
        return self.batch.images[number], self.batch.labels[number]

    def loader(self, **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
        """A ``DataLoader`` of pixel-space images with the recipe's batch size, shuffled.

        options: of ``DataLoader``; they win. The recipe's normalisation and augmentation are not in
        it: ``train`` has all of the recipe.
        """
        known = {"batch_size": self.recipe.batch_size}
        if not {"sampler", "batch_sampler"} & options.keys():
            known["shuffle"] = True
        if "batch_sampler" in options:
            del known["batch_size"]
        return DataLoader(self, **{**known, **options})

    def train(
        self,
        network: nn.Module | NetworkFunction,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """A network trained on this set by its recipe: pixel-space images to logits, in evaluation
        mode.

        network: takes normalised images ``(N, C, H, W)`` and returns logits; a module, which is
        trained in place, or a class or function that makes one from ``image_shape`` and
        ``classes``, such as ``distillsec.network("convnet", width=32)``. seed: of the weights of a
        network that is made here, of the order of the images and of the augmentation; the numbers
        are those of victim 0 of a run with this seed.
        Errors: ``RequestError`` for what is no network, ``RunError`` where training diverges.
        """
        from .trained import train_by_recipe  # which needs this module

        return train_by_recipe(self, network, seed, device)


def hard_labels(labels: Tensor) -> Tensor:
    """``int64 (N,)`` class numbers from hard or soft labels."""
    return labels if labels.ndim == 1 else labels.argmax(dim=1)
