"""Gaussian blur, for the defenses that blur inputs and sets."""

from __future__ import annotations

from pydantic import Field, field_validator
from torch import Tensor

from ..base import DefenseOptions


class BlurOptions(DefenseOptions):
    """A 3 × 3 kernel, the smallest there is."""

    kernel: int = Field(3, ge=3, description="side of the kernel in pixels, odd")
    sigma: float = Field(1.0, gt=0, description="standard deviation of the Gaussian in pixels")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("the kernel's side must be odd")
        return value


def blurred(images: Tensor, options: BlurOptions) -> Tensor:
    """``images`` (N, C, H, W) after the blur; the kernel is no larger than the image."""
    from kornia.filters import gaussian_blur2d

    side = min(options.kernel, *images.shape[2:])
    side -= 1 - side % 2
    return gaussian_blur2d(images, side, (options.sigma, options.sigma), border_type="replicate")
