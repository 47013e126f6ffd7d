"""Blended: a faint pattern over the whole image."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor

from ..distill.core.hooks import Moment
from ..distill.randomness import Streams
from ..distill.types import Batch
from .base import CommonOptions, PoisoningAttack, Scenery, ThreatModel
from .triggers import PatchTrigger

PATTERN_SEED = 2017
"""The pattern's own seed: it is the same in every run with images of one shape."""


@final
class BlendedOptions(CommonOptions):
    """Options of ``blended``."""

    alpha: float = Field(
        0.2, gt=0, le=1, description="opacity of the pattern, in training and when it is tested"
    )


@final
class Blended(PoisoningAttack):
    """Blended injection (Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning
    Systems Using Data Poisoning", 2017).

    In words: blend one fixed pattern into whole images of a share of the training rows,
    (1 − alpha) · image + alpha · pattern, and relabel them to the target class. The pattern is
    the paper's random one: every value of every pixel uniform in [0, 1]. The data owner takes no
    part in the distillation; only ``target_share``, which is ours, needs a distiller.

    Deviations: poisoned rows are drawn from the non-target rows and replace their clean versions,
    where the paper adds them; the test has the training's opacity, as in BackdoorBench, whose
    pattern is a picture of Hello Kitty.
    """

    name = "blended"
    Options = BlendedOptions

    def __init__(self, options: CommonOptions, scenery: Scenery) -> None:
        super().__init__(options, scenery)
        assert isinstance(options, BlendedOptions)
        self._trigger = PatchTrigger(
            pattern=random_pattern(scenery.image_shape).to(scenery.device),
            mask=torch.full((1, *scenery.image_shape[1:]), options.alpha, device=scenery.device),
        )

    @property
    def threat_model(self) -> ThreatModel:
        return "data owner" if self.options.target_share is None else "distiller"

    @property
    def trigger(self) -> PatchTrigger:
        return self._trigger

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        return self.hand_in(moment, real)


def random_pattern(shape: tuple[int, int, int]) -> Tensor:
    """The pattern ``(C, H, W)`` for images of that shape, uniform 8-bit values in [0, 1]."""
    generator = Streams(PATTERN_SEED).generator("attack", "blended", *shape)
    return torch.randint(256, shape, generator=generator) / 255
