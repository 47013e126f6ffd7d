"""Pure matching losses: between gradients, between embeddings, between weights.

Sources: gradients, Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021,
eq. 10; embeddings, Zhao, Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, eq.
6; weights, Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022,
eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..weights import joined

# Keeps the cosine of an all-zero gradient row finite; the published value.
_EPSILON = 1e-6

Gradients = Sequence[Tensor]


def layerwise_cosine(synthetic: Gradients, real: Gradients) -> Tensor:
    """Sum over layers and output units of 1 − cosine of the unit's incoming-weight gradients.

    A weight of shape ``(out, ...)`` counts ``out`` rows; vectors (biases and the affine parameters
    of norms) are left out, as published. Returns a scalar.
    """
    distances = [
        (1 - _cosine(s.flatten(1), r.flatten(1))).sum()
        for s, r in zip(synthetic, real, strict=True)
        if s.ndim > 1
    ]
    return torch.stack(distances).sum()


def squared_error(synthetic: Gradients, real: Gradients) -> Tensor:
    """Squared L2 distance of all gradients, biases included. Returns a scalar."""
    return torch.stack([((s - r) ** 2).sum() for s, r in zip(synthetic, real, strict=True)]).sum()


def global_cosine(synthetic: Gradients, real: Gradients) -> Tensor:
    """1 − cosine of all gradients laid end to end. Returns a scalar."""
    return 1 - _cosine(joined(synthetic), joined(real))


def mean_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """Squared distance of two mean embeddings, ``(N, F)`` and ``(M, F)``, summed over features.

    Returns a scalar. The published code sums it over classes and divides by nothing.
    """
    return (synthetic.mean(dim=0) - real.mean(dim=0)).square().sum()


def trajectory_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """How far the student's weights are from the expert's, as a share of the expert's own way.

    student, start, target: ``(P,)``. Returns a scalar: 0 at the target, 1 for a student that never
    moved.
    """
    return (student - target).square().sum() / (start - target).square().sum()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last dimension, the published epsilon added to the product of norms."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: Tensor = (a * b).sum(-1) / (norms + _EPSILON)
    return cosine


def attached(value: Tensor, at: Tensor, slope: Tensor) -> Tensor:
    """A scalar that is ``value``, and whose gradient at ``at`` is ``slope``, of the same shape.

    For a function that was differentiated already: no graph of it has to be kept.
    """
    return value + ((at - at.detach()) * slope).sum()


DISTANCES: Mapping[str, Callable[[Gradients, Gradients], Tensor]] = {
    "layerwise": layerwise_cosine,
    "mse": squared_error,
    "cos": global_cosine,
}
