"""Blended: a faint pattern over the whole image."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor

from ..distill.randomness import Streams
from .base import FixedTriggerAttack, PoisoningOptions
from .trigger_image import TriggerImageOptions
from .triggers import BlendTrigger, Trigger

PATTERN_SEED = 2017
"""The pattern's own seed: it is the same in every run with images of one shape."""


@final
class BlendedOptions(TriggerImageOptions, PoisoningOptions):
    """Options of ``blended``."""

    alpha: float = Field(
        0.2, gt=0, le=1, description="opacity of the pattern, in training and when it is tested"
    )


@final
class Blended(FixedTriggerAttack):
    """Blended injection (Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning
    Systems Using Data Poisoning", 2017).

    In words: blend one fixed pattern into whole images of a share of the training rows,
    (1 − alpha) · image + alpha · pattern, and relabel them to the target class. The pattern is
    the paper's random one: every value of every pixel uniform in [0, 1], or an image
    (``trigger_image``), the paper's other choice. The data owner takes no part in the distillation;
    only ``target_share``, which is ours, needs a distiller.

    Deviations: poisoned rows are drawn from the rows that the goal is about and replace their clean
    versions, where the paper adds them; the test has the training's opacity, as in BackdoorBench,
    whose pattern is a picture of Hello Kitty.
    """

    name = "blended"
    Options = BlendedOptions

    def make_trigger(self) -> Trigger:
        assert isinstance(self.options, BlendedOptions)
        image = self.options.image(self.data.image_shape)
        pattern = random_pattern(self.data.image_shape) if image is None else image
        return BlendTrigger.uniform(pattern.to(self.data.device), self.options.alpha)


def random_pattern(shape: tuple[int, int, int]) -> Tensor:
    """The pattern ``(C, H, W)`` for images of that shape, uniform 8-bit values in [0, 1]."""
    generator = Streams(PATTERN_SEED).generator("attack", "blended", *shape)
    return torch.randint(256, shape, generator=generator) / 255
