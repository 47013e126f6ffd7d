"""One student: the steps that it trains, where it begins, and how it is tested."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ..distill import weights as flat
from ..distill.augment import Augmentation, parse_strategy
from ..distill.backends.unroll import GradientName, StudentStep, unroll
from ..distill.batch_norm import batch_norm_layers
from ..distill.engine import PLAIN, Engine
from ..distill.types import Batch, Recipe
from .student_options import StudentOptions


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StudentPlan:
    """A student's steps of plain SGD, and the rate of each ``(steps,)``.

    The first ``warmup`` steps carry no gradient; the others are differentiated through.
    """

    steps: list[StudentStep]
    rates: Tensor
    warmup: int

    @classmethod
    def draw(
        cls,
        images: Tensor,
        recipe: Recipe,
        options: StudentOptions,
        rng: torch.Generator,
        least: int = 0,
    ) -> StudentPlan:
        """A student of ``images`` (N, C, H, W) that trains as the recipe's victims do.

        Where the recipe has steps (``dd``), it takes these, up to a random one. Otherwise each step
        is on random rows with the recipe's augmentation, after a random number of warm-up steps, at
        least ``least``.
        """
        if recipe.steps:
            return cls._of_recipe(recipe, options, rng, images.device)
        count = len(images)
        batch = min(options.unroll_batch or recipe.batch_size, count)
        views = Augmentation(parse_strategy(recipe.augment), recipe.preprocessing)
        warmup = least + int(torch.randint(options.unroll_warmup - least + 1, (), generator=rng))
        steps = []
        for _ in range(warmup + options.unroll_steps):
            rows = torch.randperm(count, generator=rng)[:batch].to(images.device)
            shape = (batch, *images.shape[1:])
            transform = views.draw(shape, rng, shared=False) if views.strategy else None
            steps.append(StudentStep(rows=rows, transform=transform))
        rate = options.unroll_lr or recipe.lr / (1 - recipe.momentum)
        return cls(
            steps=steps, rates=torch.full((len(steps),), rate, device=images.device), warmup=warmup
        )

    @classmethod
    def _of_recipe(
        cls, recipe: Recipe, options: StudentOptions, rng: torch.Generator, device: torch.device
    ) -> StudentPlan:
        unrolled = min(options.unroll_steps, len(recipe.steps))
        warmup = int(torch.randint(len(recipe.steps) - unrolled + 1, (), generator=rng))
        chosen = recipe.steps[: warmup + unrolled]
        return cls(
            steps=[StudentStep(rows=torch.tensor(step.rows, device=device)) for step in chosen],
            rates=torch.tensor([step.rate for step in chosen], device=device),
            warmup=warmup,
        )

    @torch.no_grad()
    def warmed(
        self, network: nn.Module, start: Tensor, synthetic: Batch, engine: Engine = PLAIN
    ) -> Tensor:
        """The weights ``(P,)`` after the warm-up from ``start``, detached."""
        steps, rates = self.steps[: self.warmup], self.rates[: self.warmup]
        return unroll(network, start, synthetic, steps, rates, "recompute", engine)

    def trained(
        self,
        network: nn.Module,
        start: Tensor,
        synthetic: Batch,
        gradient: GradientName,
        engine: Engine = PLAIN,
    ) -> Tensor:
        """The weights ``(P,)`` after the unrolled steps from ``start``, attached to the images."""
        steps, rates = self.steps[self.warmup :], self.rates[self.warmup :]
        return unroll(network, start, synthetic, steps, rates, gradient, engine)


def first_weights(network: nn.Module, recipe: Recipe) -> Tensor:
    """Where victims of the recipe begin: its initial weights, where ``network`` has as many."""
    own = flat.laid_out(network)
    given = recipe.initial
    return own if given is None or given.shape != own.shape else given.to(own.device)


@torch.no_grad()
def as_tested(network: nn.Module, weights: Tensor, images: Tensor) -> nn.Module:
    """``network`` as it is tested after its training on ``images`` has led to ``weights`` ``(P,)``.

    Batch norm then keeps the statistics of ``images`` at these weights; those of victims, running
    means over their training, come close to them. A network without it is returned as it is.
    """
    if not batch_norm_layers(network):
        return network
    tested = copy.deepcopy(network)  # the backward pass still trains the other one
    for layer in batch_norm_layers(tested):
        layer.momentum = 1.0  # type: ignore[assignment]
    flat.logits(tested, weights, images)
    return tested.eval()
