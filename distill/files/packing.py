"""Packed sets: each stored image is a square of smaller ones (IDC, NCFM).

Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization" (ICML 2022);
``decode_zoom`` in ``snu-mllab/Efficient-Dataset-Condensation``, test.py at 086273c, and in
``gszfwsb/NCFM``, condenser/decode.py at 34a81d7.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

FACTORS: Final = (2, 3, 4)
"""The factors that are looked for; IDC and NCFM publish 2, and 3 for ImageNet."""

_FILL: Final = 0.5


def unpack(images: Tensor, factor: int) -> Tensor:
    """The ``factor²`` smaller images in each of ``images`` ``(N, C, S, S)`` at the full size.

    Returns ``(factor² · N, C, S, S)``: first all that lie in the upper left, then row by row.
    Where ``factor`` does not divide S, images are padded with 0.5, the pixel value, as published.
    """
    side = images.shape[-1]
    rest = -side % factor
    padded = functional.pad(images, (0, rest, 0, rest), value=_FILL)
    tile = -(-side // factor)
    tiles = [
        padded[:, :, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        for row in range(factor)
        for column in range(factor)
    ]
    return functional.interpolate(torch.cat(tiles), size=(side, side), mode="bilinear")


def unpack_labels(labels: Tensor, factor: int) -> Tensor:
    """Labels ``(N,)`` or ``(N, classes)`` for the images of ``unpack``."""
    return torch.cat([labels] * factor**2)


def pack_means(means: Tensor, factor: int) -> Tensor:
    """What the mean images ``(classes, C, S, S)`` of packed sets look like: reduced and tiled."""
    side = means.shape[-1]
    tile = -(-side // factor)
    small = functional.interpolate(means, size=(tile, tile), mode="bilinear", antialias=True)
    return small.repeat(1, 1, factor, factor)[..., :side, :side]


def likeness(images: Tensor, labels: Tensor, real: Tensor, factor: int) -> float:
    """How much the set's mean image of each class resembles the data's, packed by ``factor``.

    images, labels: of the set ``(N, C, S, S)``, ``int64 (N,)``; values in any affine space. real:
    the mean image of each class of the data. Returns the correlation over all pixels of all classes
    that the set has, −1 to 1.
    """
    present = labels.unique()
    means = torch.stack([images[labels == label].mean(dim=0) for label in present])
    pair = torch.stack([means.flatten(), pack_means(real[present], factor).flatten()])
    return float(torch.corrcoef(pair)[0, 1].nan_to_num())
