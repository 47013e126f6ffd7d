"""The trigger ``blend``: a pattern through which the image shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from .base import TriggerRange, caption, short
from .masked import MaskedTrigger


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class BlendTrigger(MaskedTrigger):
    """A pattern at an opacity, the same for the whole image or another at every pixel (the mask).

    (1 − mask) · image + mask · pattern. Where the mask is 0 or 1 the values are the image's or the
    pattern's own, to the last bit.
    """

    kind: ClassVar[str] = "blend"

    @classmethod
    def uniform(cls, pattern: Tensor, opacity: float, range: TriggerRange = "pixel") -> Self:
        """``pattern`` (C, H, W) over the whole image at one opacity in [0, 1]."""
        mask = torch.full((1, *pattern.shape[1:]), opacity, device=pattern.device)
        return cls(pattern=pattern, mask=mask, range=range)

    def stamp(self, images: Tensor) -> Tensor:
        mask = self.mask
        whole = torch.where(mask.bool(), self.pattern, images)
        part = (mask > 0) & (mask < 1)  # no branch: it would wait for a GPU at every draw
        return torch.where(part, (1 - mask) * images + mask * self.pattern, whole)

    def describe(self) -> Mapping[str, Any]:
        """As for every pattern under a mask, and the largest opacity."""
        return {"kind": self.kind, "opacity": self._opacity(), **super().describe()}

    def caption(self) -> str:
        return caption(self.describe(), f"opacity {short(self._opacity())}")

    def _opacity(self) -> float:
        return round(self.mask.max().item(), 6)
