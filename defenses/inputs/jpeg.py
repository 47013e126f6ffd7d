"""The defense ``jpeg``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from pydantic import Field

from ...distill.training import predict
from ..base import DefenderView, DefenseOptions, Predictor, Purifier
from ..common.codec import through_jpeg


@final
class JpegOptions(DefenseOptions):
    """The usual quality."""

    quality: int = Field(75, ge=1, le=100, description="JPEG quality")


@final
class Jpeg(Purifier):
    """JPEG compression of inputs (Das et al., "Compression to the Rescue: Defending from
    Adversarial Attacks Across Modalities", KDD 2018; Guo, Rana, Cissé, van der Maaten, "Countering
    Adversarial Images using Input Transformations", ICLR 2018).

    In words: save the input as JPEG of quality 75, load it, and predict.

    Needs images of one or three channels. It is made for faint perturbations; a bright patch
    survives.

    Deviations: none; the codec is a real one, and pixels outside [0, 1] are clipped first.
    """

    name = "jpeg"
    Options = JpegOptions
    options: JpegOptions
    needs = "grey or colour images"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"quality": 90},
        {},
        {"quality": 50},
        {"quality": 30},
        {"quality": 15},
        {"quality": 7},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        channels = view.distilled.image_shape[0]
        return None if channels in (1, 3) else f"JPEG has 1 or 3 channels, images have {channels}"

    def purify(self, view: DefenderView) -> Predictor:
        return lambda images: predict(view.victim, through_jpeg(images, self.options.quality))
