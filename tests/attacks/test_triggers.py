"""Triggers of every kind: what they change, what they promise, their files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillsec.attacks.triggers import (
    TRIGGERS,
    AdditiveTrigger,
    BlendTrigger,
    GeneratorTrigger,
    PatchTrigger,
    Position,
    Trigger,
    WarpTrigger,
    identity_grid,
    patch_mask,
    trigger_from,
)
from distillsec.attacks.triggers.generator import fresh_weights
from distillsec.distill.files.artifact import load_trigger, save_trigger
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
    message = f"{side}×{side} trigger with a margin of {margin} does not fit 8×10 .* 1 to {most}$"
    with pytest.raises(RequestError, match=message):
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
    with pytest.raises(RequestError, match=r"pattern \(its range is pixel\) holds values from 5"):
        trigger_from({"kind": "patch", "range": "pixel"}, bright)
    found = trigger_from({"kind": "patch", "range": "unbounded"}, bright)
    assert found.range == "unbounded"
    assert found.labels == ["unbounded trigger: no camera or file can carry it"]
    half = {"pattern": torch.full((1, 2, 2), 0.5), "mask": mask}
    small = trigger_from({"kind": "patch", "range": "pixel"}, half)
    assert small.stamp(torch.zeros(1, 1, 2, 2)).dtype == torch.float32
    assert small.labels == []
    faint = {**half, "mask": mask / 2}
    with pytest.raises(RequestError, match="mask of a patch holds 0 and 1 only"):
        trigger_from({"kind": "patch", "range": "pixel"}, faint)
    assert isinstance(trigger_from({"kind": "blend", "range": "pixel"}, faint), BlendTrigger)


def test_a_trigger_describes_the_pixels_under_its_mask() -> None:
    mask = patch_mask((8, 8), 2, "center", 0)
    pattern = torch.full((2, 8, 8), 9.0)  # nothing outside the mask counts
    pattern[0, 3:5, 3:5] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    pattern[1, 3:5, 3:5] = -2.0
    said = PatchTrigger(pattern=pattern, mask=mask, range="unbounded").describe()
    assert (said["kind"], said["range"]) == ("patch", "unbounded")
    assert said["min"] == -2
    assert said["max"] == pytest.approx(0.4)
    assert said["linf"] == 2
    assert said["l2"] == pytest.approx(math.sqrt(0.01 + 0.04 + 0.09 + 0.16 + 4 * 4))


def examples(shape: tuple[int, int, int]) -> dict[str, Trigger]:
    """One trigger of each kind."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return {
        "patch": PatchTrigger(pattern=values, mask=patch_mask(shape[1:], 2, "center", 0)),
        "blend": BlendTrigger.uniform(values, opacity=0.3),
        "additive": AdditiveTrigger.bounded(values - 0.5, norm="l2", bound=1.0),
        "warp": WarpTrigger(grid=identity_grid(shape[1:]) * 0.8),
        "generator": GeneratorTrigger(
            weights=fresh_weights(shape[0], 4, torch.Generator().manual_seed(5)),
            epsilon=torch.full((shape[0], 1, 1), 0.2),
            example=values,
        ),
    }


def test_every_kind_has_an_example() -> None:
    assert examples((1, 8, 8)).keys() == TRIGGERS.keys()
    assert all(trigger.kind == kind for kind, trigger in examples((1, 8, 8)).items())


@pytest.mark.parametrize("kind", TRIGGERS)
def test_a_trigger_of_any_kind(kind: str, tmp_path: Path) -> None:
    """New images in [0, 1], a file that gives the same stamp, a description, a picture."""
    trigger = examples((3, 8, 8))[kind]
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    kept = images.clone()
    stamped = trigger.stamp(images)
    assert torch.equal(images, kept) and not torch.equal(stamped, images)
    assert stamped.min() >= 0 and stamped.max() <= 1
    path, said = tmp_path / "t.safetensors", trigger.describe()
    assert {"kind", "range", "min", "max", "l2", "linf"} <= said.keys()
    save_trigger(path, trigger.tensors(), {**said, "target": 0})
    tensors, info = load_trigger(path)
    again = trigger_from(info, tensors)
    assert type(again) is type(trigger) and again.describe() == said
    assert torch.equal(again.stamp(images), stamped)
    assert trigger.fits((3, 8, 8)) and not trigger.fits((3, 8, 9))
    assert trigger.fits((1, 8, 8)) == (kind == "warp")
    picture = trigger.picture()
    assert picture.image.shape == ((1, 8, 8) if kind == "warp" else (3, 8, 8))
    assert picture.image.min() >= 0 and picture.image.max() <= 1
    assert picture.caption.startswith("values ") and picture.labels == []
    assert picture.region == ((3, 3, 2, 2) if kind == "patch" else None)
    with pytest.raises(RequestError, match="the trigger lacks its "):
        trigger_from(info, {})


def test_an_additive_trigger_is_bounded_and_clamps_the_sum() -> None:
    given = torch.tensor([[[3.0, -4.0], [0.0, 0.5]]])
    linf = AdditiveTrigger.bounded(given, norm="linf", bound=0.5)
    assert linf.perturbation.flatten().tolist() == [0.5, -0.5, 0.0, 0.5]
    l2 = AdditiveTrigger.bounded(given[..., :1, :], norm="l2", bound=1.0)
    assert l2.perturbation.flatten().tolist() == pytest.approx([0.6, -0.8])
    inside = AdditiveTrigger.bounded(given / 100, norm="l2", bound=1.0)
    assert torch.equal(inside.perturbation, given / 100)
    images = torch.tensor([0.2, 0.2, 0.2, 0.2]).view(1, 1, 2, 2)
    assert linf.stamp(images).flatten().tolist() == pytest.approx([0.7, 0.0, 0.2, 0.7])
    free = AdditiveTrigger.bounded(given, norm="linf", bound=0.5, range="unbounded")
    assert free.stamp(images).flatten().tolist() == pytest.approx([0.7, -0.3, 0.2, 0.7])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "one bound, linf_bound or l2_bound"),
        ({"linf_bound": torch.tensor(1.0), "l2_bound": torch.tensor(1.0)}, "one bound, linf_bound"),
        ({"linf_bound": torch.ones(2)}, "one bound, linf_bound"),
        ({"linf_bound": torch.tensor(0.1)}, "linf norm is 0.5, its bound says at most 0.1"),
        ({"l2_bound": torch.tensor(0.9)}, "l2 norm is 1, its bound says at most 0.9"),
    ],
)
def test_additive_triggers_that_break_their_bound_are_refused(
    tensors: dict[str, Tensor], message: str
) -> None:
    given = {"perturbation": torch.full((1, 2, 2), 0.5), **tensors}
    with pytest.raises(RequestError, match=message):
        trigger_from({"kind": "additive", "range": "pixel"}, given)
