"""Training with another step: a victim further on clean images, or a fresh network on the set."""

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

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]
"""One step of an optimiser on images ``(N, C, H, W)`` and their labels."""


class SgdOptions(DefenseOptions):
    """SGD on held-out images at a constant rate; the classes below change the rate."""

    steps: int = Field(1000, ge=1, description="mini-batches of held-out images")
    lr: float | None = Field(
        0.01, gt=0, description="SGD's first learning rate; none: the set's recipe's"
    )
    batch: int = Field(256, ge=2, description="images in a mini-batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    nesterov: bool = Field(False, description="whether the momentum is Nesterov's")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay")
    augment: Literal["crop", "recipe", "none"] = Field(
        "crop",
        description="crop: shifts by up to an eighth, mirrored too where the set's recipe mirrors; "
        "recipe: the set's recipe's augmentation",
    )

    def rates(self, recipe: Recipe) -> list[float]:
        """The learning rate of each step."""
        return [self.lr or recipe.lr] * self.steps


class TuningOptions(SgdOptions):
    """BackdoorBench's fine-tuning of CIFAR-10 victims (config/defense/ft/cifar10.yaml).

    Its 100 epochs of 2,500 images (5 % of the training set) in mini-batches of 256 are 10
    mini-batches each, 1,000 steps. The rate falls by a cosine over the 100 epochs, and changes
    between epochs only.
    """

    hold: int = Field(10, ge=1, description="steps at one rate (an epoch of the published code)")
    halves: int = Field(1, ge=1, description="half waves of the cosine: down, up, down …")

    def rates(self, recipe: Recipe) -> list[float]:
        return cosine(self.lr or recipe.lr, self.steps, self.hold, self.halves)


QUICK_TUNING: Mapping[str, Any] = {"batch": 32}


def cosine(rate: float, steps: int, hold: int, halves: int) -> list[float]:
    """``steps`` learning rates from ``rate`` along ``halves`` half waves of a cosine, the lowest
    point at 0, each rate kept for ``hold`` steps."""
    turn = math.pi * halves / steps
    return [rate * (1 + math.cos(turn * (number - number % hold))) / 2 for number in range(steps)]


def tune(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: SgdOptions,
    generator: torch.Generator,
    step: Step | None = None,
) -> nn.Module:
    """Train ``network`` in place on ``clean``; returns it in evaluation mode, frozen.

    step: what is done with a mini-batch, by default a step down the cross-entropy. ``generator``
    (CPU) gives orders and augmentation.
    """
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=options.lr or recipe.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
    )
    augment, step = augmentation(options.augment, recipe, generator), step or descend
    network.train()
    pieces = drawn(len(clean), options.batch, options.steps, generator)
    for rate, rows in zip(options.rates(recipe), pieces, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate
        step(network, optimiser, augment(clean.images[rows]), clean.labels[rows])
    return network.eval().requires_grad_(False)


def augmentation(
    kind: Literal["crop", "recipe", "none"], recipe: Recipe, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """What is done to a mini-batch ``(N, C, H, W)`` while tuning, each image by itself.

    crop: what the published codes do. Pad with black by an eighth of the sides (4 of 32 pixels) and
    cut out a window of the image's size; mirror half of the images too, where the set's recipe
    mirrors any (the codes mirror CIFAR-10, and neither digits nor traffic signs).
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


def train_by(
    network: nn.Module,
    batch: Batch,
    recipe: Recipe,
    generator: torch.Generator,
    step: Step | None = None,
) -> nn.Module:
    """Train ``network`` in place as the recipe's epochs say, but with another ``step``."""
    optimiser, augment = sgd(network, recipe), augmenter(recipe, generator)
    schedule = drop_at_half(optimiser, recipe.epochs)
    step, device = step or descend, batch.labels.device
    network.train()
    for _ in range(recipe.epochs):
        for rows in mini_batches(len(batch), recipe.batch_size, generator, device):
            step(network, optimiser, augment(batch.images[rows]), batch.labels[rows])
        schedule.step()
    return network.eval()


def descend(
    network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """A step down the cross-entropy."""
    follow(optimiser, functional.cross_entropy(network(images), labels))


def follow(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step of ``optimiser`` down ``loss``."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def mini_batches(
    count: int, size: int, generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """Row numbers 0 to ``count`` − 1 in random order, in pieces of ``size``; a last piece of one
    row alone, on which a batch norm has nothing to measure, is left out."""
    pieces = list(shuffled(count, size, generator, device))
    return [piece for piece in pieces if len(piece) > 1 or len(pieces) == 1]


def drawn(count: int, size: int, wanted: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``wanted`` mini-batches of row numbers below ``count``, pass after pass."""
    endless = (
        rows
        for _ in itertools.count()
        for rows in mini_batches(count, size, generator, torch.device("cpu"))
    )
    return itertools.islice(endless, wanted)
