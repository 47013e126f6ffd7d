"""A small U-Net: images to images of the same size."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distill.randomness import seeded_weights


@final
class UNet(nn.Module):
    """A U-Net (Ronneberger, Fischer, Brox, MICCAI 2015) for small images.

    channels: of the images. width: of the first level, doubled on each of ``levels`` further ones.
    Group norm in place of batch norm, so that an image is changed by itself; the output passes a
    sigmoid into [0, 1].
    """

    def __init__(self, channels: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            _double(before, after)
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _double(below + here, here)
            for below, here in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape, in [0, 1]."""
        sides: list[Tensor] = []
        values = images
        for number, block in enumerate(self.down):
            if number:
                values = functional.max_pool2d(values, 2, ceil_mode=True)
            values = block(values)
            sides.append(values)
        for block, side in zip(self.up, sides[-2::-1], strict=True):
            large = functional.interpolate(values, size=side.shape[-2:])
            values = block(torch.cat([large, side], dim=1))
        return cast(Tensor, self.last(values).sigmoid())


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            nn.Conv2d(channels, after, 3, padding=1),
            nn.GroupNorm(min(4, after), after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def seeded_unet(channels: int, width: int, levels: int, generator: torch.Generator) -> UNet:
    """A U-Net whose weights depend on ``generator`` (CPU) alone."""
    with seeded_weights(int(torch.randint(2**31 - 1, (), generator=generator))):
        return UNet(channels, width, levels)
