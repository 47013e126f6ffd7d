"""What values say about the space that they are in."""

from __future__ import annotations

import pytest
import torch

from distillsec.distill.files.spaces import SPACES, certain_space, pixel_evidence, smoothness
from distillsec.distill.preprocessing import Preprocessing, fit_zca

DATA = Preprocessing((0.4, 0.5), (0.2, 0.3))
PIXELS = torch.rand(30, 2, 4, 4, generator=torch.Generator().manual_seed(0))
ROUNDED = (PIXELS * 255).round()


@pytest.mark.parametrize(
    ("values", "name", "why"),
    [
        (ROUNDED.to(torch.uint8), "uint8", "8-bit values"),
        (ROUNDED, "uint8", "whole numbers from 0 to 255"),
        (PIXELS * 250 + 0.25, "uint8", "on average"),
        (ROUNDED / 255, "pixels", "in steps of 1/255"),
        ((ROUNDED / 255).half().float(), "pixels", "in steps of 1/255"),
        (PIXELS, "pixels", "none negative"),
    ],
)
def test_some_values_are_possible_in_one_space(values: torch.Tensor, name: str, why: str) -> None:
    found = certain_space(values)
    assert found is not None and found[0] == name and why in found[1]


@pytest.mark.parametrize("values", [DATA.normalise(PIXELS), PIXELS * 2 - 1, PIXELS * 1.2 - 0.1])
def test_others_are_not(values: torch.Tensor) -> None:
    assert certain_space(values) is None


def stored(name: str) -> tuple[torch.Tensor, Preprocessing]:
    """The pixels as they are stored in a space, and its preprocessing."""
    zca = Preprocessing((0.0, 0.0), (1.0, 1.0), fit_zca(PIXELS))
    return {
        "pixels": (PIXELS, DATA),
        "uint8": (PIXELS * 255, DATA),
        "symmetric": (PIXELS * 2 - 1, DATA),
        "normalised": (DATA.normalise(PIXELS), DATA),
        "zca": (zca.normalise(PIXELS), zca),
    }[name]


@pytest.mark.parametrize("name", SPACES)
def test_every_space_gives_the_pixels_back(name: str) -> None:
    values, preprocessing = stored(name)
    pixels = SPACES[name].to_pixels(values, preprocessing)
    torch.testing.assert_close(pixels, PIXELS, atol=1e-4, rtol=0)
    seen = pixel_evidence(name, values, pixels, DATA)
    assert seen.impossible == "" and 0 <= seen.low < seen.high <= 1.0001
    mean, deviation = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    shift = ((mean - torch.tensor(DATA.mean)).abs() / torch.tensor(DATA.std)).mean()
    assert seen.shift == pytest.approx(float(shift), abs=1e-4)
    assert seen.spread == pytest.approx(
        float((deviation / torch.tensor(DATA.std)).mean()), abs=1e-4
    )


def test_bytes_are_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    exact = torch.tensor([number / 255 for number in range(256)])
    assert torch.equal(SPACES["uint8"].to_pixels(values.float(), DATA), exact)


def test_smoothness_is_the_correlation_of_neighbours() -> None:
    images = torch.rand(5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    images = images + images.mean(dim=(2, 3), keepdim=True)
    means = images.mean(dim=(0, 2, 3))
    total = {"across": 0.0, "down": 0.0}
    for image in images:
        for channel in image - means.view(2, 1, 1):
            for row in range(4):
                for column in range(6):
                    here = float(channel[row, column])
                    if column:
                        total["across"] += here * float(channel[row, column - 1]) / (5 * 2 * 4 * 5)
                    if row:
                        total["down"] += here * float(channel[row - 1, column]) / (5 * 2 * 3 * 6)
    variance = float(images.var(dim=(0, 2, 3), correction=0).mean())
    wanted = (total["across"] + total["down"]) / 2 / variance
    assert smoothness(images) == pytest.approx(wanted, abs=1e-5)
    assert smoothness(torch.ones(2, 1, 3, 3)) == 0


def test_readings_that_cannot_be() -> None:
    def impossible(name: str, values: torch.Tensor) -> str:
        pixels = SPACES[name].to_pixels(values, DATA)
        return pixel_evidence(name, values, pixels, DATA).impossible

    assert impossible("normalised", ROUNDED).startswith("pixels would be 32")
    assert "vary 0.0" in impossible("uint8", DATA.normalise(PIXELS))
    assert "values run from" in impossible("symmetric", DATA.normalise(PIXELS))
    assert "no value is below" in impossible("symmetric", PIXELS)
    assert impossible("pixels", DATA.normalise(PIXELS)) == ""
