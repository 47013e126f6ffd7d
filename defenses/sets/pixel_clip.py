"""Clipping of a received set's pixels."""

from __future__ import annotations

from typing import final

from ...distill.types import DistilledSet
from ..base import DefenderView, Sanitiser


@final
class PixelClip(Sanitiser):
    """The received set's pixels, clipped to [0, 1].

    In words: distilled pixels may take any value, those of a camera do not. Clip them, and train on
    the result.

    Needs a set with pixels outside [0, 1]; any other set stays unchanged. No paper: a baseline. It
    has no options, so there is nothing to tune.
    """

    name = "pixel-clip"
    needs = "a set with pixels outside [0, 1]"

    def caution(self, view: DefenderView) -> str | None:
        low, high = view.distilled.batch.images.aminmax()
        inside = float(low) >= 0 and float(high) <= 1
        return "no pixel is outside [0, 1]: the set stays unchanged" if inside else None

    def sanitise(self, view: DefenderView) -> DistilledSet:
        return view.with_images(view.distilled.batch.images.clamp(0, 1))
