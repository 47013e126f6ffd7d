"""The bench: trains victims on a set and on its clean twin, and measures defenses on both."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from ...attacks import TestCase
from ...defenses.base import Budget, DefenderView, Defense
from ...defenses.tuned import tune_defense
from ...distill.networks.makers import NetworkMaker
from ...distill.preprocessing import digest
from ...distill.randomness import Streams
from ...distill.types import Batch, DistilledSet, DistillsecError, RequestError, RunError
from ..results.metrics import collect, effectiveness
from ..results.record import Metrics, Outcome
from ..run.checks import out_of_memory
from ..run.setup import Setup
from .options import BenchOptions
from .snapshot import TensorSnapshot, same_network
from .store import VictimStore
from .trial import (
    FAMILY_CLASSES,
    Measured,
    ShuffledInputs,
    Trial,
    add_calibrated_rates,
    measure,
    shared_tensors,
    shuffle_inputs,
    undefended,
)


def check_holdout(options: BenchOptions, setup: Setup) -> None:
    """Refuse a holdout that leaves no test image to measure on."""
    count = len(setup.data.test)
    if options.holdout >= count:
        raise RequestError(
            f"holdout {options.holdout}: there are {count} test images, and at least one must "
            "remain to measure on"
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SetUnderTest:
    """The set that is defended, its clean twin if there is one, and the truth.

    case: the test case of the attack on the setup's test images, if there is an attack.
    poisoned: ``bool (N,)``, the poisoned rows of the set, where they are known.
    """

    setup: Setup
    attacked: DistilledSet
    twin: DistilledSet | None
    case: TestCase | None
    poisoned: Tensor | None


@final
class Bench:
    """The trials of one set and its twin, made once, and the outcome of each defense over them.

    progress: called with what is done, how much of it, and of how much.
    """

    def __init__(
        self,
        tested: SetUnderTest,
        options: BenchOptions,
        store: VictimStore,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._tested, self._options, self._store = tested, options, store
        self._progress = progress
        self._network = tested.setup.primary_network
        count = tested.setup.config.victims.victims
        self._holdout, self._test, self._case = self._split()
        self._inputs = self._shuffled_inputs()
        sides = [side for side in (tested.attacked, tested.twin) if side is not None]
        self._trials: list[list[Trial]] = []
        for side in sides:
            poisoned = tested.poisoned if side is tested.attacked else None
            trials = []
            for number in range(count):
                trials.append(self._trial(side, number, poisoned))
                done = len(self._trials) * count + number + 1
                progress("training victims", done, count * len(sides))
            self._trials.append(trials)
        self._before = [[undefended(trial) for trial in side] for side in self._trials]
        self._shared = TensorSnapshot(
            tensor for side in self._trials for trial in side for tensor in shared_tensors(trial)
        )

    def before(self) -> Metrics:
        """The metrics of the victims without a defense, on the images that defenses get too."""
        return collect(self._before[0], self._before[1] if len(self._before) > 1 else None)

    def outcome(self, defense: Defense, budget: Budget) -> Outcome:
        """One defense over all trials. Its failure is an outcome too; only running out of memory
        raises."""
        if not isinstance(defense, FAMILY_CLASSES):
            raise RequestError(f"{defense.name}: {type(defense).__name__} belongs to no family")
        began, trials = time.monotonic(), self._copies()
        view = trials[0][0].view
        fields: dict[str, Any] = {
            "family": defense.family,
            "budget": budget,
            "options": defense.options.model_dump(mode="json"),
        }
        try:
            reason = defense.not_applicable_because(view) or self._not_applicable(defense)
            if reason:
                return Outcome(status="not applicable", reason=reason, **fields)
            fields["caution"] = defense.caution(view)
            metrics = self._measure(defense, budget, trials, fields)
            if self._restored(trials):
                raise RunError(
                    f"{defense.name} changed what other defenses see (images, labels or the "
                    "victim): copy before changing"
                )
        except (Exception, SystemExit) as error:  # a user's defense runs here; the others continue
            if out_of_memory(error):
                raise
            self._restored(trials)
            text = str(error) if isinstance(error, DistillsecError) else repr(error)
            return Outcome(status="error", reason=" ".join(text.split()), **fields)
        return Outcome(status="done", metrics=metrics, seconds=time.monotonic() - began, **fields)

    def _not_applicable(self, defense: Defense) -> str | None:
        if defense.family == "input scores" and self._inputs is None:
            return "no trigger is known: there are no triggered inputs to detect"
        return None

    def _measure(
        self, defense: Defense, budget: Budget, trials: list[list[Trial]], fields: dict[str, Any]
    ) -> Metrics:
        """The metrics of a defense over all trials.

        The tuned budget chooses settings on the first victim, separately for the attacked set and
        its twin. What was tried goes into ``fields``.
        """
        total, cautions = sum(map(len, trials)), [fields["caution"]]
        measured: list[list[Measured]] = []
        for name, side in zip(("attacked", "twin"), trials, strict=False):
            used, found = defense, []
            if budget == "tuned" and defense.grid:
                used, tuning = tune_defense(defense, side[0].view)
                fields.setdefault("tuning", {})[name] = tuning
                cautions.append(tuning.caution)
            for trial in side:
                found.append(measure(used, trial))
                done = sum(map(len, measured)) + len(found)
                self._progress(defense.name, done, total)
            measured.append(found)
        fields["caution"] = "; ".join(dict.fromkeys(filter(None, cautions))) or None
        if len(measured) > 1:
            add_calibrated_rates(measured[0], measured[1], self._tested.poisoned)
        numbers = [[each.numbers for each in side] for side in measured]
        for before, after in zip(self._before[0], numbers[0], strict=True):
            rating = effectiveness(before, after)
            if rating is not None:
                after["defense_effectiveness_rating"] = rating
        return collect(numbers[0], numbers[1] if len(numbers) > 1 else None)

    def _copies(self) -> list[list[Trial]]:
        """The trials for one defense: each has a copy of its victim and shares the rest."""
        return [
            [
                replace(trial, view=replace(trial.view, victim=copy.deepcopy(trial.view.victim)))
                for trial in side
            ]
            for side in self._trials
        ]

    def _restored(self, trials: list[list[Trial]]) -> bool:
        """Restore what a defense changed in ``trials``; returns whether it changed anything."""
        pairs = [
            (copied.view, own.view)
            for copies, owns in zip(trials, self._trials, strict=True)
            for copied, own in zip(copies, owns, strict=True)
        ]
        changed = self._shared.restore()
        changed |= not all(same_network(copied.victim, own.victim) for copied, own in pairs)
        if changed:  # the views cache what they computed from it
            for _, own in pairs:
                own.forget()
        return changed

    # The defender's images ---------------------------------------------------------------------

    @cached_property
    def _streams(self) -> Streams:
        """The random streams of the bench and of the defenders.

        Their seed is a digest of the sets. The run's seed is a small number: a defender could find
        it by trying, and with it the draws of the attack.
        """
        sides = [side for side in (self._tested.attacked, self._tested.twin) if side is not None]
        tensors = [t for side in sides for t in (side.batch.images, side.batch.labels)]
        return Streams(int(digest(*tensors), 16))

    def _split(self) -> tuple[Batch, Batch, TestCase | None]:
        """The defender's clean images; the other test images, and the test case on them."""
        tested, options = self._tested, self._options
        test = tested.setup.data.test
        generator = self._streams.generator("defense", "held-out images")
        order = torch.randperm(len(test), generator=generator).to(test.labels.device)
        held = order[: options.holdout]
        rest = order[options.holdout :][: options.most_images]
        holdout = replace(test.rows(held), index=None)
        case = None if tested.case is None else tested.case.rows(rest)
        return holdout, replace(test.rows(rest), index=None), case

    def _shuffled_inputs(self) -> ShuffledInputs | None:
        if self._case is None:
            return None
        generator = self._streams.generator("defense", "order of inputs")
        return shuffle_inputs(self._test, self._case, generator)

    def _trial(self, side: DistilledSet, number: int, poisoned: Tensor | None) -> Trial:
        streams = self._tested.setup.streams
        network: NetworkMaker = self._network

        def victim(distilled: DistilledSet) -> nn.Module:
            return self._store.victim(distilled, network, streams, number)

        view = DefenderView(
            distilled=side,
            victim=victim(side),
            network=network,
            holdout=self._holdout,
            entropy=self._streams.integer("defense", "view", number),
        )
        return Trial(
            view=view,
            test=self._test,
            case=self._case,
            inputs=self._inputs,
            poisoned=poisoned,
            retrain=victim,
        )
