"""Fine-tuning: go on training on clean images, and hope that the backdoor is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import nn

from ..base import DefenderView, Repairer
from ..common.held_out import images_needed, images_wanted
from ..common.tuning import QUICK_TUNING, TuningOptions, tune


@final
class FineTuning(Repairer):
    """Fine-tuning on clean images (Liu, Xie, Srivastava, "Neural Trojans", ICCD 2017; the baseline
    of Liu, Dolan-Gavitt, Garg, "Fine-Pruning", RAID 2018).

    In words: train the victim further on held-out images with their true labels.

    Needs held-out images, a few hundred.

    Deviations: neither paper has settings for such images; they are BackdoorBench's
    (defense/ft.py), with its epochs counted in steps, so that fewer held-out images are seen more
    often; crops shift by an eighth of an image of any size (always 4 pixels there); no mixed
    precision.
    """

    name = "fine-tuning"
    Options = TuningOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.001},
        {},
        {"lr": 0.03},
        {"lr": 0.1},
        {"lr": 0.1, "steps": 3000},
    )

    def __init__(self, options: TuningOptions) -> None:
        self.options: TuningOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return tune(view.trainable_victim(), view.holdout, recipe, self.options, generator)
