"""ShrinkPad: a trigger that is smaller, and elsewhere, is no trigger."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..distill.training import predict
from .base import DefenderView, DefenseOptions, Predictor, Purifier


@final
class ShrinkPadOptions(DefenseOptions):
    """The paper's 4 pixels of 32."""

    share: float = Field(0.125, gt=0, lt=1, description="share of the side that goes (4 of 32)")


@final
class ShrinkPad(Purifier):
    """ShrinkPad (Li, Zhai, Jiang, Li, Xia, "Backdoor Attack in the Physical World", ICLR 2021
    workshop on Security and Safety in Machine Learning Systems).

    In words: shrink the input by an eighth of its side (bilinear), put it at a random place in a
    black frame of the old size, and predict.

    Needs nothing but the model; works against triggers that are tied to a place and a size.

    Deviations: the paper's 4 pixels are a share of the side, so that small images keep something;
    the place is drawn once, not for every image, so that an answer doesn't depend on its company.
    """

    name = "shrinkpad"
    Options = ShrinkPadOptions
    needs = "nothing but the model"

    def __init__(self, options: ShrinkPadOptions) -> None:
        self.options: ShrinkPadOptions = options

    def purify(self, view: DefenderView) -> Predictor:
        place = tuple(torch.rand(2, generator=view.generator(0)).tolist())

        def predictor(images: Tensor) -> Tensor:
            return predict(view.victim, shrink_and_pad(images, self.options.share, place))

        return predictor


def shrink_and_pad(images: Tensor, share: float, place: tuple[float, ...]) -> Tensor:
    """``images`` (N, C, H, W) smaller by ``share`` (a pixel at least) in a black frame of the old
    size; ``place``: how far down and right of what there is room for, 0 to 1."""
    height, width = images.shape[2:]
    gone = [max(1, round(share * side)) for side in (height, width)]
    small = interpolate(
        images, (height - gone[0], width - gone[1]), mode="bilinear", align_corners=False
    )
    top, left = (round(part * room) for part, room in zip(place, gone, strict=True))
    return pad(small, (left, gone[1] - left, top, gone[0] - top))
