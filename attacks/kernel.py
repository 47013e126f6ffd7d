"""Regression with the neural tangent kernel, and the loss of a trigger in it.

Pure functions on images as rows, ``float64 (N, d)`` in pixel units. Kernel, regularisation and loss
are those of the code of Chung et al. (ICLR 2024): ``Mick048/KIP-based-backdoor-attack``, commit
193d772, KIP_BDAttack.ipynb.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHT_VARIANCE = 2.0
BIAS_VARIANCE = 0.01
RIDGE = 1e-6
_PARALLEL = 1e-14  # (sin θ)² below which two images count as parallel: √ has no gradient at 0


def tangent_kernel(first: Tensor, second: Tensor, hidden: int) -> Tensor:
    """The neural tangent kernel of a fully connected ReLU network of infinite width.

    first: ``(N, d)``. second: ``(M, d)``. hidden: number of hidden layers; the output layer comes
    on top. Returns ``(N, M)``. The kernel of the official code, which takes it from
    neural-tangents: NTK parametrisation, weight variance 2, bias variance 0.01.
    """
    width = first.shape[1]
    own, other = first.square().mean(dim=1)[:, None], second.square().mean(dim=1)[None]
    between, tangent = first @ second.T / width, first.new_zeros(())
    for _ in range(hidden):
        own, other, between, tangent = _dense(own, other, between, tangent)
        own, other, between, tangent = _relu(own, other, between, tangent)
    return _dense(own, other, between, tangent)[3]


def _dense(
    own: Tensor, other: Tensor, between: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variances (N, 1) and (1, M), covariance and tangent kernel (N, M) after a linear layer."""
    own, other, between = (
        WEIGHT_VARIANCE * value + BIAS_VARIANCE for value in (own, other, between)
    )
    return own, other, between, between + WEIGHT_VARIANCE * tangent


def _relu(
    own: Tensor, other: Tensor, between: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same after a ReLU, by the arc-cosine kernels of Cho and Saul (2009)."""
    product = own * other
    squared = product - between.square()
    apart = squared > _PARALLEL * product
    sine = torch.where(apart, torch.where(apart, squared, product).sqrt(), 0)
    rest = math.pi - torch.atan2(sine, between)
    slopes, values = rest / (2 * math.pi), (sine + rest * between) / (2 * math.pi)
    return own / 2, other / 2, values, tangent * slopes


def regularised(kernel: Tensor) -> Tensor:
    """``kernel`` (N, N) with ``RIDGE`` × the mean of its diagonal added to the diagonal."""
    return kernel + RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel)).to(kernel)


def regression_loss(support: Tensor, known: Tensor, images: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error of kernel regression.

    support, images: kernels ``(S, S)`` and ``(N, S)``. known, wanted: labels, one-hot
    ``(S, classes)`` and ``(N, classes)``.
    """
    predicted: Tensor = images @ torch.linalg.solve(regularised(support), known)
    return (predicted - wanted).square().mean()


def conflict_loss(kernel: Tensor, labels: Tensor) -> Tensor:
    """How badly kernel regression fits its own clean and triggered images.

    kernel: ``(N, N)``. labels: one-hot ``(N, classes)``. The mean squared error; it is not 0 where
    the two kinds of images contradict each other.
    """
    return regression_loss(kernel, labels, kernel, labels)


def projection_loss(kernel: Tensor, across: Tensor, support: Tensor, labels: Tensor) -> Tensor:
    """What a distilled set loses of the regression on clean and triggered images.

    kernel: ``(N, N)``. across: ``(N, S)``. support: ``(S, S)``, of the distilled set. labels:
    one-hot ``(N, classes)``. The squared remainders of the kernel functions after their projection
    on those of the set, weighted by the squared coefficients of the regression; the mean over
    images and classes.
    """
    coefficients: Tensor = torch.linalg.solve(regularised(kernel), labels)
    remainder: Tensor = kernel - across @ torch.linalg.solve(regularised(support), across.T)
    lost: Tensor = remainder.square() @ coefficients.square()
    return lost.mean()
