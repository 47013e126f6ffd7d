"""The defense ``strong-augmentation``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..base import DefenderView, DefenseOptions, Trainer
from ..common.mixing import beta, mixed_loss, rectangle, trained_with
from ..common.sgd import backward_step, mini_batches


@final
class StrongAugmentationOptions(DefenseOptions):
    """The authors' code: MaxUp with four copies, mixup with a flat Beta distribution."""

    kind: Literal["maxup-cutout", "mixup", "cutout"] = Field(
        "maxup-cutout", description="augmentation of a mini-batch"
    )
    copies: int = Field(4, ge=1, description="cutouts of which MaxUp takes the worst")
    hole: float = Field(0.34, gt=0, lt=1, description="area of the cutout, share of the image's")
    warmup: float = Field(
        0.15, ge=0, lt=1, description="share of the epochs before MaxUp starts (6 of 40)"
    )
    alpha: float = Field(1.0, gt=0, description="parameters of mixup's Beta distribution")


@final
class StrongAugmentation(Trainer):
    """Strong augmentation: training on the worst of several cutouts, or on mixup (Borgnia et al.,
    "Strong Data Augmentation Sanitizes Poisoning and Backdoor Attacks Without an Accuracy
    Tradeoff", ICASSP 2021).

    In words: train by the set's recipe, on the worst of four cutouts of each image (MaxUp: Gong et
    al., CVPR 2021; Cutout: DeVries and Taylor, 2017), or on mixup (Zhang et al., ICLR 2018).

    Needs only the set.

    As in the authors' code (JonasGeiping/data-poisoning): a hole of 34 % of the area (18 pixels of
    32; Cutout's own code has 16), at one place for a whole mini-batch, filled with the set's mean
    pixel (0 after normalisation); no MaxUp in the first 6 of 40 epochs.

    Deviations: the recipe is the set's, the code trains 40 epochs from a learning rate of 0.1.
    MaxUp is the paper's, each image's worst of four cutouts: in the code the four share one tensor,
    so that every copy has all four holes, and their losses are averaged.
    """

    name = "strong-augmentation"
    Options = StrongAugmentationOptions
    options: StrongAugmentationOptions
    quick: ClassVar[Mapping[str, Any]] = {"copies": 2}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"kind": "cutout"},
        {"kind": "mixup"},
        {},
        {"hole": 0.5},
        {"hole": 0.5, "copies": 8},
    )

    def train(self, view: DefenderView) -> nn.Module:
        options, generator = self.options, view.generator(self.name, "mixing")
        mean = view.distilled.recipe.preprocessing.mean
        fill = torch.tensor(mean, device=view.labels.device).view(-1, 1, 1)
        warmup = warmup_steps(view, options.warmup) if options.kind == "maxup-cutout" else 0
        steps = itertools.count()

        def cut(images: Tensor) -> Tensor:
            return torch.where(rectangle(images, 1 - options.hole, generator), fill, images)

        def mixup(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            order = torch.randperm(len(images), generator=generator).to(images.device)
            share = beta(options.alpha, generator)
            mixed = share * images + (1 - share) * images[order]
            return mixed_loss(network(mixed), labels, order, share)

        def cutout(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return functional.cross_entropy(network(cut(images)), labels)

        def maxup(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            losses = [
                functional.cross_entropy(network(cut(images)), labels, reduction="none")
                for _ in range(options.copies)
            ]
            return torch.stack(losses).amax(dim=0).mean()

        augmented_loss = {"mixup": mixup, "cutout": cutout, "maxup-cutout": maxup}[options.kind]

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            if next(steps) < warmup:
                loss = functional.cross_entropy(network(images), labels)
            else:
                loss = augmented_loss(network, images, labels)
            backward_step(optimiser, loss)

        return trained_with(step, view, self.name)


def warmup_steps(view: DefenderView, share: float) -> int:
    """How many mini-batches the first ``share`` of the recipe's epochs has."""
    recipe, count = view.distilled.recipe.by_epochs(), len(view.labels)
    batches = mini_batches(count, recipe.batch_size, torch.Generator(), torch.device("cpu"))
    return round(share * recipe.epochs) * len(batches)
