"""Differentiable siamese augmentation (Zhao and Bilen, ICML 2021), after its published code.

Each step picks one operation. While distilling, the real and the synthetic batch go through it with
the same parameters (siamese), so that the gradient reaches the synthetic images through the very
transform that the real ones had; while training on a set, each image has its own parameters.

Operations work in normalised space, unclamped; what comes in from outside the image is zero there,
which is the data set's mean colour. Ranges and roundings are the published ones.

Deviations: the real and the synthetic batch share their parameters exactly, where the published
code reseeds for each batch and relies on generators that give the same first number for any batch
size; all numbers come from a generator that the caller names, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from .devices import moved
from .plugins import look_up
from .preprocessing import Preprocessing

Size = tuple[int, int]

_FLIP_SHARE = 0.5
_SCALE = 1.2
_DEGREES = 15.0
_SHIFT_SHARE = 0.125
_CUTOUT_SHARE = 0.5


@final
@dataclass(frozen=True)
class Operation:
    """One kind of transform; its parameters lie on the CPU, its images on any device.

    draw: rows, (H, W) and a generator to parameters ``(rows, K)``. apply: normalised images
    ``(N, C, H, W)`` and parameters, ``(N, K)`` or ``(1, K)`` for all, to images of that shape.
    """

    draw: Callable[[int, Size, torch.Generator], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Transform:
    """One operation with its parameters drawn.

    operation: a key of ``OPERATIONS``, or ``None`` for a transform that changes nothing.
    parameters: ``(1, K)`` for a transform that every image goes through, in batches of any size;
    ``(N, K)`` for one per image. space: where the operation works.
    """

    operation: str | None
    parameters: Tensor
    space: Preprocessing

    def __call__(self, pixels: Tensor) -> Tensor:
        """Transformed images, ``(N, C, H, W)`` like ``pixels``; both in pixel space, unclamped."""
        if self.operation is None:
            return pixels
        assert len(self.parameters) in (1, len(pixels)), "the transform is for another batch"
        normalised = self.space.normalise(pixels)
        return self.space.pixels(OPERATIONS[self.operation].apply(normalised, self.parameters))


@final
@dataclass(frozen=True)
class Augmentation:
    """A strategy, from which each step draws a transform. space: where its operations work."""

    strategy: tuple[str, ...]
    space: Preprocessing

    def draw(
        self, images_shape: Sequence[int], generator: torch.Generator, *, shared: bool
    ) -> Transform:
        """One operation of the strategy, each as likely, with parameters from ``generator`` (CPU).

        images_shape: (N, C, H, W). shared: one parameter set for all images of any batch of this
        height and width, else one for each of the N images.
        """
        count, _, height, width = images_shape
        if not self.strategy:
            return Transform(None, torch.empty(1, 0), self.space)
        chosen = self.strategy[int(_integers(0, len(self.strategy) - 1, 1, generator))]
        rows = 1 if shared else count
        parameters = OPERATIONS[chosen].draw(rows, (height, width), generator)
        return Transform(chosen, parameters, self.space)


def parse_strategy(text: str) -> tuple[str, ...]:
    """Operations from ``color_crop_cutout_flip_scale_rotate``; none from ``""`` and ``none``.

    ``RequestError`` for an unknown operation.
    """
    if text in ("", "none"):
        return ()
    names = tuple(text.split("_"))
    for name in names:
        look_up(name, OPERATIONS, "augmentation")
    return names


def _uniform(low: float, high: float, shape: Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _integers(low: int, high: int, rows: int, generator: torch.Generator) -> Tensor:
    """Integers from ``low`` to ``high``, both included, ``(rows, 1)``."""
    return torch.randint(low, high + 1, (rows, 1), generator=generator)


def _share_of(side: int, share: float) -> int:
    return int(side * share + 0.5)


def _draw_color(rows: int, size: Size, generator: torch.Generator) -> Tensor:
    """Brightness added; factors of saturation and of contrast."""
    brightness = _uniform(-0.5, 0.5, (rows, 1), generator)
    saturation = _uniform(0, 2, (rows, 1), generator)
    contrast = _uniform(0.5, 1.5, (rows, 1), generator)
    return torch.cat([brightness, saturation, contrast], dim=1)


def _color(images: Tensor, parameters: Tensor) -> Tensor:
    """Brightness, then saturation about each pixel's grey, then contrast about the image's mean."""
    own = moved(parameters, images.device).to(images.dtype)
    brightness, saturation, contrast = own[:, :, None, None, None].unbind(1)
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * saturation + grey
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * contrast + level


def _draw_crop(rows: int, size: Size, generator: torch.Generator) -> Tensor:
    """How far the window moves down and to the right."""
    most = [_share_of(side, _SHIFT_SHARE) for side in size]
    return torch.cat([_integers(-shift, shift, rows, generator) for shift in most], dim=1)


def _crop(images: Tensor, parameters: Tensor) -> Tensor:
    """Pad with zeros, then look through a window of the image's size that has moved."""
    channels, height, width = images.shape[1:]
    down, right = (_share_of(side, _SHIFT_SHARE) for side in (height, width))
    padded = functional.pad(images, (right, right, down, down))
    if len(parameters) == 1:
        top, left = (int(shift) for shift in (parameters[0] + torch.tensor([down, right])))
        return padded[:, :, top : top + height, left : left + width]
    shifts = moved(parameters, images.device)
    rows = torch.arange(down, down + height, device=images.device) + shifts[:, :1]
    columns = torch.arange(right, right + width, device=images.device) + shifts[:, 1:]
    rows = rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3])
    columns = columns[:, None, None, :].expand(-1, channels, height, -1)
    return padded.gather(2, rows).gather(3, columns)


