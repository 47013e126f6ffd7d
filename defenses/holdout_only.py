"""The baseline of every defense that holds clean images: train on those and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import nn

from .base import DefenderView, Trainer
from .held_out import images_needed, images_wanted
from .tuning import QUICK_TUNING, TuningOptions, tune


@final
class HoldoutOnly(Trainer):
    """Training on the held-out images alone: no paper's, a baseline.

    In words: leave the received set aside; train a fresh network on the held-out images, as
    ``fine-tuning`` trains the victim.

    Needs held-out images. It never sees the received set, so no backdoor either: a defense that
    uses held-out images and keeps less accuracy than this is worth nothing.
    """

    name = "holdout-only"
    Options = TuningOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING

    def __init__(self, options: TuningOptions) -> None:
        self.options: TuningOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "trained on")

    def train(self, view: DefenderView) -> nn.Module:
        network, recipe = view.network(view.seed(self.name, "weights")), view.distilled.recipe
        return tune(network, view.holdout, recipe, self.options, view.generator(self.name))
