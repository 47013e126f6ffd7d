"""Pure matching losses between gradients: what gradient-matching backends minimise.

Source: Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021, eq. 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

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
    return 1 - _cosine(_laid_out(synthetic), _laid_out(real))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last dimension, the published epsilon added to the product of norms."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: Tensor = (a * b).sum(-1) / (norms + _EPSILON)
    return cosine


def _laid_out(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


DISTANCES: Mapping[str, Callable[[Gradients, Gradients], Tensor]] = {
    "layerwise": layerwise_cosine,
    "mse": squared_error,
    "cos": global_cosine,
}
