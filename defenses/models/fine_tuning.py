"""The defense ``fine-tuning``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import nn

from ..base import DefenderView, Repairer
from ..common.held_out import few_images_caution, images_needed
from ..common.sgd import QUICK_FINE_TUNING, FineTuningOptions, fine_tune


@final
class FineTuning(Repairer):
    """Fine-tuning: train the victim further on clean images (Liu, Xie, Srivastava, "Neural
    Trojans", ICCD 2017; the baseline of Liu, Dolan-Gavitt, Garg, "Fine-Pruning", RAID 2018).

    In words: train the victim further on held-out images with their true labels.

    Needs a few hundred held-out images.

    Deviations: neither paper has settings for such images; these are BackdoorBench's
    (defense/ft.py). Its epochs are counted in steps, so that fewer held-out images are used more
    often; crops shift by an eighth of an image of any size (always 4 pixels there); no mixed
    precision.
    """

    name = "fine-tuning"
    Options = FineTuningOptions
    options: FineTuningOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_FINE_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.001},
        {},
        {"lr": 0.03},
        {"lr": 0.1},
        {"lr": 0.1, "steps": 3000},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return fine_tune(view.trainable_victim(), view.holdout, recipe, self.options, generator)
