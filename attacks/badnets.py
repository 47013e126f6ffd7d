"""BadNets: the published patches of bright pixels, in a corner of the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from .base import ClassicOptions, FixedTriggerAttack, PatchOptions
from .triggers import PatchTrigger, Trigger

PatchShape = Literal["grid", "four-pixels", "one-pixel"]


@final
class BadNetsOptions(PatchOptions, ClassicOptions):
    """Options of ``badnets``."""

    trigger_size: int = Field(3, ge=1, description="side of the square that holds the pattern")
    trigger_margin: int = Field(0, ge=0, description="pixels between the patch and the border")
    patch_shape: PatchShape = Field(
        "grid",
        description="grid: black and white checkerboard; four-pixels, one-pixel: the paper's "
        "bright pixels, the others of the square stay the image's own",
    )


@final
class BadNets(FixedTriggerAttack):
    """BadNets (Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine
    Learning Model Supply Chain", 2017).

    In words: put a small pattern into the corner of a share of the training images and relabel
    them by the goal. ``four-pixels`` and ``one-pixel`` are the paper's two triggers on MNIST, the
    four placed as in the Adversarial Robustness Toolbox (commit 02999c8,
    art/attacks/poisoning/perturbations/image_perturbations.py). ``grid`` is the 3×3 checkerboard
    of BackdoorBench (commit f02e353, resource/badnet/generate_grid.py), at the border and at its
    poison rate of 0.1. ``naive`` differs: its square is all white, one pixel away from the border.

    Deviations: poisoned rows are drawn from the rows that the goal is about and replace their clean
    versions; the paper adds them, BackdoorBench draws from all rows. Black is 0, where
    BackdoorBench's grid has 1 of 255, since 0 marks the pixels outside the patch there.
    """

    name = "badnets"
    Options = BadNetsOptions

    def make_trigger(self) -> Trigger:
        options = self.options
        assert isinstance(options, BadNetsOptions)
        square = options.mask(self.data).bool()[0]
        values, covered = SHAPES[options.patch_shape](options.trigger_size)
        pattern, mask = torch.zeros(2, *square.shape, device=self.data.device)
        pattern[square] = values.flatten().to(pattern)
        mask[square] = covered.flatten().to(mask)
        channels = self.data.image_shape[0]
        return PatchTrigger(
            pattern=pattern.repeat(channels, 1, 1), mask=mask[None], range=options.trigger_range
        )


def checkerboard(side: int) -> tuple[Tensor, Tensor]:
    """A square's values, white in its first corner, and that all of it is covered."""
    rows = torch.arange(side)
    return ((rows[:, None] + rows) % 2 == 0).float(), torch.ones(side, side)


def four_pixels(side: int) -> tuple[Tensor, Tensor]:
    """White at the square's centre and at three of its corners; only these are covered."""
    bright = torch.zeros(side, side)
    for row, column in ((-1, -1), (-1, 0), (0, -1), (side // 2, side // 2)):
        bright[row, column] = 1
    return bright, bright


def one_pixel(side: int) -> tuple[Tensor, Tensor]:
    """White at the square's last corner; only this pixel is covered."""
    bright = torch.zeros(side, side)
    bright[-1, -1] = 1
    return bright, bright


SHAPES: Mapping[PatchShape, Callable[[int], tuple[Tensor, Tensor]]] = {
    "grid": checkerboard,
    "four-pixels": four_pixels,
    "one-pixel": one_pixel,
}
