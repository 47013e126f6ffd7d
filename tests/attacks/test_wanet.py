"""WaNet: the field's formula, the warp, and its noise rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distillsec.attacks import DataInfo, WaNet, WarpTrigger, trigger_from
from distillsec.attacks.triggers import identity_grid
from distillsec.attacks.wanet import WaNetOptions, warping_grid
from distillsec.distill.core.hooks import Moment
from distillsec.distill.types import RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Moments = Callable[..., Moment]
Make = Callable[..., WaNet]


@pytest.fixture
def wanet(toy_data_info: DataInfo) -> Make:
    return lambda **options: WaNet(WaNetOptions(**options), toy_data_info)


# The field and the warp --------------------------------------------------------------------------


def cubic(distance: float) -> float:
    """Keys' kernel with a = −0.75, which torch's bicubic interpolation uses."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(control: Tensor, row: float, column: float) -> float:
    """``control`` (k, k) at a place in units of its own pixels, by the kernel's double sum."""
    k, total = len(control), 0.0
    for i in range(math.floor(row) - 1, math.floor(row) + 3):
        for j in range(math.floor(column) - 1, math.floor(column) + 3):
            value = control[min(max(i, 0), k - 1), min(max(j, 0), k - 1)].item()
            total += value * cubic(row - i) * cubic(column - j)
    return total


@pytest.mark.parametrize("rescale", [1.0, 0.9])
def test_the_grid_is_the_published_formula(rescale: float) -> None:
    """Clamp((identity + s · field / side) · rescale), the field scaled to a mean of 1."""
    control = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    found = warping_grid(control, (8, 8), strength=0.5, rescale=rescale)
    scaled = control / control.abs().mean()
    for row in range(8):
        for column in range(8):
            shift = [bicubic(scaled[axis], row * 3 / 7, column * 3 / 7) for axis in (0, 1)]
            places = (-1 + 2 * column / 7, -1 + 2 * row / 7)
            wanted = [
                min(max((place + 0.5 * move / 8) * rescale, -1), 1)
                for place, move in zip(places, shift, strict=True)
            ]
            assert found[row, column].tolist() == pytest.approx(wanted, abs=1e-5)


def test_each_axis_is_scaled_by_its_own_side() -> None:
    control = torch.ones(2, 2, 2)
    grid = warping_grid(control, (4, 10), strength=0.5, rescale=1.0)
    shift = (grid - identity_grid((4, 10)))[1, 5]
    assert shift.tolist() == pytest.approx([0.05, 0.125])


def bilinear(image: Tensor, x: float, y: float) -> float:
    """``image`` (H, W) at a place in [−1, 1], by hand."""
    height, width = image.shape
    column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    left, top = min(int(column), width - 2), min(int(row), height - 2)
    right, down = column - left, row - top
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return float(upper * (1 - down) + lower * down)


def test_a_pixel_gets_the_value_of_its_place(wanet: Make) -> None:
    trigger = wanet(warp_strength=2.0).trigger
    assert isinstance(trigger, WarpTrigger)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    found = trigger.stamp(images)
    for row in range(8):
        for column in range(8):
            x, y = trigger.grid[row, column].tolist()
            wanted = bilinear(images[1, 2], x, y)
            assert found[1, 2, row, column].item() == pytest.approx(wanted, abs=1e-5)
    assert found.min() >= 0 and found.max() <= 1


