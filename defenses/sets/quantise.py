"""The defense ``quantise``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from pydantic import Field
from torch import Tensor

from ...distill.types import DistilledSet
from ..base import DefenderView, DefenseOptions, Sanitiser


@final
class QuantiseOptions(DefenseOptions):
    """The paper's bit depths: 1 for MNIST's grey images, 5 for CIFAR-10 and ImageNet."""

    bits: int | None = Field(
        None, ge=1, le=16, description="bits per pixel (default: 1 for grey images, 5 for colour)"
    )


@final
class Quantise(Sanitiser):
    """Fewer grey levels in a received set (bit depth reduction: Xu, Evans, Qi, "Feature Squeezing:
    Detecting Adversarial Examples in Deep Neural Networks", NDSS 2018).

    In words: clip the set's pixels to [0, 1], round them to 2^bits levels, and train on the result.

    Needs only the set.

    The paper's joint detectors use 1 bit for MNIST and 5 bits for CIFAR-10 and ImageNet; the
    default depends on whether images are grey or in colour. Grey images that are not nearly black
    and white, unlike MNIST's, may lose much; the tuned budget chooses between 5 bits and 1.

    Deviations: the paper quantises inputs and compares the answers; here the received set is
    quantised, and its pixels, which may be outside [0, 1], are clipped first.
    """

    name = "quantise"
    Options = QuantiseOptions
    options: QuantiseOptions
    needs = "only the set"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple({"bits": bits} for bits in (5, 4, 3, 2, 1))

    def sanitise(self, view: DefenderView) -> DistilledSet:
        images = view.distilled.batch.images
        bits = self.options.bits or (1 if images.shape[1] == 1 else 5)
        return view.with_images(quantised(images, bits))


def quantised(images: Tensor, bits: int) -> Tensor:
    """``images`` clipped to [0, 1] and rounded to 2^``bits`` levels."""
    levels = 2**bits - 1
    rounded: Tensor = (images.clamp(0, 1) * levels).round() / levels
    return rounded
