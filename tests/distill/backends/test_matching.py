"""Matching losses against brute force in numpy, and their gradients against finite differences."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from distillsec.distill.backends.matching import (
    DISTANCES,
    global_cosine,
    layerwise_cosine,
    squared_error,
)
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]
SHAPES = [(4, 3, 3, 3), (4,), (5, 7), (5,), (2, 3, 4)]
EPSILON = 1e-6  # the published value


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def cosine(a: Array, b: Array) -> float:
    norms = float(np.sqrt((a**2).sum()) * np.sqrt((b**2).sum()))
    return float((a * b).sum()) / (norms + EPSILON)


def test_layerwise_cosine_adds_up_rows_and_leaves_vectors_out() -> None:
    ours, theirs = gradients(0), gradients(1)
    expected = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.ndim > 1:
            for row, other in zip(a.numpy(), b.numpy(), strict=True):
                expected += 1 - cosine(row, other)
    assert layerwise_cosine(ours, theirs).item() == pytest.approx(expected, rel=1e-12)
    ours[1], ours[3] = ours[1] * 100, -ours[3]
    assert layerwise_cosine(ours, theirs).item() == pytest.approx(expected, rel=1e-12)


def test_squared_error_counts_every_number() -> None:
    ours, theirs = gradients(0), gradients(1)
    pairs = zip(ours, theirs, strict=True)
    expected = sum(float(((a.numpy() - b.numpy()) ** 2).sum()) for a, b in pairs)
    assert squared_error(ours, theirs).item() == pytest.approx(expected, rel=1e-12)


def test_global_cosine_sees_one_long_vector() -> None:
    ours, theirs = gradients(0), gradients(1)
    a, b = (np.concatenate([g.numpy().ravel() for g in each]) for each in (ours, theirs))
    assert global_cosine(ours, theirs).item() == pytest.approx(1 - cosine(a, b), rel=1e-12)


@pytest.mark.parametrize(("name", "opposite"), [("layerwise", 22.0), ("cos", 2.0)])
def test_the_cosines_at_their_ends(name: str, opposite: float) -> None:
    ours = gradients(0)  # 4 + 5 + 2 rows
    distance = DISTANCES[name]
    assert distance(ours, [2 * g for g in ours]).item() == pytest.approx(0, abs=1e-5)
    assert distance(ours, [-g for g in ours]).item() == pytest.approx(opposite, abs=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("side", ["synthetic", "real", "both"])
def test_zero_gradients_give_finite_values_and_derivatives(name: str, side: str) -> None:
    ours, theirs = gradients(0), gradients(1)
    if side != "real":
        ours = [g * 0 for g in ours]
    if side != "synthetic":
        theirs = [g * 0 for g in theirs]
    for gradient in ours:
        gradient.requires_grad_()
    distance = DISTANCES[name](ours, theirs)
    distance.backward()
    assert distance.isfinite()
    assert all(g.grad is None or bool(g.grad.isfinite().all()) for g in ours)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(
    ("activation", "norm"), [("sigmoid", "none"), ("swish", "none"), ("swish", "instance")]
)
def test_the_gradient_on_the_images_is_that_of_finite_differences(
    name: str, activation: str, norm: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = NetworkSpec.model_validate(
        {"width": 3, "depth": 1, "activation": activation, "norm": norm}
    )
    network = build_network(
        spec, image_shape=(1, 4, 4), classes=3, preprocessing=Preprocessing((0.5,), (0.25,)), seed=0
    ).double()
    weights = list(network.parameters())

    def loss_gradient(images: Tensor, labels: Tensor, attached: bool) -> tuple[Tensor, ...]:
        loss = functional.cross_entropy(network(images), labels)
        return torch.autograd.grad(loss, weights, create_graph=attached)

    real = torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    wanted = loss_gradient(real, torch.arange(6) % 3, attached=False)

    def distance(images: Tensor) -> Tensor:
        return DISTANCES[name](loss_gradient(images, torch.tensor([0, 2]), attached=True), wanted)

    start = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(distance(start.requires_grad_()), start)
    expected, step = torch.zeros_like(start), 1e-5
    with torch.enable_grad():  # the loss needs the weights' gradients
        for place in np.ndindex(*start.shape):
            nudge = torch.zeros_like(start)
            nudge[place] = step
            apart = distance(start.detach() + nudge) - distance(start.detach() - nudge)
            expected[place] = cast(float, apart.item()) / (2 * step)
    assert expected.abs().max() > 1e-4
    # Central differences err by O(step²) and by rounding, 1e-16 / step.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