def test_a_grid_that_moves_nothing_changes_nothing_and_one_pixel_is_one_pixel() -> None:
    images = torch.rand(2, 1, 6, 8)
    still = WarpTrigger(grid=identity_grid((6, 8)))
    assert torch.allclose(still.stamp(images), images, atol=1e-6)
    assert still.describe()["largest_shift"] == 0
    shift = torch.tensor([2 / 7, 0.0])  # a pixel to the right
    moved = WarpTrigger(grid=(identity_grid((6, 8)) + shift).clamp(-1, 1))
    assert torch.allclose(moved.stamp(images)[..., :-1], images[..., 1:], atol=1e-5)
    said = moved.describe()
    assert said["largest_shift"] == pytest.approx(1) and said["mean_shift"] == pytest.approx(7 / 8)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (torch.zeros(8, 8), r"the shape \(8, 8\), expected \(H, W, 2\)"),
        (torch.zeros(8, 8, 3), r"expected \(H, W, 2\)"),
        (torch.full((8, 8, 2), 1.1), "points outside the image"),
        (torch.full((8, 8, 2), torch.nan), "values from nan to nan"),
    ],
)
def test_grids_that_are_none_are_refused(grid: Tensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        trigger_from({"kind": "warp", "range": "pixel"}, {"grid": grid})


# The attack --------------------------------------------------------------------------------------


def test_its_defaults_are_the_official_ones() -> None:
    options = WaNetOptions()
    found = (options.warp_grid, options.warp_strength, options.grid_rescale, options.cross_ratio)
    assert found == (4, 0.5, 1, 2) and options.poison_rate == 0.1


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
def test_noise_rows_are_warped_otherwise_and_keep_their_labels(
    wanet: Make, toy_moment: Moments, ratio: float
) -> None:
    moment, attack = toy_moment(), wanet(cross_ratio=ratio)
    real = moment.real
    given = attack.on_start(moment, real)
    poisoned = attack.poisoned_rows
    changed = (given.images != real.images).flatten(1).any(1)
    noise = changed & ~poisoned
    count = round(9 * ratio)
    assert int(poisoned.sum()) == 9 and int(noise.sum()) == count
    assert attack.counters() == {"poisoned_rows": 9, "noise_rows": count}
    warped = attack.trigger.stamp(real.images)
    assert torch.equal(given.images[poisoned], warped[poisoned])
    assert torch.equal(given.labels[~poisoned], real.labels[~poisoned])
    apart = (given.images - warped)[noise].abs()
    assert not count or bool((apart.flatten(1).amax(1) > 1e-3).all())
    assert given.images.min() >= 0 and given.images.max() <= 1


def test_a_noise_row_is_moved_at_most_half_a_pixel_further(wanet: Make) -> None:
    """On an image that is its own column number, a value is a place."""
    columns = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    trigger = wanet().trigger
    assert isinstance(trigger, WarpTrigger)
    for unit in (-1.0, 1.0):
        noise = torch.zeros(1, 8, 8, 2)
        noise[..., 0] = unit
        moved = trigger.stamp_shifted(columns, noise) - trigger.stamp(columns)
        inside = moved[..., 2:6]
        wanted = torch.full_like(inside, unit / 8 / 2)  # a side of 2 is the width of 1
        assert torch.allclose(inside, wanted, atol=1e-6)


def test_too_many_noise_rows_are_refused(wanet: Make, toy_moment: Moments) -> None:
    moment = toy_moment()
    message = (
        "ratio 3 asks for 81 noise rows beside 27 poisoned ones, but 63 are left: at most 2.33"
    )
    with pytest.raises(RequestError, match=message):
        wanet(poison_rate=0.3, cross_ratio=3).on_start(moment, moment.real)


def test_the_field_is_the_same_in_every_run_and_serves_every_channel(
    wanet: Make, toy_data_info: DataInfo
) -> None:
    one, two = wanet().trigger.tensors()["grid"], wanet(target=1).trigger.tensors()["grid"]
    assert torch.equal(one, two)
    colour = WaNet(WaNetOptions(), replace(toy_data_info, image_shape=(3, 8, 8)))
    assert torch.equal(colour.trigger.tensors()["grid"], one)
    assert not torch.equal(wanet(warp_grid=5).trigger.tensors()["grid"], one)
    assert 0.1 < wanet().trigger.describe()["mean_shift"] < 0.5  # pixels
