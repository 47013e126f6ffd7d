"""Tensors that many defenses share: what one of them changed is found, and put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor


@final
class Untouched:
    """Copies of shared tensors, to compare with after each defense."""

    def __init__(self, shared: Iterable[Tensor]) -> None:
        unique = {(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in shared}
        self._pairs = [(tensor, tensor.clone()) for tensor in unique.values()]

    @torch.no_grad()
    def restore(self) -> bool:
        """Put every changed tensor back; whether there was one."""
        changed = [(now, then) for now, then in self._pairs if not _same(now, then)]
        for now, then in changed:
            now.copy_(then)
        return bool(changed)


def _same(now: Tensor, then: Tensor) -> bool:
    """Equal bit for bit, NaNs included."""
    if now.is_floating_point():
        return torch.equal(now.nan_to_num(nan=0.0), then.nan_to_num(nan=0.0)) and torch.equal(
            now.isnan(), then.isnan()
        )
    return torch.equal(now, then)
