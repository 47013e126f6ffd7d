"""The defense ``shrinkpad``."""

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

    share: float = Field(
        0.125, gt=0, lt=1, description="share of the side that is removed (4 of 32)"
    )


@final
class ShrinkPad(Purifier):
    """ShrinkPad: a trigger at another place and size has less effect (Li, Zhai, Jiang, Li, Xia,
    "Backdoor Attack in the Physical World", ICLR 2021 workshop on Security and Safety in Machine
    Learning Systems).

    In words: shrink the input by an eighth of its side (bilinear, without antialiasing, as the
    authors' BackdoorBox does to tensors), put it at a random place in a black frame of the old
    size, and predict.

    Needs only the model. It works against triggers that depend on their place and size.

    Deviations: the paper's 4 pixels of 32 are a share of the side, for small images. An image's
    place is computed from its pixels and a secret, so that it does not depend on the other images.
    """

    name = "shrinkpad"
    Options = ShrinkPadOptions
    options: ShrinkPadOptions
    needs = "only the model"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"share": 0.03125},
        {"share": 0.0625},
        {},
        {"share": 0.1875},
        {"share": 0.25},
    )

    def purify(self, view: DefenderView) -> Predictor:
        secret = view.generator(self.name).initial_seed()

        def predictor(images: Tensor) -> Tensor:
            less = shrinkage(images, self.options.share)
            return predict(view.victim, shrink_and_pad(images, less, places(images, less, secret)))

        return predictor


Pair = tuple[int, int]


def shrinkage(images: Tensor, share: float) -> Pair:
    """The number of pixels to remove from height and width: ``share`` of each, at least one."""
    height, width = (min(side - 1, max(1, round(share * side))) for side in images.shape[2:])
    return height, width


def places(images: Tensor, less: Pair, secret: int) -> list[Pair]:
    """A random place for each image: its distance from the top and the left, at most ``less``."""
    return [
        (number % (less[0] + 1), number // (less[0] + 1) % (less[1] + 1))
        for number in fingerprints(images, secret)
    ]


def fingerprints(images: Tensor, secret: int) -> list[int]:
    """A random number below 2⁶⁴ for each image, computed from its pixels and ``secret`` alone."""
    key = str(secret).encode()
    found = []
    for image in images.detach().cpu().numpy():
        content = hashlib.blake2b(image.tobytes(), key=key, digest_size=8).digest()
        found.append(int.from_bytes(content, "big"))
    return found


def shrink_and_pad(images: Tensor, less: Pair, where: Sequence[Pair]) -> Tensor:
    """``images`` (N, C, H, W) smaller by ``less`` pixels, each at its place in a black frame of the
    old size."""
    height, width = (side - pixels for side, pixels in zip(images.shape[2:], less, strict=True))
    small = interpolate(images, (height, width), mode="bilinear", align_corners=False)
    framed = torch.zeros_like(images)
    for top, left in sorted(set(where)):
        rows = [row for row, place in enumerate(where) if place == (top, left)]
        chosen = torch.tensor(rows, device=images.device)
        framed[chosen, :, top : top + height, left : left + width] = small[chosen]
    return framed
