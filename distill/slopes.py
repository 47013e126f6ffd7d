"""The mean loss on a batch and its gradient, gathered in pieces that fit the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .types import Batch

# On a CPU a batch of 256 falls out of the cache; see benchmarks/results/cpu-levers.json.
_CPU_MICRO_BATCH = 32
_GPU_MICRO_BATCH = 2048


def micro_batch(device: torch.device) -> int:
    """How many images to pass through a network at once on ``device``."""
    return _CPU_MICRO_BATCH if device.type == "cpu" else _GPU_MICRO_BATCH


def even_pieces(count: int, device: torch.device) -> int:
    """The size of the fewest pieces of one size that cover ``count`` images: the last may be short
    by less than their number."""
    pieces = -(-count // micro_batch(device))
    return -(-count // pieces)


def mean_slopes(
    forward: Callable[[Tensor], Tensor], weights: Sequence[Tensor], batch: Batch, size: int
) -> tuple[Tensor, list[Tensor]]:
    """The mean cross-entropy on ``batch`` and its gradient at each of ``weights``, detached.

    forward: images to logits. size: how many images pass at once.
    """
    value = torch.zeros((), device=batch.images.device)
    total: list[Tensor] = []
    for images, labels in zip(batch.images.split(size), batch.labels.split(size), strict=True):
        loss = functional.cross_entropy(forward(images), labels, reduction="sum") / len(batch)
        piece = torch.autograd.grad(loss, weights)
        value = value + loss.detach()
        total = [a + b for a, b in zip(total, piece, strict=True)] if total else list(piece)
    return value, total
