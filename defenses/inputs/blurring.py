"""Gaussian blur: of inputs, and of a received set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from kornia.filters import gaussian_blur2d
from pydantic import Field, field_validator
from torch import Tensor

from ...distill.training import predict
from ...distill.types import DistilledSet
from ..base import DefenderView, DefenseOptions, Predictor, Purifier, Sanitiser


class BlurOptions(DefenseOptions):
    """A 3 × 3 kernel, the smallest there is."""

    kernel: int = Field(3, ge=3, description="odd side of the kernel in pixels")
    sigma: float = Field(1.0, gt=0, description="deviation of the Gaussian in pixels")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("the kernel's side is odd")
        return value


@final
class GaussianBlur(Purifier):
    """Gaussian blur of inputs (spatial smoothing: Xu, Evans, Qi, "Feature Squeezing: Detecting
    Adversarial Examples in Deep Neural Networks", NDSS 2018).

    In words: blur the input with a 3 × 3 Gaussian, and predict.

    Needs nothing but the model. A patch larger than the kernel keeps its middle.

    Deviations: the paper smoothes by medians and compares with the unsmoothed answer; here the
    smoothed answer is the answer.
    """

    name = "gaussian-blur"
    Options = BlurOptions
    needs = "nothing but the model"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"sigma": 0.5},
        {},
        {"kernel": 5, "sigma": 1.0},
        {"kernel": 7, "sigma": 1.5},
        {"kernel": 9, "sigma": 2.0},
    )

    def __init__(self, options: BlurOptions) -> None:
        self.options: BlurOptions = options

    def purify(self, view: DefenderView) -> Predictor:
        def predictor(images: Tensor) -> Tensor:
            return predict(view.victim, blurred(images, self.options))

        return predictor


@final
class SetBlur(Sanitiser):
    """Gaussian blur of the received set's images.

    In words: blur what was received with a 3 × 3 Gaussian and train on that. What a receiver can
    do to fine patterns, with the same kernel as ``gaussian-blur`` has for inputs.

    Needs nothing but the set. No paper: a baseline.
    """

    name = "blur"
    Options = BlurOptions
    needs = "nothing but the set"

    def __init__(self, options: BlurOptions) -> None:
        self.options: BlurOptions = options

    def sanitise(self, view: DefenderView) -> DistilledSet:
        return view.with_images(blurred(view.distilled.batch.images, self.options))


def blurred(images: Tensor, options: BlurOptions) -> Tensor:
    """``images`` (N, C, H, W) under the Gaussian; the kernel is at most what the image holds."""
    side = min(options.kernel, *images.shape[2:])
    side -= 1 - side % 2
    return gaussian_blur2d(images, side, (options.sigma, options.sigma), border_type="replicate")
