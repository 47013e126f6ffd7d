"""Packed sets against the published decoding, and what says that a set is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillsec.distill.files.packing import likeness, pack_means, unpack, unpack_labels


def published(images: torch.Tensor, factor: int) -> torch.Tensor:
    """IDC's cutting and enlarging, written down tile by tile."""
    side = images.shape[-1]
    if side % factor:
        rest = factor - side % factor
        images = nn.functional.pad(images, (0, rest, 0, rest), value=0.5)
    tile = images.shape[-1] // factor
    found = []
    for row in range(factor):
        for column in range(factor):
            place = (slice(row * tile, (row + 1) * tile), slice(column * tile, (column + 1) * tile))
            found.append(images[:, :, place[0], place[1]])
    enlarged: torch.Tensor = nn.Upsample(size=side, mode="bilinear")(torch.cat(found))
    return enlarged


@pytest.mark.parametrize(("side", "factor"), [(8, 2), (9, 3), (8, 3), (32, 2), (7, 4)])
def test_images_are_cut_as_published(side: int, factor: int) -> None:
    images = torch.rand(3, 2, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(images, factor), published(images, factor))


def test_labels_follow_their_images() -> None:
    values = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    labels = unpack_labels(torch.arange(3), 2)
    assert torch.equal(unpack(values, 2)[:, 0, 0, 0].long(), labels)
    assert unpack_labels(torch.eye(3), 2).shape == (12, 3)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("scale", [1.0, -4.0])
def test_a_packed_set_resembles_packed_means(factor: int, scale: float) -> None:
    """In any affine space; a sign counts too: it is what tells a set from its negative."""
    rng = torch.Generator().manual_seed(0)
    real = torch.nn.functional.interpolate(torch.rand(4, 1, 3, 3, generator=rng), size=(12, 12))
    labels = torch.arange(20) % 4
    noise = 0.1 * torch.randn(20, 1, 12, 12, generator=rng)
    packed, plain = pack_means(real, factor)[labels] + noise, real[labels] + noise
    sign = 1 if scale > 0 else -1
    assert sign * likeness(packed * scale + 7, labels, real, factor) > 0.9
    assert sign * likeness(plain * scale + 7, labels, real, 1) > 0.9
    assert abs(likeness(packed, labels, real, 1)) < 0.6
    assert abs(likeness(plain, labels, real, factor)) < 0.6
    assert likeness(torch.zeros(20, 1, 12, 12), labels, real, factor) == 0
