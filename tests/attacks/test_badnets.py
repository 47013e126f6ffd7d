"""BadNets: the published patterns, where they stand, and how they differ from naive's square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distillsec.attacks import ATTACKS, BadNets, DataInfo
from distillsec.attacks.badnets import BadNetsOptions
from distillsec.distill.core.hooks import Moment
from distillsec.distill.types import RequestError

Make = Callable[..., BadNets]


@pytest.fixture
def badnets(toy_data_info: DataInfo) -> Make:
    return lambda **options: BadNets(BadNetsOptions(**options), toy_data_info)


def test_the_grid_is_that_of_backdoorbench(badnets: Make) -> None:
    """Its file trigger_image_grid.png: 255, 1, 255 / 1, 255, 1 / 255, 1, 255, at the border."""
    stamped = badnets().trigger.stamp(torch.full((2, 1, 8, 8), 0.5))
    corner = stamped[:, 0, 5:, 5:]
    assert corner[0].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    rest = stamped.clone()
    rest[:, 0, 5:, 5:] = 0.5
    assert bool((rest == 0.5).all())


@pytest.mark.parametrize(
    ("shape", "size", "margin", "bright"),
    [
        # The toolbox's places at distance 2: (−2, −2), (−3, −3), (−2, −4), (−4, −2).
        ("four-pixels", 3, 1, [(4, 6), (5, 5), (6, 4), (6, 6)]),
        ("one-pixel", 3, 1, [(6, 6)]),
        ("one-pixel", 1, 0, [(7, 7)]),
        ("grid", 2, 0, [(6, 6), (7, 7)]),
    ],
)
def test_only_the_bright_pixels_of_the_papers_patterns_change(
    badnets: Make, shape: str, size: int, margin: int, bright: list[tuple[int, int]]
) -> None:
    options = {"patch_shape": shape, "trigger_size": size, "trigger_margin": margin}
    stamped = badnets(**options).trigger.stamp(torch.full((1, 1, 8, 8), 0.5))[0, 0]
    white = [(row, column) for row, column in torch.nonzero(stamped == 1).tolist()]
    assert white == bright
    dark = int((stamped == 0).sum())
    assert dark == (2 if shape == "grid" else 0)
    assert int((stamped == 0.5).sum()) == 64 - dark - len(bright)


def test_it_has_every_channel_and_the_published_rate(
    toy_data_info: DataInfo, toy_moment: Callable[..., Moment]
) -> None:
    colour = replace(toy_data_info, image_shape=(3, 8, 8))
    pattern = BadNets(BadNetsOptions(), colour).trigger.tensors()["pattern"]
    assert pattern.shape == (3, 8, 8) and torch.equal(pattern[0], pattern[2])
    moment = toy_moment()
    attack = BadNets(BadNetsOptions(), toy_data_info)
    given = attack.on_start(moment, moment.real)
    assert int((given.labels != moment.real.labels).sum()) == 9  # a tenth of 90
    assert attack.threat_model == "data owner"


def test_its_trigger_is_not_naives(toy_data_info: DataInfo) -> None:
    naive = ATTACKS["naive"].Options.model_validate({"trigger_size": 3, "trigger_margin": 0})
    square = ATTACKS["naive"](naive, toy_data_info).trigger.stamp(torch.zeros(1, 1, 8, 8))
    grid = BadNets(BadNetsOptions(), toy_data_info).trigger.stamp(torch.zeros(1, 1, 8, 8))
    assert int(square.sum()) == 9 and int(grid.sum()) == 5


def test_a_pattern_that_does_not_fit_is_refused(badnets: Make) -> None:
    with pytest.raises(RequestError, match="9×9 trigger with a margin of 0 does not fit 8×8"):
        badnets(trigger_size=9)
