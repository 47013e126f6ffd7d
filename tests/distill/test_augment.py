"""Siamese augmentation against per-pixel versions written from the published description."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillsec.distill.augment import OPERATIONS, Augmentation, Transform, parse_strategy
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import RequestError

MEAN, STD = (0.48, 0.45, 0.41), (0.25, 0.2, 0.3)
ALL = "color_crop_cutout_flip_scale_rotate"
Images = NDArray[np.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator(seed))


def augmentation(operation: str, channels: int = 3) -> Augmentation:
    return Augmentation(parse_strategy(operation), Preprocessing(MEAN[:channels], STD[:channels]))


def brute_color(image: Images, parameters: list[float]) -> Images:
    brightness, saturation, contrast = parameters
    out = image + brightness
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            grey = out[:, row, column].mean()
            out[:, row, column] = (out[:, row, column] - grey) * saturation + grey
    level = float(out.mean())
    return np.asarray((out - level) * contrast + level)


def brute_crop(image: Images, parameters: list[int]) -> Images:
    down, right = parameters
    _, height, width = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                out[:, row, column] = image[:, row + down, column + right]
    return out


def brute_cutout(image: Images, parameters: list[int]) -> Images:
    _, height, width = image.shape
    lengths = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    out = image.copy()
    for i in range(lengths[0]):
        for j in range(lengths[1]):
            # As published: the square's pixels are clamped to the image.
            row = min(max(i + parameters[0] - lengths[0] // 2, 0), height - 1)
            column = min(max(j + parameters[1] - lengths[1] // 2, 0), width - 1)
            out[:, row, column] = 0
    return out


def brute_flip(image: Images, parameters: list[bool]) -> Images:
    return image[:, :, ::-1] if parameters[0] else image


def brute_affine(image: Images, matrix: list[list[float]]) -> Images:
    """Bilinear sampling at ``matrix`` times the centred coordinates; zero outside."""
    _, height, width = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
            at_x = matrix[0][0] * x + matrix[0][1] * y
            at_y = matrix[1][0] * x + matrix[1][1] * y
            from_column, from_row = ((at_x + 1) * width - 1) / 2, ((at_y + 1) * height - 1) / 2
            for r in (math.floor(from_row), math.floor(from_row) + 1):
                for c in (math.floor(from_column), math.floor(from_column) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        weight = (1 - abs(from_row - r)) * (1 - abs(from_column - c))
                        out[:, row, column] += weight * image[:, r, c]
    return out


def brute_scale(image: Images, parameters: list[float]) -> Images:
    return brute_affine(image, [[parameters[0], 0], [0, parameters[1]]])


def brute_rotate(image: Images, parameters: list[float]) -> Images:
    sine, cosine = math.sin(parameters[0]), math.cos(parameters[0])
    return brute_affine(image, [[cosine, -sine], [sine, cosine]])


BRUTE: dict[str, Callable[[Images, list[Any]], Images]] = {
    "color": brute_color,
    "crop": brute_crop,
    "cutout": brute_cutout,
    "flip": brute_flip,
    "scale": brute_scale,
    "rotate": brute_rotate,
}


def test_every_operation_has_an_oracle() -> None:
    assert BRUTE.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_the_per_pixel_one(
    operation: str, size: tuple[int, int], shared: bool
) -> None:
    images = pixels(6, 3, *size)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    for seed in range(8):
        transform = augmentation(operation).draw(images.shape, generator(seed), shared=shared)
        assert transform.parameters.shape[0] == (1 if shared else 6)
        rows = transform.parameters.expand(6, -1).tolist()
        expected = [
            BRUTE[operation]((image.numpy() - mean) / std, row) * std + mean
            for image, row in zip(images, rows, strict=True)
        ]
        # The maps of scale and rotate are float32, so a point lies up to 1e-7 of a side away.
        np.testing.assert_allclose(transform(images).numpy(), np.stack(expected), atol=3e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_shared_transform_does_the_same_to_any_batch(operation: str) -> None:
    real = pixels(256, 3, 8, 8).float()
    transform = augmentation(operation).draw(real.shape, generator(3), shared=True)
    torch.testing.assert_close(transform(real[20:30]), transform(real)[20:30], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_those_of_finite_differences(operation: str, shared: bool) -> None:
    images = pixels(2, 3, 5, 6).requires_grad_()
    transform = augmentation(operation).draw(images.shape, generator(1), shared=shared)
    assert torch.autograd.gradcheck(transform, (images,))
    assert torch.autograd.gradgradcheck(lambda x: transform(x) ** 2, (images,))


@pytest.mark.parametrize("channels", [1, 3])
def test_without_a_strategy_nothing_changes(channels: int) -> None:
    images = pixels(4, channels, 8, 8)
    transform = augmentation("", channels).draw(images.shape, generator(), shared=False)
    assert transform(images) is images


def test_what_comes_in_is_the_mean_and_nothing_is_clamped() -> None:
    images = torch.full((1, 3, 8, 8), 0.9, dtype=torch.float64)
    shifted = Transform("crop", torch.tensor([[1, 0]]), Preprocessing(MEAN, STD))(images)
    assert shifted[0, :, -1, 0].tolist() == pytest.approx(MEAN)
    brighter = Transform("color", torch.tensor([[0.5, 1.0, 1.0]]), Preprocessing(MEAN, STD))(images)
    assert brighter[0, :, 0, 0].tolist() == pytest.approx([0.9 + 0.5 * s for s in STD])
    assert brighter.max() > 1


# Lowest and highest value of each parameter, for 32x32 images.
RANGES: dict[str, list[tuple[float, float]]] = {
    "color": [(-0.5, 0.5), (0, 2), (0.5, 1.5)],
    "crop": [(-4, 4), (-4, 4)],
    "cutout": [(0, 32), (0, 32)],
    "flip": [(0, 1)],
    "scale": [(1 / 1.2, 1.2), (1 / 1.2, 1.2)],
    "rotate": [(-math.radians(15), math.radians(15))],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_fill_the_published_range_and_are_independent(operation: str) -> None:
    drawn = augmentation(operation).draw((4000, 3, 32, 32), generator(), shared=False).parameters
    values = drawn.double()
    assert values.shape == (4000, len(RANGES[operation]))
    for column, (low, high) in zip(values.T, RANGES[operation], strict=True):
        span = high - low
        assert low - 1e-6 <= column.min() <= low + 0.01 * span
        assert high - 0.01 * span <= column.max() <= high + 1e-6
        assert column.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * span)
    if values.shape[1] > 1:
        correlation = torch.corrcoef(values.T) - torch.eye(values.shape[1])
        assert correlation.abs().max() < 0.06


def test_a_cutout_of_odd_side_is_centred_inside() -> None:
    """Side 5: a square of 3, centred on pixels 0 to 4; side 4: a square of 2, centres 0 to 4."""
    drawn = augmentation("cutout").draw((2000, 3, 5, 4), generator(), shared=False).parameters
    assert drawn[:, 0].unique().tolist() == [0, 1, 2, 3, 4]
    assert drawn[:, 1].unique().tolist() == [0, 1, 2, 3, 4]


def test_each_operation_is_as_likely() -> None:
    rng, everything = generator(), augmentation(ALL)
    drawn = [everything.draw((2, 3, 8, 8), rng, shared=True).operation for _ in range(3000)]
    for operation in OPERATIONS:
        assert drawn.count(operation) == pytest.approx(500, abs=100)


@pytest.mark.parametrize("shared", [True, False])
def test_the_generator_alone_decides(shared: bool) -> None:
    before = torch.random.get_rng_state()
    for seed in range(20):
        one, same = (
            augmentation(ALL).draw((9, 3, 8, 8), generator(seed), shared=shared) for _ in range(2)
        )
        assert one.operation == same.operation
        assert torch.equal(one.parameters, same.parameters)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_image_has_its_own_parameters_unless_shared(operation: str) -> None:
    own = augmentation(operation).draw((64, 3, 32, 32), generator(), shared=False)
    assert len(own.parameters.unique(dim=0)) > (1 if operation == "flip" else 30)


def test_strategies() -> None:
    assert parse_strategy("crop_color") == ("crop", "color")
    assert parse_strategy("") == parse_strategy("none") == ()
    with pytest.raises(RequestError, match=r"unknown augmentation 'colour'.*did you mean color\?"):
        parse_strategy("crop_colour")
    with pytest.raises(RequestError, match="unknown augmentation ''"):
        parse_strategy("crop__flip")
