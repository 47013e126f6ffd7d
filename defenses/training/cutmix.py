"""The defense ``cutmix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..base import DefenderView, DefenseOptions, Trainer
from ..common.mixing import beta, mixed_loss, rectangle, trained_with
from ..common.sgd import backward_step


@final
class CutMixOptions(DefenseOptions):
    """The paper's for CIFAR-10."""

    alpha: float = Field(1.0, gt=0, description="parameters of the Beta distribution of shares")
    probability: float = Field(0.5, gt=0, le=1, description="share of mini-batches that are mixed")


@final
class CutMix(Trainer):
    """CutMix: training on images with a rectangle from another image (Borgnia et al., "Strong Data
    Augmentation Sanitizes Poisoning and Backdoor Attacks Without an Accuracy Tradeoff", ICASSP
    2021; CutMix: Yun et al., ICCV 2019).

    In words: train by the set's recipe on images in which a rectangle comes from another image, and
    mix the labels by area.

    Needs only the set. Pasted rectangles carry triggers about as often as they break them.

    As in both codes, half of the mini-batches are mixed, with one rectangle for all images of a
    mini-batch, after the usual augmentation.

    Deviations: the recipe is the set's; the codes train 40 epochs (Borgnia et al.) or 300 (Yun et
    al.) from a learning rate of 0.1 or 0.25.
    """

    name = "cutmix"
    Options = CutMixOptions
    options: CutMixOptions
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"probability": 0.25},
        {},
        {"probability": 0.75},
        {"probability": 1.0},
    )

    def train(self, view: DefenderView) -> nn.Module:
        generator = view.generator(self.name, "mixing")

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            if float(torch.rand((), generator=generator)) >= self.options.probability:
                backward_step(optimiser, functional.cross_entropy(network(images), labels))
                return
            order = torch.randperm(len(images), generator=generator).to(images.device)
            pasted = rectangle(images, beta(self.options.alpha, generator), generator)
            mixed = torch.where(pasted, images[order], images)
            own_share = 1 - float(pasted.double().mean())
            backward_step(optimiser, mixed_loss(network(mixed), labels, order, own_share))

        return trained_with(step, view, self.name)
