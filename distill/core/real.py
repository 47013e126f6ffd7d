"""The real training data as the hooks show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from ..devices import moved
from ..training import shuffled
from ..types import Batch, RequestError, RunError
from .finite import FiniteChecks
from .hooks import Event, Hook, Value, fold, listeners
from .moments import Moments


@final
class RealData:
    """The training set ``batch``, as ``on_start`` left it.

    Every draw passes through ``on_sample`` and ``on_draw``. Errors: ``RequestError`` where one of
    the ``classes`` has no row left; ``RunError`` where a hook fails.
    """

    def __init__(
        self,
        batch: Batch,
        classes: int,
        hooks: Sequence[Hook],
        moments: Moments,
        checks: FiniteChecks,
    ) -> None:
        self.batch = batch
        self._hooks, self._moments, self._checks = hooks, moments, checks
        self._rows = [torch.nonzero(batch.labels == label)[:, 0] for label in range(classes)]
        empty = [label for label, rows in enumerate(self._rows) if not len(rows)]
        if empty:
            raise RequestError(f"class {empty[0]} has no training rows left: lower the poison rate")

    def draw(self, label: int, count: int, generator: torch.Generator) -> Batch:
        """At most ``count`` rows of class ``label``, without repetition."""
        rows = self._rows[label]
        order = torch.randperm(len(rows), generator=generator)[:count]
        return self._show(self._sample(label, rows[moved(order, rows.device)]))

    def draw_mixed(self, count: int, generator: torch.Generator) -> Batch:
        """At most ``count`` rows of all classes, in random order."""
        return next(self.batches(count, generator))

    def batches(
        self, size: int, generator: torch.Generator, count: int | None = None
    ) -> Iterator[Batch]:
        """``count`` rows (all) in random order, ``size`` at a time."""
        labels = self.batch.labels
        for rows in shuffled(len(self.batch), size, generator, labels.device, count):
            chosen = rows
            if listeners(self._hooks, "on_sample"):
                chosen = rows.clone()
                for label in labels[rows].unique().tolist():
                    own = labels[rows] == label
                    chosen[own] = self._sample(label, rows[own])
            yield self._show(chosen)

    def whole(self) -> Batch:
        """All rows in their order."""
        return self._show(torch.arange(len(self.batch), device=self.batch.labels.device))

    def _sample(self, label: int, rows: Tensor) -> Tensor:
        """The rows that the hooks choose in place of ``rows`` of class ``label``."""
        chosen = self._fold("on_sample", rows, label)
        if chosen is not rows and not bool(((chosen >= 0) & (chosen < len(self.batch))).all()):
            step = self._moments.position.step
            raise RunError(f"on_sample at step {step}: a row outside the training set")
        return chosen

    def _show(self, rows: Tensor) -> Batch:
        return self._fold("on_draw", self.batch.rows(rows))

    def _fold(self, event: Event, value: Value, *before: int) -> Value:
        moment = self._moments.at(event)
        return fold(self._hooks, event, moment, value, *before, checks=self._checks)
