"""Checks for NaN and infinity that cost a GPU no waiting: they are read once an iteration."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..types import RunError


@final
class FiniteChecks:
    """Tensors that must be finite. On a CPU each is looked at at once, else in ``read``."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Tensor]] = []

    def expect(self, tensor: Tensor, message: str) -> None:
        """Errors: ``RunError`` with ``message``, here or in ``read``, where it is not finite."""
        self._waiting.append((message, tensor.detach().isfinite().all()))
        if tensor.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Look at all that wait. Errors: ``RunError`` with the first one's message."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        good = torch.stack([flag for _, flag in waiting]).tolist()
        bad = [message for (message, _), is_good in zip(waiting, good, strict=True) if not is_good]
        if bad:
            raise RunError(bad[0])
