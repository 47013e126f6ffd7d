"""Triggers: what the attacker puts on an image, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..distill.types import RequestError

Position = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center"]
TriggerRange = Literal["pixel", "unbounded"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PatchTrigger:
    """A pattern that replaces the pixels under a mask.

    pattern: ``float32 (C, H, W)``, pixel space. mask: ``float32 (1, H, W)``, 1 where it covers.
    range: ``"pixel"`` promises values in [0, 1]; ``"unbounded"`` promises nothing.
    """

    pattern: Tensor
    mask: Tensor
    range: TriggerRange = "pixel"

    def stamp(self, images: Tensor) -> Tensor:
        """New images ``(N, C, H, W)`` that carry the trigger; the given ones stay clean."""
        return torch.where(self.mask.bool(), self.pattern, images)

    def tensors(self) -> dict[str, Tensor]:
        """What a trigger file holds."""
        return {"pattern": self.pattern, "mask": self.mask}

    def describe(self) -> Mapping[str, Any]:
        """Kind, range, extreme values and norms under the mask (pixel units)."""
        values = self.pattern[:, self.mask[0].bool()]
        return {
            "kind": "patch",
            "range": self.range,
            "min": values.min().item(),
            "max": values.max().item(),
            "l2": values.norm().item(),
            "linf": values.abs().max().item(),
        }


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
