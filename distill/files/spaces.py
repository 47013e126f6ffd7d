"""The spaces in which published sets store pixels, and what their values say about which it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from ..preprocessing import Preprocessing

ROUNDING: Final = 1 / 510
"""How far pixels may leave [0, 1] by rounding: half a step of 8 bits."""

FARTHEST_MEAN: Final = 1.0
"""How far the average of all pixels may lie outside [0, 1]."""

_WIDEST_SPREAD: Final = 20.0
"""How far the deviation of the pixels may be from the data's, as a ratio."""

_STEP_TOLERANCE: Final = 0.1
"""How far values may lie from whole steps of 8 bits, in steps: half precision needs some."""

_LEAST_NEGATIVE: Final = -0.2
"""The least value of images in [-1, 1]: without darker pixels they are not centred at 0."""


@final
@dataclass(frozen=True, kw_only=True)
class Space:
    """One meaning of stored values.

    description: for people. to_pixels: stored values ``float32 (N, C, H, W)`` to pixels, given what
    networks do with pixels first. whitened: whether that is a whitening.
    """

    description: str
    to_pixels: Callable[[Tensor, Preprocessing], Tensor]
    whitened: bool = False


SPACES: Final[Mapping[str, Space]] = {
    "pixels": Space(description="pixels in [0, 1]", to_pixels=lambda values, _: values),
    "uint8": Space(description="pixels from 0 to 255", to_pixels=lambda values, _: values / 255),
    "symmetric": Space(
        description="pixels scaled to [-1, 1]", to_pixels=lambda values, _: (values + 1) / 2
    ),
    "normalised": Space(
        description="pixels less the data's mean, by its deviation",
        to_pixels=lambda values, space: space.pixels(values),
    ),
    "zca": Space(
        description="pixels whitened as the data is",
        to_pixels=lambda values, space: space.pixels(values),
        whitened=True,
    ),
}


@final
@dataclass(frozen=True, kw_only=True)
class PixelEvidence:
    """What the pixels of a set would be under one reading.

    low, high: their range. outside: the share outside [0, 1]. shift: how far their mean lies from
    the data's, in the data's deviations, over channels. spread: their deviation, as a multiple of
    the data's. smoothness: the correlation of neighbouring pixels, −1 to 1; whitening lowers it.
    impossible: why they cannot have been stored so; empty where they can.
    """

    low: float
    high: float
    outside: float
    shift: float
    spread: float
    smoothness: float
    impossible: str = ""


def certain_space(values: Tensor) -> tuple[str, str] | None:
    """The only space that ``values`` as stored can be in, and why; ``None`` where several can.

    Values of 8 bits, and values that are nowhere negative, were neither normalised nor whitened.
    """
    if values.dtype == torch.uint8:
        return "uint8", "8-bit values"
    low, high = (float(each) for each in torch.aminmax(values))
    whole = torch.equal(values, values.round())
    if whole and low >= 0 and 2 < high <= 255:
        return "uint8", f"whole numbers from {low:g} to {high:g}"
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        steps = values * 255
        if bool(((steps - steps.round()).abs() < _STEP_TOLERANCE).all()):
            return "pixels", "values in [0, 1] in steps of 1/255"
        return "pixels", f"values from {low:.3g} to {high:.3g}, none negative"
    if low >= -ROUNDING and high <= 255 and float(values.mean()) > 2:
        return (
            "uint8",
            f"values from {low:.3g} to {high:.3g}, {float(values.mean()):.3g} on average",
        )
    return None


def smoothness(images: Tensor) -> float:
    """The correlation of horizontal and vertical neighbours in ``(N, C, H, W)``, −1 to 1.

    Values are taken less the mean of their channel; 0 for images without any contrast.
    """
    centred = images - images.mean(dim=(0, 2, 3), keepdim=True)
    across = (centred[..., 1:] * centred[..., :-1]).mean()
    down = (centred[..., 1:, :] * centred[..., :-1, :]).mean()
    return float(((across + down) / 2 / centred.square().mean()).nan_to_num())


def pixel_evidence(name: str, values: Tensor, pixels: Tensor, data: Preprocessing) -> PixelEvidence:
    """What ``pixels``, the ``values`` read in space ``name``, say beside the data's statistics.

    data: the mean and deviation of the data's pixels, per channel.
    """
    low, high = (float(each) for each in torch.aminmax(pixels))
    mean, deviation = (pixels.new_tensor(each) for each in (data.mean, data.std))
    own_deviation, own_mean = torch.std_mean(pixels, dim=(0, 2, 3), correction=0)
    average, spread = float(pixels.mean()), float((own_deviation / deviation).mean())
    least, most = (float(each) for each in torch.aminmax(values))
    impossible = ""
    if not -FARTHEST_MEAN <= average <= 1 + FARTHEST_MEAN:
        impossible = f"pixels would be {average:.3g} on average"
    elif not 1 / _WIDEST_SPREAD <= spread <= _WIDEST_SPREAD:
        impossible = f"pixels would vary {spread:.2g} times as much as the data's"
    elif name == "symmetric" and not (least >= -1 - ROUNDING and most <= 1 + ROUNDING):
        impossible = f"values run from {least:.3g} to {most:.3g}"
    elif name == "symmetric" and least > _LEAST_NEGATIVE:
        impossible = f"no value is below {least:.3g}"
    return PixelEvidence(
        low=low,
        high=high,
        outside=float(((pixels < -ROUNDING) | (pixels > 1 + ROUNDING)).float().mean()),
        shift=float(((own_mean - mean).abs() / deviation).mean()),
        spread=spread,
        smoothness=smoothness(pixels),
        impossible=impossible,
    )
