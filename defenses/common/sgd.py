"""SGD for defenses: steps, mini-batches, fine-tuning on clean images, training by a recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.augment import OPERATIONS, parse_strategy
from ...distill.training import augmenter, drop_at_half, sgd, shuffled
from ...distill.types import Batch, Recipe
from ..base import DefenseOptions

TrainStep = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]
"""One optimiser step on images ``(N, C, H, W)`` and their labels."""


class SgdOptions(DefenseOptions):
    """SGD on held-out images at a constant learning rate; subclasses have a schedule."""

    steps: int = Field(1000, ge=1, description="mini-batches of held-out images")
    lr: float | None = Field(
        0.01, gt=0, description="SGD's first learning rate; none: that of the set's recipe"
    )
    batch: int = Field(256, ge=2, description="images in a mini-batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    nesterov: bool = Field(False, description="whether SGD uses Nesterov momentum")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay")
    augment: Literal["crop", "recipe", "none"] = Field(
        "crop",
        description="crop: shifts by up to an eighth, and mirroring if the set's recipe mirrors; "
        "recipe: the augmentation of the set's recipe",
    )

    def rates(self, recipe: Recipe) -> list[float]:
        """The learning rate of each step."""
        return [self.lr or recipe.lr] * self.steps


class FineTuningOptions(SgdOptions):
    """BackdoorBench's fine-tuning of CIFAR-10 victims (config/defense/ft/cifar10.yaml).

    100 epochs of 2,500 images (5 % of the training set) in mini-batches of 256 have 10 mini-batches
    each, 1,000 steps in all. The learning rate falls along a cosine over the 100 epochs, and
    changes between epochs only.
    """

    hold: int = Field(10, ge=1, description="steps at one rate (an epoch of the published code)")
    halves: int = Field(1, ge=1, description="half periods of the cosine: down, up, down …")

    def rates(self, recipe: Recipe) -> list[float]:
        return cosine(self.lr or recipe.lr, self.steps, self.hold, self.halves)


QUICK_FINE_TUNING: Mapping[str, Any] = {"batch": 32}


def cosine(rate: float, steps: int, hold: int, halves: int) -> list[float]:
    """``steps`` learning rates from ``rate`` along ``halves`` half periods of a cosine with minimum
    0, each rate held for ``hold`` steps."""
    turn = math.pi * halves / steps
    return [rate * (1 + math.cos(turn * (number - number % hold))) / 2 for number in range(steps)]


def fine_tune(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: SgdOptions,
    generator: torch.Generator,
    step: TrainStep | None = None,
) -> nn.Module:
    """Train ``network`` in place on ``clean``; returns it in evaluation mode, frozen.

    step: applied to each mini-batch, by default a step on the cross-entropy. ``generator`` (CPU)
    draws orders and augmentation.
    """
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=options.lr or recipe.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
    )
    augment, step = augmentation(options.augment, recipe, generator), step or cross_entropy_step
    network.train()
    batches = mini_batches_for_steps(len(clean), options.batch, options.steps, generator)
    for rate, rows in zip(options.rates(recipe), batches, strict=True):
        set_rate(optimiser, rate)
        step(network, optimiser, augment(clean.images[rows]), clean.labels[rows])
    return network.eval().requires_grad_(False)


def augmentation(
    kind: Literal["crop", "recipe", "none"], recipe: Recipe, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The augmentation of a mini-batch ``(N, C, H, W)`` in fine-tuning, drawn for each image.

    crop: as in the published codes, pad with black by an eighth of the sides (4 of 32 pixels) and
    cut out a window of the image's size; mirror half of the images if the set's recipe mirrors
    (the codes mirror CIFAR-10, but neither digits nor traffic signs).
    """
    if kind == "recipe":
        return augmenter(recipe, generator)
    mirrored = "flip" in parse_strategy(recipe.augment)
    names = {"crop": ["crop", "flip"] if mirrored else ["crop"], "none": []}[kind]

    def augment(images: Tensor) -> Tensor:
        for operation in (OPERATIONS[name] for name in names):
            drawn = operation.draw(len(images), (images.shape[2], images.shape[3]), generator)
            images = operation.apply(images, drawn)
        return images

    return augment


def train_by_recipe(
    network: nn.Module,
    batch: Batch,
    recipe: Recipe,
    generator: torch.Generator,
    step: TrainStep | None = None,
) -> nn.Module:
    """Train ``network`` in place for the recipe's epochs, but with another ``step``."""
    optimiser, augment = sgd(network, recipe), augmenter(recipe, generator)
    schedule = drop_at_half(optimiser, recipe.epochs)
    step, device = step or cross_entropy_step, batch.labels.device
    network.train()
    for _ in range(recipe.epochs):
        for rows in mini_batches(len(batch), recipe.batch_size, generator, device):
            step(network, optimiser, augment(batch.images[rows]), batch.labels[rows])
        schedule.step()
    return network.eval()


def cross_entropy_step(
    network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """One step on the cross-entropy."""
    backward_step(optimiser, functional.cross_entropy(network(images), labels))


def backward_step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """Back-propagate ``loss`` and take one step of ``optimiser``."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def mini_batches(
    count: int, size: int, generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """One epoch: row numbers 0 to ``count`` − 1 in random order, in mini-batches of ``size``.

    A last mini-batch of a single row is left out: batch norm cannot normalise it.
    """
    batches = list(shuffled(count, size, generator, device))
    return [rows for rows in batches if len(rows) > 1 or len(batches) == 1]


def mini_batches_for_steps(
    count: int, size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """``steps`` mini-batches of row numbers below ``count``, epoch after epoch."""
    endless = (
        rows
        for _ in itertools.count()
        for rows in mini_batches(count, size, generator, torch.device("cpu"))
    )
    return itertools.islice(endless, steps)
