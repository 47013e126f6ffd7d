"""What patches and blends share: a pattern and its opacity at every pixel."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ...distill.types import RequestError
from .base import (
    Region,
    Trigger,
    TriggerPicture,
    TriggerRange,
    caption,
    check_within,
    extremes,
    needed_images,
)

_ALWAYS_ENLARGED = 6  # a covered area of up to 6×6 pixels is enlarged on the smallest images too


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedTrigger(Trigger, ABC):
    """A pattern that covers the pixels under a mask, wholly or in part.

    pattern: ``float32 (C, H, W)``, pixel space. mask: ``float32 (1, H, W)``, the pattern's opacity
    in [0, 1].
    """

    pattern: Tensor
    mask: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"pattern": self.pattern, "mask": self.mask}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], range: TriggerRange) -> Self:
        pattern, mask = needed_images(tensors, "pattern", "mask")
        if mask.shape != (1, *pattern.shape[1:]):
            raise RequestError(
                f"the trigger's mask has the shape {tuple(mask.shape)}, expected (1, H, W) for the "
                f"pattern's {tuple(pattern.shape)}"
            )
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise RequestError(
                f"the trigger's mask holds values from {mask.min().item():.3g} to "
                f"{mask.max().item():.3g}, expected opacities in [0, 1]"
            )
        if range == "pixel":
            check_within("pattern (its range is pixel)", pattern, 0, 1)
        return cls(pattern=pattern, mask=mask, range=range)

    def fits(self, image_shape: tuple[int, int, int]) -> bool:
        return self.pattern.shape == image_shape

    def describe(self) -> Mapping[str, Any]:
        """min, max: of the pattern under the mask; l2, linf: of that times its opacity."""
        under = self.mask[0] > 0
        values, opacity = self.pattern[:, under], self.mask[0, under]
        if not values.numel():
            values, opacity = values.new_zeros(1), opacity.new_zeros(1)
        added = values * opacity
        return {
            "kind": self.kind,
            "range": self.range,
            **extremes(values, added),
        }

    def picture(self) -> TriggerPicture:
        """The pattern at full opacity on mid-grey."""
        pattern, mask = self.pattern.detach().float().cpu(), self.mask.detach().float().cpu()
        return TriggerPicture(
            image=torch.where(mask > 0, pattern, torch.tensor(0.5)),
            caption=self.caption(),
            region=_region(mask[0] > 0),
            labels=self.labels,
        )

    def caption(self) -> str:
        """Its values in one line."""
        return caption(self.describe())


def _region(covered: Tensor) -> Region | None:
    """The rectangle around the pixels that are ``covered`` (H, W), where it is worth enlarging."""
    places = torch.nonzero(covered)
    if not len(places):
        return None
    (top, left), (bottom, right) = places.min(0)[0].tolist(), places.max(0)[0].tolist()
    height, width = bottom - top + 1, right - left + 1
    largest = max(_ALWAYS_ENLARGED, max(covered.shape) // 2)
    return (top, left, height, width) if max(height, width) <= largest else None
