"""Triggers: what the attacker puts on an image, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..distill.types import RequestError

_ROUNDING = 1e-6
Position = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center"]
TriggerRange = Literal["pixel", "unbounded"]
KINDS = ("patch", "blend")
"""What a trigger's description calls it."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PatchTrigger:
    """A pattern that covers the pixels under a mask, wholly or in part.

    pattern: ``float32 (C, H, W)``, pixel space. mask: ``float32 (1, H, W)``, the pattern's opacity
    in [0, 1]: 1 where it replaces the image (a patch), less where it is blended in.
    range: ``"pixel"`` promises values in [0, 1]; ``"unbounded"`` promises nothing.
    """

    pattern: Tensor
    mask: Tensor
    range: TriggerRange = "pixel"

    def stamp(self, images: Tensor) -> Tensor:
        """New images ``(N, C, H, W)`` that carry the trigger; the given ones stay clean.

        (1 − mask) · image + mask · pattern. Where the mask is 0 or 1 the values are the image's or
        the pattern's own, to the last bit.
        """
        mask = self.mask
        whole = torch.where(mask.bool(), self.pattern, images)
        part = (mask > 0) & (mask < 1)  # no branch: it would wait for a GPU at every draw
        return torch.where(part, (1 - mask) * images + mask * self.pattern, whole)

    @property
    def blends(self) -> bool:
        """Whether images show through the pattern anywhere."""
        return bool(((self.mask > 0) & (self.mask < 1)).any())

    def tensors(self) -> dict[str, Tensor]:
        """What a trigger file holds."""
        return {"pattern": self.pattern, "mask": self.mask}

    def describe(self) -> Mapping[str, Any]:
        """Kind, range, extreme values and norms under the mask (pixel units).

        l2, linf: of the pattern under the mask, times its opacity: what a black image gains.
        A blend also says its largest opacity.
        """
        under = self.mask[0] > 0
        values = self.pattern[:, under]
        added = values if not self.blends else values * self.mask[0, under]
        opacity = {"opacity": round(self.mask.max().item(), 6)} if self.blends else {}
        return {
            "kind": "blend" if self.blends else "patch",
            **opacity,
            "range": self.range,
            "min": values.min().item(),
            "max": values.max().item(),
            "l2": added.norm().item(),
            "linf": added.abs().max().item(),
        }


def trigger_from(tensors: Mapping[str, Tensor], range: TriggerRange) -> PatchTrigger:
    """The trigger in a file's ``tensors``.

    Errors: ``RequestError`` where one is missing, their shapes don't fit, or the mask holds other
    values than opacities in [0, 1].
    """
    missing = [name for name in ("pattern", "mask") if name not in tensors]
    if missing:
        raise RequestError(f"the trigger lacks its {' and its '.join(missing)}")
    pattern, mask = tensors["pattern"].float(), tensors["mask"].float()
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
    low, high = pattern.min().item(), pattern.max().item()
    if range == "pixel" and not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise RequestError(
            f"the trigger's range is pixel, and its pattern holds values from {low:.3g} to "
            f"{high:.3g}"
        )
    return PatchTrigger(pattern=pattern, mask=mask, range=range)


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
