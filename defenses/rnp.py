"""RNP: unlearn clean images, then see which channels recovery does without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.training import accuracy
from ..distill.types import Batch
from .base import DefenderView, DefenseOptions, Repairer
from .channels import by_mask, channels, forward_with, prune_in_order
from .held_out import images_needed, images_wanted
from .tuning import follow, mini_batches

_CLIP = 20.0


@final
class RnpOptions(DefenseOptions):
    """The official code's."""

    unlearning_lr: float = Field(0.01, gt=0, description="SGD's learning rate while unlearning")
    unlearning_epochs: int = Field(20, ge=1, description="epochs of unlearning at most")
    floor: float = Field(0.2, ge=0, lt=1, description="clean accuracy at which it has unlearned")
    recovering_lr: float = Field(0.2, gt=0, description="SGD's learning rate for the masks")
    recovering_epochs: int = Field(20, ge=1, description="epochs of recovery")
    alpha: float = Field(0.2, gt=0, description="weight of the loss in recovery")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay while unlearning")
    threshold: float = Field(
        0.7, ge=0, le=1, description="channels whose mask is below may be pruned"
    )
    loss: float = Field(0.05, ge=0, lt=1, description="held-out accuracy that pruning may cost")


@final
class Rnp(Repairer):
    """RNP (Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor
    Defense", ICML 2023).

    In words: train the victim up its loss on clean images until it knows nothing of them, which
    leaves the backdoor's channels alone; learn a mask over the channels that brings the clean
    answers back; prune, in the victim, the channels whose mask is low: they serve the backdoor.

    Needs held-out images. Made for batch norm, as ANP.

    Deviations: any affine norm's scales are masked, or the convolution's own weights where there is
    no norm. The benchmarks' runs choose the threshold by looking at ASR; here it is the default of
    the code.
    """

    name = "rnp"
    Options = RnpOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {"batch": 64}

    def __init__(self, options: RnpOptions) -> None:
        self.options: RnpOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "it unlearns and recovers on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, generator = self.options, view.generator(self.name)
        empty = unlearn(view.trainable_victim(), view.holdout, options, generator)
        masks = recover(empty, view.holdout, options, generator)
        network = view.trainable_victim().requires_grad_(False)
        prune_in_order(network, by_mask(masks, options.threshold), view.holdout, options.loss)
        return network


def unlearn(
    network: nn.Module, clean: Batch, options: RnpOptions, generator: torch.Generator
) -> nn.Module:
    """Train ``network`` in place up its loss on ``clean`` until its accuracy is down."""
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=options.unlearning_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    for _ in range(options.unlearning_epochs):
        network.train()
        for rows in mini_batches(len(clean), options.batch, generator, clean.labels.device):
            loss = functional.cross_entropy(network(clean.images[rows]), clean.labels[rows])
            optimiser.zero_grad()
            (-loss).backward()
            nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
            optimiser.step()
        if accuracy(network, clean) <= options.floor:
            break
    return network


def recover(
    network: nn.Module, clean: Batch, options: RnpOptions, generator: torch.Generator
) -> dict[str, Tensor]:
    """The masks ``(count,)`` in [0, 1] by layer that bring the clean answers back."""
    device = clean.labels.device
    network.train().requires_grad_(False)
    masks = {
        layer.layer: torch.ones(layer.count, device=device).requires_grad_()
        for layer in channels(network)
    }
    optimiser = torch.optim.SGD(
        list(masks.values()), lr=options.recovering_lr, momentum=options.momentum
    )
    for _ in range(options.recovering_epochs):
        for rows in mini_batches(len(clean), options.batch, generator, device):
            logits = forward_with(network, clean.images[rows], masks)
            follow(optimiser, options.alpha * functional.cross_entropy(logits, clean.labels[rows]))
            with torch.no_grad():
                for mask in masks.values():
                    mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}
