"""The observer of a distillation: progress, checkpoints, the log, the learning curve."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

from ...attacks import Attack
from ...distill.core.resume import LoopState
from ...distill.core.run import Observer
from ...distill.types import Distillate, DistilledSet
from ..results.metrics import Scores, rates
from .folder import RunFolder
from .progress import Phase
from .setup import Setup
from .victims import train_victim


@final
class Watcher(Observer):
    """The loop's observer for one run folder.

    spent: seconds of work in earlier sessions. finish: the set that victims would get.
    """

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        attack: Attack | None,
        phase: Phase,
        spent: float,
        finish: Callable[[Distillate], DistilledSet],
    ) -> None:
        self._setup, self._folder, self._attack = setup, folder, attack
        self._phase, self._spent, self._finish = phase, spent, finish
        self._all_done = False
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Work on this distillation so far, earlier sessions included."""
        return self._spent + time.monotonic() - self._began

    def on_step(self, done: int, total: int) -> None:
        self._phase.reach(done)
        self._all_done = done == total

    def on_expert(self, done: int, total: int) -> None:
        self._phase.side("training experts", done, total)

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        config = self._setup.config
        row: dict[str, Any] = {"iteration": iteration, "loss": loss}
        if self._attack:
            row["trigger_linf"] = self._attack.trigger.describe()["linf"]
        every = config.run.curve_every
        if every and iteration % every == 0:
            row |= self._curve_point(made)
        row["seconds"] = round(self.seconds(), 3)
        self._folder.log(row)
        self._folder.save(state, config.key(), self.seconds(), force=self._all_done)
        values = {name: value for name, value in row.items() if name != "iteration"}
        self._phase.logged(self._folder.path, iteration, values)

    def _curve_point(self, made: Distillate) -> Scores:
        """The scores of one victim trained on the current set."""
        setup, test = self._setup, self._setup.data.test
        current, network = self._finish(made), setup.primary_network
        victim = train_victim(current, network, setup.streams, 0)
        case = self._attack.test_case(test.images, test.labels) if self._attack else None
        return rates(victim, test, case, network.engine)
