"""Find and undo what a defense changed in tensors that it shares with other defenses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn


@final
class TensorSnapshot:
    """Copies of shared tensors, compared with the originals after each defense."""

    def __init__(self, shared: Iterable[Tensor]) -> None:
        unique = {(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in shared}
        self._pairs = [(tensor, tensor.clone()) for tensor in unique.values()]

    @torch.no_grad()
    def restore(self) -> bool:
        """Restore every changed tensor; returns whether there was one."""
        changed = [(now, then) for now, then in self._pairs if not _same(now, then)]
        for now, then in changed:
            now.copy_(then)
        return bool(changed)


def same_network(now: nn.Module, then: nn.Module) -> bool:
    """Whether both have the same weights and buffers, and ``now`` is still in evaluation mode,
    frozen and without hooks, as a defense gets its victim."""
    ours, theirs = now.state_dict(), then.state_dict()
    if ours.keys() != theirs.keys() or any(p.requires_grad for p in now.parameters()):
        return False
    quiet = all(
        not (part.training or part._forward_hooks or part._forward_pre_hooks)
        for part in now.modules()
    )
    return quiet and all(
        value.shape == theirs[name].shape and _same(value, theirs[name])
        for name, value in ours.items()
    )


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether all values are equal, NaNs in the same places included."""
    if torch.equal(now, then):
        return True
    if not now.is_floating_point() or not torch.equal(now.isnan(), then.isnan()):
        return False
    return torch.equal(now.nan_to_num(nan=0.0), then.nan_to_num(nan=0.0))
