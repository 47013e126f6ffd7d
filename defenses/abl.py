"""ABL: poisoned rows are learned first; find those and unlearn them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.training import augmenter, in_pieces, sgd
from ..distill.types import Batch
from .base import DefenderView, DefenseOptions, Trainer
from .tuning import drawn, follow, train_by


@final
class AblOptions(DefenseOptions):
    """The paper's; its 20 and 60 epochs of a hundred are shares of the recipe's."""

    gamma: float = Field(0.5, ge=0, description="loss below which a mini-batch is climbed")
    isolation: float = Field(0.01, gt=0, lt=1, description="share of rows isolated")
    tuning: float = Field(0.2, gt=0, description="epochs before isolation / the recipe's")
    finetuning: float = Field(0.6, gt=0, description="epochs on the other rows / the recipe's")
    unlearning_steps: int = Field(80, ge=1, description="steps of unlearning")
    unlearning_rate: float = Field(0.2, gt=0, description="its learning rate / the recipe's")


@final
class Abl(Trainer):
    """ABL, anti-backdoor learning (Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training
    Clean Models on Poisoned Data", NeurIPS 2021).

    In words: train with a loss that is climbed wherever it is below 0.5 (local gradient ascent), so
    that only what is learned fast gets below; isolate the hundredth of the rows with the lowest
    loss; train on the others; then go on down their loss and up that of the isolated ones.

    Needs rows that are themselves poisoned, and many: a hundredth of a hundred rows is one.

    Deviations: the loss is local gradient ascent as in the paper (its code's default is flooding);
    learning rate, batch and augmentation are the set's recipe's. Unlearning is the paper's sum of
    both losses (the code climbs on the isolated rows alone, whose batch statistics then replace the
    network's), up to where they are answered no better than by a guess, at a fifth of the recipe's
    rate (the code's 5e-4 moves nothing in a few steps).
    """

    name = "abl"
    Options = AblOptions
    needs = "many rows, some of them poisoned"

    def __init__(self, options: AblOptions) -> None:
        self.options: AblOptions = options

    def caution(self, view: DefenderView) -> str | None:
        count = isolated_count(view, self.options.isolation)
        return None if count >= 10 else f"isolates {count} of {len(view.labels)} rows"

    def train(self, view: DefenderView) -> nn.Module:
        options, recipe = self.options, view.distilled.recipe.by_epochs()
        batch, generator = view.distilled.batch, view.generator(self.name)
        network = view.network(view.seed(self.name, "weights"))

        def epochs(share: float) -> int:
            return max(1, round(share * recipe.epochs))

        def reluctantly(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            loss = functional.cross_entropy(network(images), labels)
            follow(optimiser, local_ascent(loss, options.gamma))

        first = replace(recipe, epochs=epochs(options.tuning))
        train_by(network, batch, first, generator, reluctantly)
        rows = fastest_rows(network, batch, isolated_count(view, options.isolation))
        others = torch.ones(len(batch), dtype=torch.bool, device=rows.device)
        others[rows] = False
        rest, isolated = batch.rows(torch.nonzero(others)[:, 0]), batch.rows(rows)
        train_by(network, rest, replace(recipe, epochs=epochs(options.finetuning)), generator)
        slower = replace(recipe, lr=options.unlearning_rate * recipe.lr)
        optimiser, augment = sgd(network, slower), augmenter(recipe, generator)
        network.train()
        for piece in drawn(len(rest), recipe.batch_size, options.unlearning_steps, generator):
            images = torch.cat([rest.images[piece], isolated.images])
            logits = network(augment(images))
            kept = functional.cross_entropy(logits[: len(piece)], rest.labels[piece])
            lost = functional.cross_entropy(logits[len(piece) :], isolated.labels, reduction="none")
            follow(optimiser, kept - lost.clamp(max=math.log(view.classes)).mean())
        return network.eval().requires_grad_(False)


def isolated_count(view: DefenderView, share: float) -> int:
    """How many rows ``share`` of the set is, at least one."""
    return max(1, int(share * len(view.labels)))


def local_ascent(loss: Tensor, gamma: float) -> Tensor:
    """The loss, its sign turned where it is below ``gamma``."""
    return torch.sign(loss - gamma) * loss


def fastest_rows(network: nn.Module, batch: Batch, count: int) -> Tensor:
    """The ``count`` rows with the lowest loss."""
    logits = in_pieces(network.eval(), batch.images)
    losses = functional.cross_entropy(logits, batch.labels, reduction="none")
    return losses.argsort()[:count]
