"""What hooks may read at an event, made only where a hook listens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import final

from torch import nn

from ..networks.makers import NetworkMaker
from ..networks.variants import VariantName, maker_of
from ..training import fit
from ..types import RequestError
from .hooks import Moment
from .position import Position
from .synthetic import SyntheticSet
from .task import Task

_UNTRAINED = 2  # ``_train_student`` uses 0 and 1 as the last number of its keys


@final
class Moments:
    """Makes the moments of one run."""

    def __init__(self, task: Task, position: Position, synthetic: SyntheticSet) -> None:
        self.position = position
        self._task, self._synthetic = task, synthetic

    def at(self, event: str, network: nn.Module | None = None) -> Callable[[], Moment]:
        """A function that makes the moment of ``event``. network: the live one, which is copied."""
        return partial(self._make, event, network)

    def _make(self, event: str, network: nn.Module | None) -> Moment:
        position, synthetic = self.position, self._synthetic
        key = position.next_attack_key(event)
        students, networks = itertools.count(), itertools.count()
        return Moment(
            phase=position.phase,
            iteration=position.iteration,
            step=position.step,
            progress=position.progress,
            network=None if network is None else frozen_copy(network),
            real=self._task.real,
            synthetic=synthetic.batch() if synthetic.has_images else None,
            recipe=synthetic.recipe,
            fresh_network=lambda variant="own": self._fresh_network(variant, *key, next(networks)),
            train_student=lambda: self._train_student(*key, next(students)),
            rng=self._task.streams.generator("attack", *key),
            engine=self._task.engine,
        )

    def _fresh_network(self, variant: VariantName, *key: int) -> nn.Module:
        """An untrained network, other than those of ``_train_student``."""
        make = self._task.network
        if variant != "own":
            if not isinstance(make, NetworkMaker):
                raise RequestError(f"the task's networks have no variant {variant}")
            make = maker_of(make, variant)
        return make(self._task.streams.integer("attack", *key, _UNTRAINED))

    def _train_student(self, *key: int) -> nn.Module:
        """A fresh network trained on the current set by its recipe."""
        streams, synthetic = self._task.streams, self._synthetic
        network = self._task.network(streams.integer("attack", *key, 0))
        generator = streams.generator("attack", *key, 1)
        return fit(network, synthetic.batch(), synthetic.recipe, generator, self._task.engine)


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy that hooks may call and differentiate through, but not train."""
    return copy.deepcopy(network).eval().requires_grad_(False)
