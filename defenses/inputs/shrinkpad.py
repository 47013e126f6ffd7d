"""ShrinkPad: a trigger that is smaller, and elsewhere, is no trigger."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from ...distill.training import predict
from ..base import DefenderView, DefenseOptions, Predictor, Purifier


@final
class ShrinkPadOptions(DefenseOptions):
    """The paper's 4 pixels of 32."""

    share: float = Field(0.125, gt=0, lt=1, description="share of the side that goes (4 of 32)")


@final
class ShrinkPad(Purifier):
    """ShrinkPad (Li, Zhai, Jiang, Li, Xia, "Backdoor Attack in the Physical World", ICLR 2021
    workshop on Security and Safety in Machine Learning Systems).

    In words: shrink the input by an eighth of its side (bilinear, without antialiasing, as the
    authors' BackdoorBox does to tensors), put it at a random place in a black frame of the old
    size, and predict.

    Needs nothing but the model; works against triggers that are tied to a place and a size.

    Deviations: the paper's 4 pixels of 32 are a share of the side, so that small images keep
    something; an image's place comes from its pixels and a secret, so that it doesn't depend on
    the other images.
    """

    name = "shrinkpad"
    Options = ShrinkPadOptions
    needs = "nothing but the model"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"share": 0.03125},
        {"share": 0.0625},
        {},
        {"share": 0.1875},
        {"share": 0.25},
    )

    def __init__(self, options: ShrinkPadOptions) -> None:
        self.options: ShrinkPadOptions = options

    def purify(self, view: DefenderView) -> Predictor:
        secret = view.generator(self.name).initial_seed()

        def predictor(images: Tensor) -> Tensor:
            gone = shrinkage(images, self.options.share)
            return predict(view.victim, shrink_and_pad(images, gone, places(images, gone, secret)))

        return predictor


Pair = tuple[int, int]


def shrinkage(images: Tensor, share: float) -> Pair:
    """How many pixels of height and width go: ``share`` of each, at least one."""
    height, width = (min(side - 1, max(1, round(share * side))) for side in images.shape[2:])
    return height, width


def places(images: Tensor, gone: Pair, secret: int) -> list[Pair]:
    """For each image, how far down and right it is put, at random in what is ``gone``."""
    return [
        (number % (gone[0] + 1), number // (gone[0] + 1) % (gone[1] + 1))
        for number in fingerprints(images, secret)
    ]


def fingerprints(images: Tensor, secret: int) -> list[int]:
    """A random number below 2⁶⁴ for each image, which only its pixels and ``secret`` decide."""
    key = str(secret).encode()
    found = []
    for image in images.detach().cpu().numpy():
        content = hashlib.blake2b(image.tobytes(), key=key, digest_size=8).digest()
        found.append(int.from_bytes(content, "big"))
    return found


def shrink_and_pad(images: Tensor, gone: Pair, where: Sequence[Pair]) -> Tensor:
    """``images`` (N, C, H, W) smaller by ``gone`` pixels, each at its place in a black frame of the
    old size."""
    height, width = (side - less for side, less in zip(images.shape[2:], gone, strict=True))
    small = interpolate(images, (height, width), mode="bilinear", align_corners=False)
    framed = torch.zeros_like(images)
    for top, left in sorted(set(where)):
        rows = [row for row, place in enumerate(where) if place == (top, left)]
        chosen = torch.tensor(rows, device=images.device)
        framed[chosen, :, top : top + height, left : left + width] = small[chosen]
    return framed