def _draw_cutout(rows: int, size: Size, generator: torch.Generator) -> Tensor:
    """The row and column that the square is centred on (with an even side, the one after)."""
    # An even square may be centred just past the last pixel, so that either border cuts it alike.
    last = [side - _share_of(side, _CUTOUT_SHARE) % 2 for side in size]
    return torch.cat([_integers(0, most, rows, generator) for most in last], dim=1)


def _cutout(images: Tensor, parameters: Tensor) -> Tensor:
    """Zero a square of half the image's sides; what lies beyond the border is lost."""
    centres = moved(parameters, images.device)
    inside = []
    for axis, side in enumerate(images.shape[2:]):
        length = _share_of(side, _CUTOUT_SHARE)
        place = torch.arange(side, device=images.device) - (
            centres[:, axis : axis + 1] - length // 2
        )
        inside.append((place >= 0) & (place < length))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images * ~square


def _draw_flip(rows: int, size: Size, generator: torch.Generator) -> Tensor:
    """Whether to flip."""
    return torch.rand((rows, 1), generator=generator) < _FLIP_SHARE


def _flip(images: Tensor, parameters: Tensor) -> Tensor:
    """Mirror left and right."""
    flips = moved(parameters, images.device)
    return torch.where(flips[:, :, None, None], images.flip(3), images)


def _draw_scale(rows: int, size: Size, generator: torch.Generator) -> Tensor:
    """Horizontal and vertical factor of the sampling grid; above 1 the image shrinks."""
    return _uniform(1 / _SCALE, _SCALE, (rows, 2), generator)


def _scale(images: Tensor, parameters: Tensor) -> Tensor:
    zero = torch.zeros(len(parameters))
    across, down = parameters.unbind(1)
    return _resample(images, torch.stack([across, zero, zero, down], dim=1))


def _draw_rotate(rows: int, size: Size, generator: torch.Generator) -> Tensor:
    """The angle in radians."""
    most = math.radians(_DEGREES)
    return _uniform(-most, most, (rows, 1), generator)


def _rotate(images: Tensor, parameters: Tensor) -> Tensor:
    sine, cosine = parameters[:, 0].sin(), parameters[:, 0].cos()
    return _resample(images, torch.stack([cosine, -sine, sine, cosine], dim=1))


def _resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear samples at linearly mapped points: coordinates from -1 to 1, zero outside."""
    maps = functional.pad(matrices.view(-1, 2, 2), (0, 1))
    maps = moved(maps, images.device).to(images.dtype)
    grid = functional.affine_grid(maps, [len(maps), *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


OPERATIONS: dict[str, Operation] = {
    "color": Operation(_draw_color, _color),
    "crop": Operation(_draw_crop, _crop),
    "cutout": Operation(_draw_cutout, _cutout),
    "flip": Operation(_draw_flip, _flip),
    "scale": Operation(_draw_scale, _scale),
    "rotate": Operation(_draw_rotate, _rotate),
}
