"""A U-Net: images to images of the same size."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...distill.randomness import seeded_weights

_WIDEST = 512


@final
class UNet(nn.Module):
    """A U-Net (Ronneberger, Fischer, Brox, MICCAI 2015), as BTI-DBF's official code builds it.

    channels: of the images. width: of the first level, doubled on each further one up to 512.
    levels: how many there are above the lowest; each halves the sides. Two convolutions a level,
    each with an instance norm and a leaky ReLU; transposed convolutions on the way up; a 1×1
    convolution without activation at the end, so that values have no bounds.

    Odd sides are halved upwards and cut on the way up (the official code takes multiples of
    ``2 ** levels`` only).
    """

    def __init__(self, channels: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [min(width * 2**level, _WIDEST) for level in range(levels)]
        lowest = 2 * widths[-1]
        self.down = nn.ModuleList(
            _double(before, after)
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.bottom = _double(widths[-1], lowest)
        above = [lowest, *widths[:0:-1]]
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(before, before, 3, stride=2, padding=1, output_padding=1)
            for before in above
        )
        self.up = nn.ModuleList(
            _double(before + side, side) for before, side in zip(above, widths[::-1], strict=True)
        )
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        sides: list[Tensor] = []
        values = images
        for block in self.down:
            sides.append(block(values))
            values = functional.max_pool2d(sides[-1], 2, ceil_mode=True)
        values = self.bottom(values)
        for grow, block, side in zip(self.grow, self.up, sides[::-1], strict=True):
            height, width = side.shape[-2:]
            large = functional.leaky_relu(grow(values))[..., :height, :width]
            values = block(torch.cat([large, side], dim=1))
        return cast(Tensor, self.last(values))


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            nn.Conv2d(channels, after, 3, padding=1),
            nn.InstanceNorm2d(after, affine=True),
            nn.LeakyReLU(),
        ]
    return nn.Sequential(*layers)


def fitting_levels(side: int, most: int) -> int:
    """How many levels, ``most`` at most, leave the lowest one of an image of ``side`` pixels at
    least two pixels wide: an instance norm has nothing to measure on one. At least 1."""
    levels = 1
    while levels < most and -(-side // 2 ** (levels + 1)) >= 2:
        levels += 1
    return levels


def seeded_unet(channels: int, width: int, levels: int, generator: torch.Generator) -> UNet:
    """A U-Net whose weights depend on ``generator`` (CPU) alone."""
    with seeded_weights(int(torch.randint(2**31 - 1, (), generator=generator))):
        return UNet(channels, width, levels)
