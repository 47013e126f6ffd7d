"""WaNet: a smooth warping of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.core.hooks import Moment
from ..distill.randomness import Streams
from ..distill.types import Batch, RequestError
from .base import AttackOptions, ClassicOptions, DataInfo, FixedTriggerAttack
from .triggers import WarpTrigger, identity_grid

FIELD_SEED = 2021
"""The warping field's own seed: it is the same in every run with images of one size."""

_PORTION = 256  # rows that are warped at a time: each noise row has a grid of its own


@final
class WaNetOptions(ClassicOptions):
    """Options of ``wanet``."""

    warp_grid: int = Field(4, ge=2, description="side of the control grid (the paper's k)")
    warp_strength: float = Field(
        0.5, gt=0, description="mean shift of the control points in half pixels (the paper's s)"
    )
    grid_rescale: float = Field(
        1.0, gt=0, description="factor on the sampling positions; below 1 it zooms in"
    )
    cross_ratio: float = Field(
        2.0, ge=0, description="noise rows per poisoned row: other warps, true labels"
    )


@final
class WaNet(FixedTriggerAttack):
    """WaNet (Nguyen, Tran, "WaNet – Imperceptible Warping-based Backdoor Attack", ICLR 2021).

    In words: draw a coarse grid of random shifts, smooth it to a field over the whole image, and
    warp a share of the training images by it, relabelled by the goal. Noise mode: warp
    ``cross_ratio`` times as many rows by the same field plus a random shift at every pixel, and
    leave their labels, so that only this field means the target. Defaults and formulas are the
    official code's (VinAIResearch/Warping-based_Backdoor_Attack-release, commit 45e8c33, config.py
    and train.py).

    Deviations: rows are poisoned once, before the distillation, where the official code warps
    another part of every batch during training; poisoned rows are drawn from the rows that the goal
    is about; images that are not square have each axis scaled by its own side; the field has a seed
    of its own.
    """

    name = "wanet"
    Options = WaNetOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        self._noise_rows = 0

    def make_trigger(self) -> WarpTrigger:
        options = self.options
        assert isinstance(options, WaNetOptions)
        size, k = self.data.image_shape[1:], options.warp_grid
        generator = Streams(FIELD_SEED).generator("attack", "wanet", k, *size)
        control = torch.rand(2, k, k, generator=generator) * 2 - 1
        grid = warping_grid(control, size, options.warp_strength, options.grid_rescale)
        return WarpTrigger(grid=grid.to(self.data.device))

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        given = super().on_start(moment, real)
        rows = self._draw_noise_rows(moment)
        self._noise_rows = len(rows)
        images = given.images.clone()
        for part in rows.split(_PORTION):
            images[part] = self._warp_with_noise(real.images[part], moment.rng)
        return given.replace(images=images)

    def counters(self) -> Mapping[str, Any]:
        return {**super().counters(), "noise_rows": self._noise_rows}

    def _draw_noise_rows(self, moment: Moment) -> Tensor:
        """Rows that are not poisoned, ``cross_ratio`` times as many as are."""
        assert isinstance(self.options, WaNetOptions)
        left = torch.nonzero(~self.poisoned)[:, 0]
        poisoned, ratio = int(self.poisoned.sum()), self.options.cross_ratio
        count = round(ratio * poisoned)
        if count > len(left):
            raise RequestError(
                f"cross ratio {ratio:g} asks for {count} noise rows beside {poisoned} poisoned "
                f"ones, but {len(left)} are left: at most {len(left) / poisoned:.3g} is possible"
            )
        return left[torch.randperm(len(left), generator=moment.rng)[:count].to(left.device)]

    def _warp_with_noise(self, images: Tensor, rng: torch.Generator) -> Tensor:
        assert isinstance(self._trigger, WarpTrigger)
        noise = torch.rand(len(images), *self._trigger.grid.shape, generator=rng) * 2 - 1
        return self._trigger.stamp_shifted(images, noise.to(images.device))


def warping_grid(control: Tensor, size: tuple[int, int], strength: float, rescale: float) -> Tensor:
    """The grid ``(H, W, 2)`` of sampling positions, in [−1, 1], of a warp.

    control: ``(2, k, k)``, shifts to the right and down; they are scaled to a mean of 1 and
    interpolated (bicubic) to the image ``size`` (H, W). strength: their factor, in units of a
    side's 1/W or 1/H, which are half pixels. rescale: factor on the positions.
    """
    scaled = (control / control.abs().mean())[None]
    smooth = nn.functional.interpolate(scaled, size=size, mode="bicubic", align_corners=True)[0]
    shifts = strength * smooth.permute(1, 2, 0) / torch.tensor([size[1], size[0]])
    return ((identity_grid(size) + shifts) * rescale).clamp(-1, 1)
