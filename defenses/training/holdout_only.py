"""The baseline of every defense that holds clean images: train on those and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

from pydantic import Field
from torch import nn

from ..base import DefenderView, Trainer
from ..common.held_out import images_needed, images_wanted
from ..common.tuning import QUICK_TUNING, TuningOptions, tune


@final
class HoldoutOnlyOptions(TuningOptions):
    """Rate and augmentation are the set's recipe's: those that its networks are trained with from
    fresh weights. The rest is as ``fine-tuning`` has it."""

    lr: float | None = Field(
        None, gt=0, description="SGD's first learning rate; none: the set's recipe's"
    )
    augment: Literal["crop", "recipe", "none"] = Field(
        "recipe", description="augmentation; recipe: the set's recipe's"
    )


@final
class HoldoutOnly(Trainer):
    """Training on the held-out images alone: no paper's, a baseline.

    In words: leave the received set aside; train a fresh network on the held-out images, for as
    many steps as ``fine-tuning`` takes, at the rate and with the augmentation of the set's recipe
    (a rate for fine-tuning is too low for fresh weights).

    Needs held-out images. It never sees the received set, so no backdoor either: a defense that
    uses held-out images and keeps less accuracy than this is worth nothing. The tuned budget has
    nothing to choose here.
    """

    name = "holdout-only"
    Options = HoldoutOnlyOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING

    def __init__(self, options: HoldoutOnlyOptions) -> None:
        self.options: HoldoutOnlyOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "trained on")

    def train(self, view: DefenderView) -> nn.Module:
        network, recipe = view.network(view.seed(self.name, "weights")), view.distilled.recipe
        return tune(network, view.holdout, recipe, self.options, view.generator(self.name))
