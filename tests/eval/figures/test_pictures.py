"""The pictures of a run, checked by their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from distillsec.attacks import AdditiveTrigger, BlendTrigger, PatchTrigger
from distillsec.distill.types import RequestError
from distillsec.eval.figures.run_pictures import (
    curves_picture,
    distilled_picture,
    trigger_picture,
    triggered_picture,
)
from distillsec.eval.figures.style import BLUE, RED, VERMILLION

Picture = npt.NDArray[np.uint8]


def seen(path: Path) -> Picture:
    """The picture's RGB bytes, (H, W, 3), after checks of its format, size and temporary files."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(path.parent.glob(".*"))
    with Image.open(path) as picture:
        pixels: Picture = np.asarray(picture.convert("RGB"))
    assert 200 <= pixels.shape[0] <= 5000
    assert 500 <= pixels.shape[1] <= 3000
    return pixels


def area(pixels: Picture, colour: str | tuple[int, int, int]) -> int:
    """How many pixels have exactly this colour."""
    wanted = list(bytes.fromhex(colour[1:])) if isinstance(colour, str) else list(colour)
    return int((pixels == np.array(wanted)).all(axis=-1).sum())


def flat(colours: list[tuple[float, float, float]], side: int) -> torch.Tensor:
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, side, side)


@pytest.mark.parametrize(("side", "tile"), [(8, 112), (28, 112), (32, 128), (96, 192), (300, 192)])
def test_tiles_are_scaled_by_whole_factors(tmp_path: Path, side: int, tile: int) -> None:
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.4, 0.6)]
    path = tmp_path / "distilled.png"
    images, labels = flat(colours, side), torch.tensor([1, 0, 1])
    distilled_picture(path, images, labels, ("cat", "dog"), title="a set")
    pixels = seen(path)
    for colour in [(255, 0, 0), (0, 255, 0), (51, 102, 153)]:
        assert area(pixels, colour) == tile * tile
    row = {c: np.argwhere((pixels == c).all(-1)).min(0) for c in [(255, 0, 0), (0, 255, 0)]}
    assert row[(0, 255, 0)][0] < row[(255, 0, 0)][0]  # class 0 stands above class 1
    assert row[(0, 255, 0)][1] == row[(255, 0, 0)][1]


