"""Where a run is, and the random streams there."""

from __future__ import annotations

from typing import final

import torch

from ..randomness import StreamName, Streams
from .hooks import EVENTS, Phase

_NO_STEP = -1  # marks random streams of what happens between synthetic steps


@final
class Position:
    """Where a run is: its phase, its outer iteration, its synthetic step.

    iteration and step are counted from 0, the step over the whole run. total_steps: the run's
    synthetic steps.
    """

    def __init__(self, streams: Streams, iterations: int, steps_per_iteration: int) -> None:
        self.total_steps = iterations * steps_per_iteration
        self._streams, self._steps_per_iteration = streams, steps_per_iteration
        self.enter(0)

    def enter(self, iteration: int, step: int = 0) -> None:
        """Move to synthetic step ``step`` of ``iteration``, both counted from 0."""
        self.phase: Phase = "distill"
        self.iteration = iteration
        self.step = iteration * self._steps_per_iteration + step
        self._key: tuple[int, ...] = (self.step,)
        self._moments = 0

    def enter_expert(self, round_: int, expert: int, epoch: int) -> None:
        """Move to an expert's training; iteration and step stay."""
        self.phase = "expert"
        self._key = (_NO_STEP, round_, expert, epoch)
        self._moments = 0

    @property
    def progress(self) -> float:
        """The share of synthetic steps that are done, 0 to 1."""
        return self.step / max(1, self.total_steps)

    @property
    def is_last_step(self) -> bool:
        """Whether no synthetic step follows this one."""
        return self.step + 1 >= self.total_steps

    def generator(self, name: StreamName, *key: int) -> torch.Generator:
        """The stream ``name`` at this step."""
        return self._streams.generator(name, self.step, *key)

    def next_attack_key(self, event: str) -> tuple[int, ...]:
        """A key of the attack's stream for ``event`` here; each call gives another one."""
        self._moments += 1
        return (*self._key, EVENTS.index(event), self._moments)
