"""Training on mixed and cut images, so that no patch is always where its label is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from .base import DefenderView, DefenseOptions, Trainer
from .tuning import Step, follow, train_by


@final
class CutMixOptions(DefenseOptions):
    """The paper's for CIFAR-10."""

    alpha: float = Field(1.0, gt=0, description="parameters of the Beta distribution of shares")
    probability: float = Field(0.5, gt=0, le=1, description="share of mini-batches that are mixed")


@final
class CutMix(Trainer):
    """CutMix as a defense (Borgnia et al., "Strong Data Augmentation Sanitizes Poisoning and
    Backdoor Attacks Without an Accuracy Tradeoff", ICASSP 2021; CutMix: Yun et al., ICCV 2019).

    In words: train as the set's recipe says, on images in which a rectangle comes from another
    image and the label is mixed by area.

    Needs nothing but the set; pasted rectangles carry triggers about as well as they break them.

    Deviations: on top of the recipe's own augmentation; one rectangle for a mini-batch, as in the
    code of CutMix.
    """

    name = "cutmix"
    Options = CutMixOptions

    def __init__(self, options: CutMixOptions) -> None:
        self.options: CutMixOptions = options

    def train(self, view: DefenderView) -> nn.Module:
        generator = view.generator(self.name, "mixing")

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            if float(torch.rand((), generator=generator)) >= self.options.probability:
                follow(optimiser, functional.cross_entropy(network(images), labels))
                return
            order = torch.randperm(len(images), generator=generator).to(images.device)
            hole = rectangle(images, beta(self.options.alpha, generator), generator)
            mixed = torch.where(hole, images[order], images)
            mine = 1 - float(hole.double().mean())
            follow(optimiser, mixed_loss(network(mixed), labels, order, mine))

        return train_with(view, step, self.name)


@final
class StrongAugmentationOptions(DefenseOptions):
    """The paper's: MaxUp with four copies, mixup with a flat Beta."""

    kind: Literal["maxup-cutout", "mixup", "cutout"] = Field(
        "maxup-cutout", description="what is done to a mini-batch"
    )
    copies: int = Field(4, ge=1, description="cutouts of which MaxUp takes the worst")
    hole: float = Field(0.5, gt=0, lt=1, description="side of the cutout, share of the image's")
    alpha: float = Field(1.0, gt=0, description="parameters of mixup's Beta distribution")


@final
class StrongAugmentation(Trainer):
    """Strong augmentation as a defense (Borgnia et al., "Strong Data Augmentation Sanitizes
    Poisoning and Backdoor Attacks Without an Accuracy Tradeoff", ICASSP 2021).

    In words: train as the set's recipe says, on the worst of four cutouts of each image (MaxUp:
    Gong et al., CVPR 2021; Cutout: DeVries and Taylor, 2017), or on mixup (Zhang et al., ICLR
    2018).

    Needs nothing but the set.

    Deviations: on top of the recipe's own augmentation; the hole's mean is the set's mean pixel,
    where Cutout's code has zeros after normalisation, which is the same.
    """

    name = "strong-augmentation"
    Options = StrongAugmentationOptions
    quick: ClassVar[Mapping[str, Any]] = {"copies": 2}

    def __init__(self, options: StrongAugmentationOptions) -> None:
        self.options: StrongAugmentationOptions = options

    def train(self, view: DefenderView) -> nn.Module:
        options, generator = self.options, view.generator(self.name, "mixing")
        fill = torch.tensor(view.distilled.recipe.mean, device=view.labels.device)

        def cut(images: Tensor) -> Tensor:
            return cutout(images, options.hole, fill.view(-1, 1, 1), generator)

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            if options.kind == "mixup":
                order = torch.randperm(len(images), generator=generator).to(images.device)
                mine = beta(options.alpha, generator)
                mixed = mine * images + (1 - mine) * images[order]
                loss = mixed_loss(network(mixed), labels, order, mine)
            elif options.kind == "cutout":
                loss = functional.cross_entropy(network(cut(images)), labels)
            else:
                losses = [
                    functional.cross_entropy(network(cut(images)), labels, reduction="none")
                    for _ in range(options.copies)
                ]
                loss = torch.stack(losses).amax(dim=0).mean()
            follow(optimiser, loss)

        return train_with(view, step, self.name)


def train_with(view: DefenderView, step: Step, name: str) -> nn.Module:
    """A fresh network trained by the set's recipe with another step."""
    recipe, network = view.distilled.recipe.by_epochs(), view.network(view.seed(name, "weights"))
    trained = train_by(
        network, view.distilled.batch, recipe, view.generator(name, "training"), step
    )
    return trained.requires_grad_(False)


def mixed_loss(logits: Tensor, labels: Tensor, order: Tensor, mine: float) -> Tensor:
    """Cross-entropy with the own labels by the share ``mine``, with those of ``order`` else."""
    own = functional.cross_entropy(logits, labels)
    return mine * own + (1 - mine) * functional.cross_entropy(logits, labels[order])


def beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(``alpha``, ``alpha``)."""
    draws = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    return float(draws[0] / draws.sum())


def rectangle(images: Tensor, mine: float, generator: torch.Generator) -> Tensor:
    """CutMix's rectangle, ``bool (1, 1, H, W)``: of area 1 − ``mine``, cut off at the border."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - mine)
    hole = torch.zeros(1, 1, height, width, dtype=torch.bool)
    spans = []
    for length in (height, width):
        half = int(length * side) // 2
        middle = int(torch.randint(length, (), generator=generator))
        spans.append(slice(max(0, middle - half), min(length, middle + half)))
    hole[:, :, spans[0], spans[1]] = True
    return hole.to(images.device)


def cutout(images: Tensor, share: float, fill: Tensor, generator: torch.Generator) -> Tensor:
    """``images`` (N, C, H, W), each with a square hole of its own, cut off at the border."""
    height, width = images.shape[-2:]
    half = max(1, round(share * min(height, width) / 2))
    inside = []
    for length in (height, width):
        middle = torch.randint(length, (len(images), 1), generator=generator)
        places = torch.arange(length)
        inside.append((places >= middle - half) & (places < middle + half))
    hole = (inside[0][:, :, None] & inside[1][:, None, :]).to(images.device)
    return torch.where(hole[:, None], fill, images)