def test_pixels_outside_the_range_are_clipped_and_the_caption_says_so(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in.png", tmp_path / "out.png"
    images = flat([(1.0, 0.0, 0.0)], 8)
    for path, shown in ((inside, images), (outside, images * 3 - 1)):
        distilled_picture(path, shown, torch.tensor([0]), ("cat", "dog"), title="a set")
        assert area(seen(path), (255, 0, 0)) == 112 * 112
    assert not np.array_equal(seen(inside), seen(outside))


def test_rows_and_columns_are_capped(tmp_path: Path) -> None:
    path = tmp_path / "distilled.png"
    names = [f"class {number} of $many$ {'x' * number}" for number in range(100)]
    images = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1200, 3, 8, 8)
    distilled_picture(path, images, torch.arange(1200) % 100, names, title="a long title " * 20)
    assert area(seen(path), (51, 102, 153)) == 20 * 10 * 112 * 112


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_soft_labels_and_names_without_glyphs(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "distilled.png"
    images = torch.full((4, channels, 8, 6), 0.6)
    distilled_picture(path, images, torch.eye(4), ("$x", "猫", "a", "b"), title="$5 × 猫 $")
    # Soft edges of letters are grey too.
    assert area(seen(path), (153, 153, 153)) == pytest.approx(4 * 112 * 84, abs=100)
    nothing = torch.zeros(0, 1, 8, 8)
    distilled_picture(path, nothing, torch.zeros(0).long(), ("a", "b"), title="nothing")
    seen(path)


def test_trigger_on_grey_with_its_patch_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "trigger.png"
    pattern, mask = torch.ones(3, 32, 32), torch.zeros(1, 32, 32)
    pattern[:, 28:30, 28:30] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    mask[:, 28:30, 28:30] = 1
    trigger_picture(path, PatchTrigger(pattern=pattern, mask=mask).picture(), target="7")
    pixels = seen(path)
    factor = 480 // 32
    assert area(pixels, (255, 0, 0)) == (2 * factor) ** 2 + 480**2
    grey = 480 * 480 - (2 * factor + 6) ** 2  # the blue frame covers three pixels around
    assert area(pixels, (128, 128, 128)) == pytest.approx(grey, abs=100)
    assert area(pixels, BLUE) > 4 * 480
    assert area(pixels, RED) == 0


def test_values_stand_in_small_grey_patches_only(tmp_path: Path) -> None:
    path, counts = tmp_path / "trigger.png", {}
    for channels in (1, 3):
        pattern, mask = torch.ones(channels, 28, 28), torch.zeros(1, 28, 28)
        mask[:, 22:28, 22:28] = 1
        trigger_picture(path, PatchTrigger(pattern=pattern, mask=mask).picture(), target="7")
        pixels = seen(path)
        frame = np.argwhere((pixels == [0, 0x72, 0xB2]).all(-1))
        right = frame[:, 1].max()
        inside = pixels[frame[:, 0].max() - 480 : frame[:, 0].max() - 3, right - 480 : right - 3]
        counts[channels] = area(inside, (0, 0, 0))
    assert counts[1] > 0
    assert counts[3] == 0


def test_unbounded_triggers_are_labelled_in_red(tmp_path: Path) -> None:
    path = tmp_path / "trigger.png"
    pattern, mask = torch.randn(1, 8, 8) * 20, torch.ones(1, 8, 8)
    unbounded = PatchTrigger(pattern=pattern, mask=mask, range="unbounded")
    trigger_picture(path, unbounded.picture(), target="7")
    assert area(seen(path), RED) > 500
    empty = PatchTrigger(pattern=torch.ones(1, 8, 8), mask=torch.zeros(1, 8, 8))
    trigger_picture(path, empty.picture(), target="7")
    assert area(seen(path), RED) == 0


def test_whole_image_triggers_have_nothing_enlarged(tmp_path: Path) -> None:
    path, half = tmp_path / "trigger.png", torch.zeros(3, 16, 16)
    half[:, :, 8:] = 1
    blend = BlendTrigger.uniform(half, opacity=0.1)
    trigger_picture(path, blend.picture(), target="7")  # at full opacity
    assert area(seen(path), (0, 0, 0)) == pytest.approx(480 * 240, abs=100)
    additive = AdditiveTrigger.bounded(half - 0.5, norm="linf", bound=0.03)
    trigger_picture(path, additive.picture(), target="7")  # scaled to black and white
    assert area(seen(path), (0, 0, 0)) == pytest.approx(480 * 240, abs=100)
    assert area(seen(path), BLUE) == 0


def test_triggered_images_their_difference_and_the_predictions(tmp_path: Path) -> None:
    path = tmp_path / "triggered.png"
    clean = flat([(0.2, 0.4, 0.6)] * 10, 8)
    triggered = clean.clone()
    triggered[:, :, 6:, 6:] += 0.2
    labels, targets = torch.zeros(10).long(), torch.ones(10).long()
    names = ("an airplane of a long name", "dog", "cat")
    for predictions in (torch.ones(10).long(), torch.full((10,), 2), None):
        triggered_picture(
            path, clean, triggered, labels, targets, names, predictions=predictions, title="a test"
        )
        pixels = seen(path)
        tile, patch = 176 * 176, 44 * 44
        assert area(pixels, (51, 102, 153)) == 8 * (2 * tile - patch)
        assert area(pixels, (102, 153, 204)) == 8 * patch
        assert area(pixels, (0, 0, 0)) == 8 * (
            tile - patch
        )  # the difference, scaled by its maximum
        hits, misses = area(pixels, BLUE), area(pixels, VERMILLION)
        assert (hits > 0) == (predictions is not None and int(predictions[0]) == 1)
        assert (misses > 0) == (predictions is not None and int(predictions[0]) == 2)


def test_no_change_and_no_eligible_images_are_drawn(tmp_path: Path) -> None:
    path, labels = tmp_path / "triggered.png", torch.zeros(2).long()
    images = torch.full((2, 1, 8, 8), 0.6)
    triggered_picture(path, images, images, labels, labels, ("a", "b"), title="no change")
    assert area(seen(path), (0, 0, 0)) == 2 * 176 * 176
    none = images[:0]
    triggered_picture(path, none, none, labels[:0], labels[:0], ("a", "b"), title="none")
    seen(path)


def test_curves_have_a_panel_for_each_logged_figure(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    steps: list[dict[str, Any]] = [
        {"iteration": i, "loss": 100.0 / i, "clean_test_accuracy": None} for i in range(1, 60)
    ]
    curves_picture(path, steps)
    one = seen(path)
    assert area(one, BLUE) > 500
    assert area(one, VERMILLION) == 0
    for row in steps[::10]:
        row |= {"clean_test_accuracy": 0.5, "attack_success_rate": 0.9}
    curves_picture(path, steps)
    two = seen(path)
    assert two.shape[0] > one.shape[0]
    assert area(two, VERMILLION) > 100
    for row in steps:
        row["trigger_loss"] = float("nan") if row["iteration"] % 2 else 3.0
    curves_picture(path, steps)
    assert seen(path).shape[0] > two.shape[0]


@pytest.mark.parametrize("steps", [[], [{"iteration": 1, "loss": None}]])
def test_a_note_replaces_curves_without_points(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    path = tmp_path / "curves.png"
    curves_picture(path, steps)
    pixels = seen(path)
    assert area(pixels, "#555555") > 100
    assert area(pixels, BLUE) == 0


def test_equal_input_gives_equal_bytes_and_errors_are_request_errors(tmp_path: Path) -> None:
    steps = [{"iteration": 1, "loss": 0.0}, {"iteration": 2, "loss": -1.0}]
    for name in ("1.png", "2.png"):
        curves_picture(tmp_path / name, steps)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    with pytest.raises(RequestError, match="cannot write"):
        curves_picture(tmp_path / "absent" / "curves.png", steps)
