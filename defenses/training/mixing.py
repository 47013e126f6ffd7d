"""Training on mixed and cut images, so that no patch is always where its label is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..base import DefenderView, DefenseOptions, Trainer
from ..common.tuning import Step, follow, mini_batches, train_by


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

    As in the code of both: half of the mini-batches are mixed, with one rectangle for all images
    of a mini-batch, after the usual augmentation.

    Deviations: the recipe is the set's; the codes train 40 epochs (Borgnia et al.) or 300 (Yun et
    al.) from a learning rate of 0.1 or 0.25.
    """

    name = "cutmix"
    Options = CutMixOptions
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"probability": 0.25},
        {},
        {"probability": 0.75},
        {"probability": 1.0},
    )

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
    """The authors' code's: MaxUp with four copies, mixup with a flat Beta."""

    kind: Literal["maxup-cutout", "mixup", "cutout"] = Field(
        "maxup-cutout", description="what is done to a mini-batch"
    )
    copies: int = Field(4, ge=1, description="cutouts of which MaxUp takes the worst")
    hole: float = Field(0.34, gt=0, lt=1, description="area of the cutout, share of the image's")
    warmup: float = Field(
        0.15, ge=0, lt=1, description="share of the epochs before MaxUp starts (6 of 40)"
    )
    alpha: float = Field(1.0, gt=0, description="parameters of mixup's Beta distribution")


@final
class StrongAugmentation(Trainer):
    """Strong augmentation as a defense (Borgnia et al., "Strong Data Augmentation Sanitizes
    Poisoning and Backdoor Attacks Without an Accuracy Tradeoff", ICASSP 2021).

    In words: train as the set's recipe says, on the worst of four cutouts of each image (MaxUp:
    Gong et al., CVPR 2021; Cutout: DeVries and Taylor, 2017), or on mixup (Zhang et al., ICLR
    2018).

    Needs nothing but the set.

    As in the authors' code (JonasGeiping/data-poisoning): a hole of 34 % of the area (18 pixels of
    32; Cutout's own code has 16), in one place for a whole mini-batch, of the set's mean pixel (0
    after normalisation); MaxUp rests in the first 6 of 40 epochs.

    Deviations: the recipe is the set's, where the code trains 40 epochs from a learning rate of
    0.1. MaxUp is the paper's, each image's worst of four cutouts: in the code the four share one
    tensor, so that every copy has all four holes, and their losses are averaged.
    """

    name = "strong-augmentation"
    Options = StrongAugmentationOptions
    quick: ClassVar[Mapping[str, Any]] = {"copies": 2}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"kind": "cutout"},
        {"kind": "mixup"},
        {},
        {"hole": 0.5},
        {"hole": 0.5, "copies": 8},
    )

    def __init__(self, options: StrongAugmentationOptions) -> None:
        self.options: StrongAugmentationOptions = options

    def train(self, view: DefenderView) -> nn.Module:
        options, generator = self.options, view.generator(self.name, "mixing")
        fill = torch.tensor(
            view.distilled.recipe.preprocessing.mean, device=view.labels.device
        ).view(-1, 1, 1)
        warming = warmup_steps(view, options.warmup) if options.kind == "maxup-cutout" else 0
        steps = itertools.count()

        def cut(images: Tensor) -> Tensor:
            return torch.where(rectangle(images, 1 - options.hole, generator), fill, images)

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            if next(steps) < warming:
                loss = functional.cross_entropy(network(images), labels)
            elif options.kind == "mixup":
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


def warmup_steps(view: DefenderView, share: float) -> int:
    """How many mini-batches the first ``share`` of the recipe's epochs has."""
    recipe, count = view.distilled.recipe.by_epochs(), len(view.labels)
    device = torch.device("cpu")
    pieces = mini_batches(count, recipe.batch_size, torch.Generator(), device)
    return round(share * recipe.epochs) * len(pieces)


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
    middle = [int(torch.randint(length, (), generator=generator)) for length in (height, width)]
    rows, columns = map(span, (height, width), middle, (math.sqrt(1 - mine),) * 2)
    hole = torch.zeros(1, 1, height, width, dtype=torch.bool)
    hole[:, :, rows, columns] = True
    return hole.to(images.device)


def span(length: int, middle: int, share: float) -> slice:
    """Where a piece of ``share`` of the ``length`` lies around ``middle``, cut off at the ends."""
    half = int(length * share) // 2
    return slice(max(0, middle - half), min(length, middle + half))
