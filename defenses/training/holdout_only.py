"""The baseline of all defenses with clean images: train on those images alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

from pydantic import Field
from torch import nn

from ..base import DefenderView, Trainer
from ..common.held_out import few_images_caution, images_needed
from ..common.sgd import QUICK_FINE_TUNING, FineTuningOptions, fine_tune


@final
class HoldoutOnlyOptions(FineTuningOptions):
    """Learning rate and augmentation are those of the set's recipe, which are made for fresh
    weights. The other settings are those of ``fine-tuning``."""

    lr: float | None = Field(
        None, gt=0, description="SGD's first learning rate; none: that of the set's recipe"
    )
    augment: Literal["crop", "recipe", "none"] = Field(
        "recipe", description="augmentation; recipe: that of the set's recipe"
    )


@final
class HoldoutOnly(Trainer):
    """Training on the held-out images alone. No paper: a baseline.

    In words: ignore the received set; train a fresh network on the held-out images, for as many
    steps as ``fine-tuning``, with the learning rate and augmentation of the set's recipe (a
    learning rate for fine-tuning is too low for fresh weights).

    Needs held-out images. It does not use the received set, so it has no backdoor: a defense that
    uses held-out images and keeps less accuracy than this is useless. The tuned budget has nothing
    to choose here.
    """

    name = "holdout-only"
    Options = HoldoutOnlyOptions
    options: HoldoutOnlyOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_FINE_TUNING

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "trained on")

    def train(self, view: DefenderView) -> nn.Module:
        network, recipe = view.network(view.seed(self.name, "weights")), view.distilled.recipe
        return fine_tune(network, view.holdout, recipe, self.options, view.generator(self.name))
