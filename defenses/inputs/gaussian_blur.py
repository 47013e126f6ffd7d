"""The defense ``gaussian-blur``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from ...distill.training import predict
from ..base import DefenderView, Predictor, Purifier
from ..common.blur import BlurOptions, blurred


@final
class GaussianBlur(Purifier):
    """Gaussian blur of inputs (spatial smoothing: Xu, Evans, Qi, "Feature Squeezing: Detecting
    Adversarial Examples in Deep Neural Networks", NDSS 2018).

    In words: blur the input with a 3 × 3 Gaussian, and predict.

    Needs only the model. A patch larger than the kernel keeps its middle.

    Deviations: the paper smooths with medians and compares the answers with and without smoothing;
    here the answer to the smoothed input is the result.
    """

    name = "gaussian-blur"
    Options = BlurOptions
    options: BlurOptions
    needs = "only the model"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"sigma": 0.5},
        {},
        {"kernel": 5, "sigma": 1.0},
        {"kernel": 7, "sigma": 1.5},
        {"kernel": 9, "sigma": 2.0},
    )

    def purify(self, view: DefenderView) -> Predictor:
        return lambda images: predict(view.victim, blurred(images, self.options))
