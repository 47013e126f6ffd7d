"""The synthetic images, and what is learned beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from ..preprocessing import Preprocessing
from ..types import Batch, Distillate, Recipe


@final
class SyntheticSet:
    """The synthetic images with their labels, and what is learned beside them.

    The images are a leaf in normalised space, for which the published learning rates are made;
    ``pixels``, ``batch`` and ``write`` are in pixel space. ``learned`` are the other leaves by
    name, from which ``recipe`` makes how networks train on the set. Until ``place`` there are no
    images.
    """

    leaf: Tensor
    labels: Tensor

    def __init__(
        self,
        space: Preprocessing,
        learned: Mapping[str, Tensor],
        recipe: Callable[[Mapping[str, Tensor]], Recipe],
    ) -> None:
        self.learned = {
            name: value.detach().clone().requires_grad_() for name, value in learned.items()
        }
        self.has_images = False
        self._rows_of: dict[int, Tensor] = {}
        self._space, self._recipe = space, recipe

    def place(self, images: Tensor, labels: Tensor) -> None:
        """Start from ``images`` ``(N, C, H, W)`` in normalised space."""
        self.leaf, self.labels = images.requires_grad_(), labels
        self.has_images = True

    @property
    def recipe(self) -> Recipe:
        """How networks train on the current set."""
        return self._recipe(self.learned)

    def pixels(self) -> Tensor:
        """The images in pixel space, attached to the leaf."""
        return self._space.pixels(self.leaf)

    def batch(self) -> Batch:
        """The current images in pixel space, detached, with their labels."""
        return Batch(images=self.pixels().detach(), labels=self.labels)

    def distillate(self) -> Distillate:
        """The current set with its recipe."""
        return Distillate(batch=self.batch(), recipe=self.recipe)

    def write(self, images: Tensor) -> None:
        """Write pixel-space ``images`` into the leaf; the optimiser's state stays."""
        with torch.no_grad():
            self.leaf.copy_(self._space.normalise(images))

    def values(self) -> dict[str, Tensor]:
        """All that is optimised, by what a message calls it."""
        return {"an image": self.leaf, **self.learned}

    def rows_of(self, label: int) -> Tensor:
        """``int64 (n,)``: the rows of class ``label``, found once in a run."""
        if label not in self._rows_of:
            self._rows_of[label] = torch.nonzero(self.labels == label)[:, 0]
        return self._rows_of[label]
