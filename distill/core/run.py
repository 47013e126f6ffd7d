"""One run of a task, and who observes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from ..types import Distillate
from .finite import FiniteChecks
from .hooks import Hook
from .moments import Moments
from .position import Position
from .real import RealData
from .resume import LoopState
from .synthetic import SyntheticSet
from .task import Task


class Observer:
    """Base of what observes a run: progress bars, checkpoints, learning curves. It does nothing."""

    def on_expert(self, done: int, total: int) -> None:
        """``done`` of the ``total`` epochs of expert training in this round are finished."""

    def on_step(self, done: int, total: int) -> None:
        """``done`` of the run's ``total`` synthetic steps are finished."""

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        """``iteration`` outer iterations are finished; ``loss`` is the last one's mean per step."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run of ``task``: where it is, the real data, the synthetic images, who listens.

    checks: what must be finite, read at the end of each iteration.
    """

    task: Task
    position: Position
    real: RealData
    synthetic: SyntheticSet
    moments: Moments
    hooks: Sequence[Hook]
    observer: Observer
    checks: FiniteChecks
