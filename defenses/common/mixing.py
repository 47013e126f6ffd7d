"""Training on mixed and cut images, for cutmix and strong augmentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import DefenderView
from .sgd import TrainStep, train_by_recipe


def trained_with(step: TrainStep, view: DefenderView, name: str) -> nn.Module:
    """A fresh network, trained by the set's recipe with another ``step``.

    name: the defense's, for its random streams.
    """
    recipe, network = view.distilled.recipe.by_epochs(), view.network(view.seed(name, "weights"))
    generator = view.generator(name, "training")
    trained = train_by_recipe(network, view.distilled.batch, recipe, generator, step)
    return trained.requires_grad_(False)


def mixed_loss(logits: Tensor, labels: Tensor, order: Tensor, own_share: float) -> Tensor:
    """Cross-entropy, with weight ``own_share`` on an image's own label and the rest on the label of
    the image mixed in, which ``order`` (N,) names."""
    own = functional.cross_entropy(logits, labels)
    return own_share * own + (1 - own_share) * functional.cross_entropy(logits, labels[order])


def beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(``alpha``, ``alpha``)."""
    draws = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    return float(draws[0] / draws.sum())


def rectangle(images: Tensor, outside: float, generator: torch.Generator) -> Tensor:
    """CutMix's rectangle at a random place, ``bool (1, 1, H, W)``.

    Its area is 1 − ``outside``, less what is cut off at the border.
    """
    height, width = images.shape[-2:]
    middle = [int(torch.randint(length, (), generator=generator)) for length in (height, width)]
    rows, columns = map(span, (height, width), middle, (math.sqrt(1 - outside),) * 2)
    inside = torch.zeros(1, 1, height, width, dtype=torch.bool)
    inside[:, :, rows, columns] = True
    return inside.to(images.device)


def span(length: int, middle: int, share: float) -> slice:
    """An interval of ``share`` of the ``length`` around ``middle``, cut off at the ends."""
    half = int(length * share) // 2
    return slice(max(0, middle - half), min(length, middle + half))
