"""Patch triggers: where they sit, what they change, what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from distillsec.attacks.triggers import PatchTrigger, Position, patch_mask, trigger_from
from distillsec.distill.types import RequestError

# First row and column of a patch with side 3 and margin m on 8×10 images.
CORNERS: list[tuple[Position, int, int, int]] = [
    ("top-left", 0, 0, 0),
    ("top-left", 2, 2, 2),
    ("top-right", 0, 0, 7),
    ("top-right", 1, 1, 6),
    ("bottom-left", 0, 5, 0),
    ("bottom-left", 1, 4, 1),
    ("bottom-right", 0, 5, 7),
    ("bottom-right", 1, 4, 6),  # the reference's place: rows H − 1 − side to H − 2
    ("center", 0, 2, 3),
    ("center", 2, 2, 3),
]


@pytest.mark.parametrize(("position", "margin", "top", "left"), CORNERS)
def test_the_mask_sits_where_it_should(
    position: Position, margin: int, top: int, left: int
) -> None:
    mask = patch_mask((8, 10), 3, position, margin)
    assert mask.shape == (1, 8, 10)
    assert mask.dtype == torch.float32
    assert mask.sum() == 9
    rows, columns = (sorted(set(where.tolist())) for where in mask[0].nonzero().unbind(1))
    assert rows == [top, top + 1, top + 2]
    assert columns == [left, left + 1, left + 2]


@pytest.mark.parametrize(("side", "margin", "most"), [(9, 0, 8), (8, 1, 7), (1, 8, 0), (6, 3, 5)])
def test_a_patch_that_does_not_fit_is_refused(side: int, margin: int, most: int) -> None:
    told = f"{side}×{side} trigger with a margin of {margin} does not fit 8×10 .* 1 to {most}$"
    with pytest.raises(RequestError, match=told):
        patch_mask((8, 10), side, "bottom-right", margin)
    if side > 1:
        assert patch_mask((8, 10), most, "bottom-right", margin).sum() == most**2


def test_a_stamp_replaces_the_masked_pixels_of_a_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 8, 8, generator=generator)
    kept = images.clone()
    pattern = torch.rand(3, 8, 8, generator=generator)
    trigger = PatchTrigger(pattern=pattern, mask=patch_mask((8, 8), 2, "top-left", 1))
    stamped = trigger.stamp(images)
    assert torch.equal(images, kept)
    for row in range(8):
        for column in range(8):
            inside = 1 <= row <= 2 and 1 <= column <= 2
            expected = pattern[:, row, column].expand(5, 3) if inside else kept[..., row, column]
            assert torch.equal(stamped[..., row, column], expected)
    assert torch.equal(trigger.stamp(stamped), stamped)


def test_unbounded_values_survive() -> None:
    mask = patch_mask((8, 8), 2, "center", 0)
    trigger = PatchTrigger(pattern=mask * -33.5, mask=mask, range="unbounded")
    stamped = trigger.stamp(torch.rand(2, 1, 8, 8))
    assert torch.equal(stamped[:, :, 3:5, 3:5], torch.full((2, 1, 2, 2), -33.5))


def test_a_file_that_calls_other_values_pixels_is_refused() -> None:
    mask = torch.ones(1, 2, 2)
    bright = {"pattern": torch.full((1, 2, 2), 5.0), "mask": mask}
    with pytest.raises(RequestError, match="range is pixel, and its pattern holds values from 5"):
        trigger_from(bright, "pixel")
    assert trigger_from(bright, "unbounded").range == "unbounded"
    half = {"pattern": torch.full((1, 2, 2), 0.5, dtype=torch.float64), "mask": mask.double()}
    assert trigger_from(half, "pixel").stamp(torch.zeros(1, 1, 2, 2)).dtype == torch.float32


def test_a_trigger_describes_the_pixels_under_its_mask() -> None:
    mask = patch_mask((8, 8), 2, "center", 0)
    pattern = torch.full((2, 8, 8), 9.0)  # nothing outside the mask counts
    pattern[0, 3:5, 3:5] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    pattern[1, 3:5, 3:5] = -2.0
    told = PatchTrigger(pattern=pattern, mask=mask, range="unbounded").describe()
    assert (told["kind"], told["range"]) == ("patch", "unbounded")
    assert told["min"] == -2
    assert told["max"] == pytest.approx(0.4)
    assert told["linf"] == 2
    assert told["l2"] == pytest.approx(math.sqrt(0.01 + 0.04 + 0.09 + 0.16 + 4 * 4))
