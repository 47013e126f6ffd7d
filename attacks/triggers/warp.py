"""The trigger ``warp``: the image's own pixels, moved a little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from ...distill.types import RequestError
from .base import Trigger, TriggerPicture, TriggerRange, caption, needed, short

_ROUNDING = 1e-6
_SQUARES = 4  # of the picture's checkerboard, along a side


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class WarpTrigger(Trigger):
    """Every pixel takes the value that the image has at another place, interpolated bilinearly.

    grid: ``float32 (H, W, 2)``, the place (to the right, down) for every pixel; −1 and 1 are the
    centres of the first and the last pixel. It works for any number of channels.
    """

    kind: ClassVar[str] = "warp"
    grid: Tensor

    def stamp(self, images: Tensor) -> Tensor:
        return self._sample(images, self.grid.expand(len(images), -1, -1, -1))

    def stamp_shifted(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images ``(N, C, H, W)``, each pixel's place moved further by its ``noise``.

        noise: ``(N, H, W, 2)``, in units of 1/W and 1/H: half pixels.
        """
        height, width = self.grid.shape[:2]
        shifts = noise / torch.tensor([width, height], device=noise.device)
        return self._sample(images, (self.grid + shifts).clamp(-1, 1))

    def tensors(self) -> dict[str, Tensor]:
        return {"grid": self.grid}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], range: TriggerRange) -> Self:
        (grid,) = needed(tensors, "grid")
        if grid.ndim != 3 or grid.shape[2] != 2:
            raise RequestError(
                f"the warp's grid has the shape {tuple(grid.shape)}, expected (H, W, 2)"
            )
        if not bool((grid.abs() <= 1 + _ROUNDING).all()):
            raise RequestError("the warp's grid points outside the image: expected [-1, 1]")
        return cls(grid=grid, range=range)

    def fits(self, image_shape: tuple[int, int, int]) -> bool:
        return self.grid.shape[:2] == image_shape[1:]

    def describe(self) -> Mapping[str, Any]:
        """The largest and the mean shift, in pixels.

        It brings no values of its own: those of an image stay in [0, 1], and a black image gains
        nothing.
        """
        shifts = self._shifts()
        return {
            "kind": self.kind,
            "range": self.range,
            "min": 0.0,
            "max": 1.0,
            "l2": 0.0,
            "linf": 0.0,
            "largest_shift": shifts.max().item(),
            "mean_shift": shifts.mean().item(),
        }

    def picture(self) -> TriggerPicture:
        """A warped checkerboard."""
        height, width = self.grid.shape[:2]
        rows = torch.arange(height) * _SQUARES // height
        columns = torch.arange(width) * _SQUARES // width
        board = ((rows[:, None] + columns) % 2).float()[None]
        grid = self.grid.detach().float().cpu()
        described = self.describe()
        largest, mean = short(described["largest_shift"]), short(described["mean_shift"])
        return TriggerPicture(
            image=WarpTrigger(grid=grid).stamp(board[None])[0],
            caption=caption(described, f"moved by {mean} pixels, at most {largest}"),
            region=None,
            labels=self.labels,
        )

    def _sample(self, images: Tensor, grids: Tensor) -> Tensor:
        found: Tensor = nn.functional.grid_sample(
            images, grids, mode="bilinear", align_corners=True
        )
        return found.clamp(0, 1) if self.range == "pixel" else found

    def _shifts(self) -> Tensor:
        """``(H, W)``: how far each pixel's place is from the pixel, in pixels."""
        height, width = self.grid.shape[:2]
        apart = self.grid - identity_grid((height, width)).to(self.grid.device)
        half = torch.tensor([width - 1, height - 1], device=apart.device) / 2
        distances: Tensor = (apart * half).norm(dim=2)
        return distances


def identity_grid(size: tuple[int, int]) -> Tensor:
    """The grid ``(H, W, 2)`` of places that moves nothing, for images of that size (H, W)."""
    rows, columns = (torch.linspace(-1, 1, side) for side in size)
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((right, down), dim=2)
