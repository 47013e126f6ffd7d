"""A finished set that was received, as the start of a run in which only hooks change it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn

from ..core.backend import Backend, BackendOptions
from ..core.real import RealData
from ..core.run import Run
from ..types import Batch


@final
class ReceivedSet(Backend):
    """A finished set, changed by the hooks alone: it has no loss of its own.

    It is no choice of a configuration, since it needs the set. Adam takes the steps, one an
    iteration, at a rate that falls to 0 along half a cosine.
    """

    name = "received"
    Options = BackendOptions

    def __init__(self, received: Batch, *, lr: float, iterations: int) -> None:
        """received: the set, pixel space. lr: Adam's first rate, normalised units."""
        self._received, self._lr, self._iterations = received, lr, iterations

    def start(self, real: RealData) -> Batch:
        return self._received

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam([leaf], lr=self._lr)

    def pace(self, iteration: int) -> float:
        return (1 + math.cos(math.pi * iteration / self._iterations)) / 2

    def steps(self) -> int:
        return 1

    def network(self, run: Run) -> nn.Module:
        return run.task.fresh_network(run.position.iteration)

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        yield from ()

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        """No hook needs a network that moves."""
