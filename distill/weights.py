"""A network's weights as one vector: how experts are stored, and how students are unrolled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from .types import Batch


def laid_out(network: nn.Module) -> Tensor:
    """A copy of the network's parameters, end to end: ``(P,)``, detached."""
    return parameters_to_vector(network.parameters()).detach().clone()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """``tensors`` end to end, ``(P,)``, attached to them."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def count(network: nn.Module) -> int:
    """How many weights the network has."""
    return sum(weight.numel() for weight in network.parameters())


@torch.no_grad()
def write(network: nn.Module, weights: Tensor) -> None:
    """Copy the vector ``weights`` ``(P,)`` into the network's parameters."""
    parameters = list(network.parameters())
    pieces = weights.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))


def logits(network: nn.Module, weights: Tensor, pixels: Tensor) -> Tensor:
    """The logits of ``network`` for ``pixels``, with ``weights`` ``(P,)`` in place of its own.

    They are attached to ``weights``; the network's parameters stay as they are.
    """
    named = dict(network.named_parameters())
    pieces = weights.split([parameter.numel() for parameter in named.values()])
    views = {
        name: piece.view_as(parameter)
        for (name, parameter), piece in zip(named.items(), pieces, strict=True)
    }
    answer: Tensor = functional_call(network, views, (pixels,))
    return answer


def loss(network: nn.Module, weights: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of ``network`` with ``weights`` on ``batch``, attached to both."""
    return functional.cross_entropy(logits(network, weights, batch.images), batch.labels)
