"""The trigger ``patch``: a pattern that replaces some pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ...distill.types import RequestError
from .base import TriggerRange
from .masked import MaskedTrigger

Position = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PatchTrigger(MaskedTrigger):
    """A pattern that replaces the pixels where the mask is 1; elsewhere the mask is 0."""

    kind: ClassVar[str] = "patch"

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], range: TriggerRange) -> Self:
        found = super().from_tensors(tensors, range)
        if not bool(((found.mask == 0) | (found.mask == 1)).all()):
            raise RequestError("the mask of a patch holds 0 and 1 only; a blend's may hold others")
        return found

    def stamp(self, images: Tensor) -> Tensor:
        return torch.where(self.mask.bool(), self.pattern, images)


def patch_mask(size: tuple[int, int], side: int, position: Position, margin: int) -> Tensor:
    """A square of ones ``(1, H, W)`` with ``side`` pixels, ``margin`` away from the border.

    Errors: ``RequestError`` where the patch and its margin don't fit the image.
    """
    height, width = size
    if side + margin > min(height, width):
        raise RequestError(
            f"a {side}×{side} trigger with a margin of {margin} does not fit "
            f"{height}×{width} images: the side may be 1 to {min(height, width) - margin}"
        )
    if position == "center":
        top, left = (height - side) // 2, (width - side) // 2
    else:
        vertical, horizontal = position.split("-")
        top = margin if vertical == "top" else height - side - margin
        left = margin if horizontal == "left" else width - side - margin
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = 1
    return mask
