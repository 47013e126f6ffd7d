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

    channels: of the images. width: channels of the first level, doubled at each further one up to
    512. levels: their number above the lowest; each halves the sides. A level has two convolutions,
    each with an instance norm and a leaky ReLU, and a transposed convolution on the way up. A 1×1
    convolution without activation ends the network, so the output is unbounded.

    Odd sides are rounded up when halved and cropped on the way up (the official code accepts only
    multiples of ``2 ** levels``).
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
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(before, before, 3, stride=2, padding=1, output_padding=1)
            for before in above
        )
        self.up = nn.ModuleList(
            _double(before + after, after)
            for before, after in zip(above, widths[::-1], strict=True)
        )
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        skips: list[Tensor] = []
        values = images
        for block in self.down:
            skips.append(block(values))
            values = functional.max_pool2d(skips[-1], 2, ceil_mode=True)
        values = self.bottom(values)
        for enlarge, block, skipped in zip(self.enlarge, self.up, skips[::-1], strict=True):
            height, width = skipped.shape[-2:]
            large = functional.leaky_relu(enlarge(values))[..., :height, :width]
            values = block(torch.cat([large, skipped], dim=1))
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
    """The number of levels, from 1 to ``most``, that leaves two pixels at the lowest level of an
    image of ``side`` pixels: an instance norm cannot normalise a single one."""
    levels = 1
    while levels < most and -(-side // 2 ** (levels + 1)) >= 2:
        levels += 1
    return levels


def seeded_unet(channels: int, width: int, levels: int, generator: torch.Generator) -> UNet:
    """A U-Net with weights drawn from ``generator`` (CPU) alone."""
    with seeded_weights(int(torch.randint(2**31 - 1, (), generator=generator))):
        return UNet(channels, width, levels)
