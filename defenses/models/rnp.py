"""The defense ``rnp``."""

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
from ..base import DefenderView
from ..common.channels import channels, forward_with
from ..common.held_out import few_images_caution
from ..common.mask_pruning import MaskOptions, MaskPruning
from ..common.sgd import backward_step, mini_batches_for_steps


@final
class RnpOptions(MaskOptions):
    """The official code's (``main.py``); the threshold is BackdoorBench's."""

    steps: int = Field(
        4, ge=1, description="mini-batches in an epoch (the official 500 images are 4)"
    )
    unlearning_lr: float = Field(0.01, gt=0, description="SGD's learning rate while unlearning")
    unlearning_epochs: int = Field(21, ge=1, description="largest number of unlearning epochs")
    drops: tuple[int, ...] = Field(
        (10, 20), description="epochs of unlearning after which its learning rate is divided by 10"
    )
    floor: float = Field(
        0.2, ge=0, lt=1, description="accuracy over an epoch at which unlearning stops"
    )
    recovering_lr: float = Field(0.2, gt=0, description="SGD's learning rate for the masks")
    recovering_epochs: int = Field(20, ge=1, description="epochs of recovery")
    alpha: float = Field(0.2, gt=0, description="weight of the loss in recovery")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay while unlearning")
    threshold: float = Field(0.7, ge=0, le=1, description="largest mask of a pruned channel")


@final
class Rnp(MaskPruning):
    """RNP: unlearn clean images, then prune the channels that their recovery does not use (Li, Lyu,
    Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023).

    In words: maximise the victim's loss on clean images until its accuracy on them is low, which
    does not change the backdoor's channels. Learn a mask over the channels that recovers the clean
    predictions. Prune the channels with a low mask in the victim: they belong to the backdoor.

    Needs held-out images (500 in the paper). The paper masks filters; the official code masks the
    scales of the batch norms after them. Without a norm the mask is on the filter itself. Instance,
    group and layer norm undo a factor on the filter, so the mask is undefined: the defense is not
    applicable there.

    The official code tries thresholds from 0 to 0.9 in steps of 0.05 and prints ACC and ASR of
    each, and names none; 0.7 is BackdoorBench's, which otherwise chooses by looking at ASR. In the
    official log 0.7 costs 12 points of accuracy, and 0.4 costs 3. The official code clips the
    gradient before it is computed, which has no effect: here it is not clipped either.

    Deviations: hidden linear layers have masks too (the official networks have no such layers). An
    epoch is a number of mini-batches, for any number of images. If the accuracy is not low after
    the last epoch, recovery starts all the same (the official code stops with an error). Images are
    augmented by the set's recipe.
    """

    name = "rnp"
    Options = RnpOptions
    options: RnpOptions
    quick: ClassVar[Mapping[str, Any]] = {"batch": 64}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple(
        {"threshold": value} for value in (0.0, 0.15, 0.3, 0.4, 0.55, 0.7)
    )

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "unlearns and recovers on")

    def masks(self, view: DefenderView) -> dict[str, Tensor]:
        options, generator, recipe = self.options, view.generator(self.name), view.distilled.recipe
        unlearned = unlearn_clean(view.trainable_victim(), view.holdout, recipe, options, generator)
        return recover(unlearned, view.holdout, recipe, options, generator)


def unlearn_clean(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: RnpOptions,
    generator: torch.Generator,
) -> nn.Module:
    """Maximise the loss of ``network`` on ``clean``, in place, until its accuracy is low.

    The accuracy is that on the mini-batches of an epoch, each before its step, in training mode.
    """
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=options.unlearning_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    fall = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones=list(options.drops))
    network.train()
    batches = _augmented_batches(clean, recipe, options, options.unlearning_epochs, generator)
    for _ in range(options.unlearning_epochs):
        right, seen = 0, 0
        for images, labels in islice(batches, options.steps):
            logits = network(images)
            backward_step(optimiser, -functional.cross_entropy(logits, labels))
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
    """The masks ``(count,)`` in [0, 1] by layer that recover the predictions on ``clean``."""
    network.train().requires_grad_(False)
    masks = {
        layer.layer: torch.ones(layer.count, device=clean.labels.device).requires_grad_()
        for layer in channels(network)
    }
    optimiser = torch.optim.SGD(
        list(masks.values()), lr=options.recovering_lr, momentum=options.momentum
    )
    batches = _augmented_batches(clean, recipe, options, options.recovering_epochs, generator)
    for images, labels in batches:
        logits = forward_with(network, images, masks)
        backward_step(optimiser, options.alpha * functional.cross_entropy(logits, labels))
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def _augmented_batches(
    clean: Batch, recipe: Recipe, options: RnpOptions, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented mini-batches of ``epochs`` epochs, and their labels."""
    augment = augmenter(recipe, generator)
    for rows in mini_batches_for_steps(
        len(clean), options.batch, options.steps * epochs, generator
    ):
        yield augment(clean.images[rows]), clean.labels[rows]
