"""Gaussian blur of a received set."""

from __future__ import annotations

from typing import final

from ...distill.types import DistilledSet
from ..base import DefenderView, Sanitiser
from ..common.blur import BlurOptions, blurred


@final
class SetBlur(Sanitiser):
    """Gaussian blur of the received set's images.

    In words: blur the set with a 3 × 3 Gaussian, and train on the result. This removes fine
    patterns; the kernel is the same as that of ``gaussian-blur`` for inputs.

    Needs only the set. No paper: a baseline.
    """

    name = "blur"
    Options = BlurOptions
    options: BlurOptions
    needs = "only the set"

    def sanitise(self, view: DefenderView) -> DistilledSet:
        return view.with_images(blurred(view.distilled.batch.images, self.options))
