"""Training with another step: a victim further on clean images, or a fresh network on the set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.training import augmenter, sgd, shuffled
from ..distill.types import Batch, Recipe
from .base import DefenseOptions

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]
"""One step of an optimiser on images ``(N, C, H, W)`` and their labels."""


class TuningOptions(DefenseOptions):
    """The usual settings of fine-tuning defenses (BackdoorBench's for CIFAR-10).

    Its 100 epochs of 2,500 images in mini-batches of 256 are 1,000 steps, at the rate that its
    victims were trained with.
    """

    steps: int = Field(1000, ge=1, description="mini-batches of held-out images")
    lr: float | None = Field(
        None, gt=0, description="SGD's learning rate, annealed to 0 (default: the set's recipe's)"
    )
    batch: int = Field(256, ge=2, description="images in a mini-batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay")


QUICK_TUNING: Mapping[str, Any] = {"batch": 32}


def tune(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: TuningOptions,
    generator: torch.Generator,
    step: Step | None = None,
) -> nn.Module:
    """Train ``network`` in place on ``clean``; returns it in evaluation mode, frozen.

    Images are augmented as the set's ``recipe`` says; the learning rate falls by a cosine. step:
    what is done with a mini-batch, by default a step down the cross-entropy. ``generator`` (CPU)
    gives orders and augmentation.
    """
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=options.lr or recipe.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    annealed = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=options.steps)
    augment, step = augmenter(recipe, generator), step or descend
    network.train()
    for rows in drawn(len(clean), options.batch, options.steps, generator):
        step(network, optimiser, augment(clean.images[rows]), clean.labels[rows])
        annealed.step()
    return network.eval().requires_grad_(False)


def train_by(
    network: nn.Module,
    batch: Batch,
    recipe: Recipe,
    generator: torch.Generator,
    step: Step | None = None,
) -> nn.Module:
    """Train ``network`` in place as the recipe's epochs say, but with another ``step``."""
    optimiser, augment = sgd(network, recipe), augmenter(recipe, generator)
    drop = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones=[recipe.epochs // 2 + 1])
    step, device = step or descend, batch.labels.device
    network.train()
    for _ in range(recipe.epochs):
        for rows in mini_batches(len(batch), recipe.batch_size, generator, device):
            step(network, optimiser, augment(batch.images[rows]), batch.labels[rows])
        drop.step()
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
