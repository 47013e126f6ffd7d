"""The neural tangent kernel and the losses in it, against quadrature, wide networks and numpy."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillsec.attacks.kernel import (
    conflict_loss,
    projection_loss,
    regression_loss,
    tangent_kernel,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, width, generator=generator, dtype=torch.float64)


def expectation(cov: np.ndarray, kind: str, points: int = 1200) -> float:
    """E[f(u) f(v)], f a ReLU or its step, for normal (u, v) with covariance ``cov``.

    In polar coordinates of the whitened plane the radius separates and is done in
    closed form (its mean square is 2), the angle by the trapezoidal rule.
    """
    lower = np.linalg.cholesky(cov)
    angles = np.arange(points) * 2 * math.pi / points
    pairs = lower @ np.stack([np.cos(angles), np.sin(angles)])
    if kind == "relu":
        return float((2 * np.maximum(pairs, 0).prod(axis=0)).mean())
    return float(((pairs > 0).all(axis=0)).mean())


def by_recursion(x: Tensor, y: Tensor, hidden: int) -> float:
    """Jacot's recursion for one pair of images, its expectations by quadrature."""
    both = np.stack([x.numpy(), y.numpy()])
    cov = 2 * both @ both.T / len(x) + 0.01
    tangent = cov[0, 1]
    for _ in range(hidden):
        slope = expectation(cov, "step")
        off = expectation(cov, "relu")
        cov = 2 * np.array([[cov[0, 0] / 2, off], [off, cov[1, 1] / 2]]) + 0.01
        tangent = cov[0, 1] + 2 * slope * tangent
    return float(tangent)


@pytest.mark.parametrize("hidden", [1, 3])
def test_the_kernel_is_the_recursion_with_numerical_expectations(hidden: int) -> None:
    first, second = rows(3, 5, seed=0), rows(2, 5, seed=1)
    found = tangent_kernel(first, second, hidden)
    for i in range(3):
        for j in range(2):
            wanted = by_recursion(first[i], second[j], hidden)
            assert found[i, j].item() == pytest.approx(wanted, rel=5e-3)


class Wide(nn.Module):
    """A ReLU network in NTK parametrisation: weight variance 2, bias variance 0.01."""

    def __init__(self, inputs: int, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        sides = [inputs, *[width] * hidden, 1]
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.weights = nn.ParameterList([draw(o, i) for i, o in pairwise(sides)])
        self.biases = nn.ParameterList([draw(o) for o in sides[1:]])

    def forward(self, x: Tensor) -> Tensor:
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x.relu() if number else x
            x = math.sqrt(2 / weight.shape[1]) * x @ weight.T + 0.1 * bias
        return x


def test_the_kernel_is_that_of_a_wide_network() -> None:
    """The gradients' inner products of random networks, by automatic differentiation."""
    images = rows(4, 6, seed=2)
    generator = torch.Generator().manual_seed(3)
    kernels = []
    for _ in range(8):
        network = Wide(6, 400, 2, generator)
        weights = list(network.parameters())
        values = network(images)[:, 0].unbind()
        found = [torch.autograd.grad(value, weights, retain_graph=True) for value in values]
        gradients = torch.stack([torch.cat([g.flatten() for g in each]) for each in found])
        kernels.append(gradients @ gradients.T)
    empirical = torch.stack(kernels).mean(0)
    kernel = tangent_kernel(images, images, hidden=2)
    assert torch.allclose(kernel, empirical, rtol=0.05)
    assert float((kernel - empirical).abs().mean() / empirical.mean()) < 0.02


def test_the_kernel_has_a_gradient_where_two_images_are_the_same() -> None:
    images = rows(4, 6, seed=4)

    def kernel(first: Tensor) -> Tensor:
        both = torch.cat([first, images[:1]])  # its diagonal, and a row that is there twice
        return tangent_kernel(both, both, hidden=2)

    given = torch.cat([images[:1], images[1:2] * 0.9]).requires_grad_()
    off = torch.ones(3, 3, dtype=torch.bool) ^ torch.eye(3, dtype=torch.bool)
    off[0, 2] = off[2, 0] = False  # the same image: the kernel has a kink there
    assert torch.autograd.gradcheck(lambda x: kernel(x)[off], given)
    assert torch.autograd.gradcheck(lambda x: kernel(x).diagonal(), given)
    (gradient,) = torch.autograd.grad(kernel(given).sum(), given)
    assert bool(gradient.isfinite().all())


def test_the_losses_are_those_of_the_official_code() -> None:
    """Its notebook's ``trig_loss`` and ``kernel_loss``, run on these inputs with numpy in place of
    jax and the kernel above, gave the three numbers: for rho = 0, for 1e10, and without trigger."""
    state = np.random.RandomState(0)
    support, clean, chosen, trigger = (
        torch.from_numpy(state.rand(count, 16)) for count in (6, 9, 3, 1)
    )
    classes = torch.eye(3, dtype=torch.float64)
    images = torch.cat([clean, 0.7 * chosen + 0.3 * trigger])
    labels = torch.cat([classes[torch.arange(9) % 3], classes[[1, 1, 1]]])
    pairs = ((images, images), (images, support), (support, support))
    kernel, across, own = (tangent_kernel(*pair, hidden=3) for pair in pairs)
    projection = projection_loss(kernel, across, own, labels)
    assert projection.item() == pytest.approx(0.7368909741355127, rel=1e-9)
    whole = 1e10 * conflict_loss(kernel, labels) + projection
    assert whole.item() == pytest.approx(0.770958828732534, rel=1e-6)
    known, wanted = classes[torch.arange(6) % 3], labels[:9]
    found = regression_loss(own, known, across[:9], wanted)
    assert found.item() == pytest.approx(0.2997157348280177, rel=1e-9)


def test_losses_of_simple_cases() -> None:
    labels = torch.eye(3, dtype=torch.float64)
    images = rows(3, 8, seed=5)
    kernel = tangent_kernel(images, images, hidden=3)
    # The set is the data itself: nothing is lost, up to the ridge.
    assert projection_loss(kernel, kernel, kernel, labels).item() < 1e-6
    # The same image with two labels: half of the two one-hot entries remains, four of nine times.
    twice = images[[0, 0, 1]]
    torn = tangent_kernel(twice, twice, hidden=3)
    assert conflict_loss(torn, labels).item() == pytest.approx(4 * 0.25 / 9, rel=1e-3)
    assert conflict_loss(kernel, labels).item() < 1e-8
