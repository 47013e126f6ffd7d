"""RNP: unlearn clean images, then see which channels recovery does without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.training import augmenter
from ...distill.types import Batch, Recipe
from ..base import DefenderView, DefenseOptions, Repairer
from ..common.channels import batch_norm_needed, below, channels, forward_with, silence
from ..common.held_out import images_needed, images_wanted
from ..common.tuning import drawn, follow


@final
class RnpOptions(DefenseOptions):
    """The official code's (``main.py``); the threshold is BackdoorBench's."""

    steps: int = Field(
        4, ge=1, description="mini-batches in an epoch (the official 500 images are 4)"
    )
    unlearning_lr: float = Field(0.01, gt=0, description="SGD's learning rate while unlearning")
    unlearning_epochs: int = Field(21, ge=1, description="epochs of unlearning at most")
    drops: tuple[int, ...] = Field(
        (10, 20), description="epochs of unlearning after which its rate falls to a tenth"
    )
    floor: float = Field(
        0.2, ge=0, lt=1, description="accuracy during an epoch at which it has unlearned"
    )
    recovering_lr: float = Field(0.2, gt=0, description="SGD's learning rate for the masks")
    recovering_epochs: int = Field(20, ge=1, description="epochs of recovery")
    alpha: float = Field(0.2, gt=0, description="weight of the loss in recovery")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay while unlearning")
    threshold: float = Field(0.7, ge=0, le=1, description="channels with a mask up to it go")


@final
class Rnp(Repairer):
    """RNP (Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor
    Defense", ICML 2023).

    In words: train the victim up its loss on clean images until it knows nothing of them, which
    leaves the backdoor's channels alone; learn a mask over the channels that brings the clean
    answers back; prune, in the victim, the channels whose mask is low: they serve the backdoor.

    Needs held-out images (500 in the paper). The paper masks filters; the official code masks the
    scales of the batch norms behind them. Without a norm the mask is on the filter itself. A norm
    that undoes a factor on the filter (instance, group, layer norm) leaves the mask undefined: the
    defense does not apply there.

    The official code tries thresholds from 0 to 0.9 in steps of 0.05 and prints ACC and ASR of
    each, and names none; 0.7 is BackdoorBench's, which otherwise chooses by looking at ASR. In the
    official log 0.7 costs 12 points of accuracy, and 0.4 costs 3. The official code clips the
    gradient before it is computed, which changes nothing: here it is not clipped either.

    Deviations: hidden linear layers have masks too (the official networks have none); an epoch is
    a number of mini-batches, for any number of images; where the accuracy is not down after the
    last epoch, recovery begins there (the official code stops with an error); images are augmented
    as the set's recipe says.
    """

    name = "rnp"
    Options = RnpOptions
    needs = "held-out images; batch norm (or no norm at all)"
    quick: ClassVar[Mapping[str, Any]] = {"batch": 64}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple(
        {"threshold": value} for value in (0.0, 0.15, 0.3, 0.4, 0.55, 0.7)
    )

    def __init__(self, options: RnpOptions) -> None:
        self.options: RnpOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2) or batch_norm_needed(view.victim)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "it unlearns and recovers on")

    def repair(self, view: DefenderView) -> nn.Module:
        # The masks don't depend on the threshold: the tuned budget learns them once.
        options = self.options.model_dump_json(exclude={"threshold"})
        masks = view.once((self.name, options), lambda: self._masks(view))
        network = view.trainable_victim().requires_grad_(False)
        silence(network, below(masks, self.options.threshold))
        return network

    def _masks(self, view: DefenderView) -> dict[str, Tensor]:
        options, generator, recipe = self.options, view.generator(self.name), view.distilled.recipe
        empty = unlearn(view.trainable_victim(), view.holdout, recipe, options, generator)
        return recover(empty, view.holdout, recipe, options, generator)


def unlearn(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: RnpOptions,
    generator: torch.Generator,
) -> nn.Module:
    """Train ``network`` in place up its loss on ``clean`` until its accuracy is down.

    The accuracy is that of an epoch's own mini-batches, each before its step, in training mode.
    """
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=options.unlearning_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    fall = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones=list(options.drops))
    network.train()
    pieces = _pieces(clean, recipe, options, options.unlearning_epochs, generator)
    for _ in range(options.unlearning_epochs):
        right, seen = 0, 0
        for images, labels in islice(pieces, options.steps):
            logits = network(images)
            follow(optimiser, -functional.cross_entropy(logits, labels))
            right += int((logits.argmax(dim=1) == labels).sum())
            seen += len(labels)
        fall.step()
        if right <= options.floor * seen:
            break
    return network


def recover(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: RnpOptions,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The masks ``(count,)`` in [0, 1] by layer that bring the clean answers back."""
    network.train().requires_grad_(False)
    masks = {
        layer.layer: torch.ones(layer.count, device=clean.labels.device).requires_grad_()
        for layer in channels(network)
    }
    optimiser = torch.optim.SGD(
        list(masks.values()), lr=options.recovering_lr, momentum=options.momentum
    )
    for images, labels in _pieces(clean, recipe, options, options.recovering_epochs, generator):
        logits = forward_with(network, images, masks)
        follow(optimiser, options.alpha * functional.cross_entropy(logits, labels))
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def _pieces(
    clean: Batch, recipe: Recipe, options: RnpOptions, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The mini-batches of ``epochs`` epochs, augmented, and their labels."""
    augment = augmenter(recipe, generator)
    for rows in drawn(len(clean), options.batch, options.steps * epochs, generator):
        yield augment(clean.images[rows]), clean.labels[rows]
