"""Fewer grey levels, and pixels that a file can hold: what a receiver can do to a set's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from pydantic import Field
from torch import Tensor

from ...distill.types import DistilledSet
from ..base import DefenderView, DefenseOptions, Sanitiser


@final
class QuantiseOptions(DefenseOptions):
    """The paper's bit depths: 1 for MNIST's grey images, 5 for CIFAR-10's and ImageNet's."""

    bits: int | None = Field(
        None, ge=1, le=16, description="bits of a pixel (default: 1 of grey images, 5 of colour)"
    )


@final
class Quantise(Sanitiser):
    """Fewer grey levels in the received set (bit depth reduction: Xu, Evans, Qi, "Feature
    Squeezing: Detecting Adversarial Examples in Deep Neural Networks", NDSS 2018).

    In words: clip the set's pixels to [0, 1], round them to 2^bits levels, and train on that.

    Needs nothing but the set.

    The paper's joint detectors have 1 bit for MNIST and 5 bits for CIFAR-10 and ImageNet; the
    default goes by whether images are grey or in colour. Grey images that are not nearly black and
    white, as MNIST's are, may lose much by it; the tuned budget chooses between 5 bits and 1.

    Deviations: the paper squeezes inputs and compares the answers; here it is the received set that
    is squeezed, whose pixels may leave [0, 1] and are clipped on the way.
    """

    name = "quantise"
    Options = QuantiseOptions
    needs = "nothing but the set"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple({"bits": bits} for bits in (5, 4, 3, 2, 1))

    def __init__(self, options: QuantiseOptions) -> None:
        self.options: QuantiseOptions = options

    def sanitise(self, view: DefenderView) -> DistilledSet:
        images = view.distilled.batch.images
        bits = self.options.bits or (1 if images.shape[1] == 1 else 5)
        return view.with_images(quantised(images, bits))


@final
class PixelClip(Sanitiser):
    """The received set's pixels, clipped to [0, 1].

    In words: distilled pixels may lie anywhere, a camera's do not. Clip them, and train on that.

    Needs a set that leaves [0, 1]; one that doesn't stays as it is. No paper: a baseline. It has
    no options, so there is nothing to tune.
    """

    name = "pixel-clip"
    Options = DefenseOptions
    needs = "a set whose pixels leave [0, 1]"

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def caution(self, view: DefenderView) -> str | None:
        low, high = view.distilled.batch.images.aminmax()
        inside = float(low) >= 0 and float(high) <= 1
        return "no pixel leaves [0, 1]: the set stays as it is" if inside else None

    def sanitise(self, view: DefenderView) -> DistilledSet:
        return view.with_images(view.distilled.batch.images.clamp(0, 1))


def quantised(images: Tensor, bits: int) -> Tensor:
    """``images`` clipped to [0, 1] and rounded to 2^``bits`` levels."""
    levels = 2**bits - 1
    squeezed: Tensor = (images.clamp(0, 1) * levels).round() / levels
    return squeezed
