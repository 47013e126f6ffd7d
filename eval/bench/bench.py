"""The bench: a set and its clean twin, their victims, and one defense after the other on both."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...attacks import TestCase
from ...defenses import DEFENSES
from ...defenses.base import Budget, DefenderView, Defense
from ...defenses.tuned import tune_defense
from ...distill.networks.makers import NetworkMaker
from ...distill.preprocessing import digest
from ...distill.randomness import Streams
from ...distill.types import Batch, DistilledSet, DistillsecError, RequestError, RunError
from ..config.schema import Section, build_options, find_class
from ..results.metrics import collect
from ..results.record import Metrics, Outcome
from ..run.checks import out_of_memory
from ..run.workshop import Workshop
from .store import VictimStore
from .trial import (
    MEASURED,
    Inputs,
    Measured,
    Trial,
    calibrated,
    effectiveness,
    measure,
    shared_tensors,
    shuffle_inputs,
    undefended,
)
from .untouched import Untouched, same_network

QUICK_IMAGES = 500
VICTIMS: Mapping[Budget, int] = {"quick": 2, "paper": 5, "tuned": 5}
"""How many victims a budget measures, where nobody says."""


@final
class BenchOptions(Section):
    """What holds for every defense of one run of the bench."""

    budget: Budget = Field(
        "quick",
        description="paper: published settings; tuned: the strongest settings that keep the "
        "accuracy on held-out images; quick: less work than published",
    )
    holdout: int = Field(100, ge=0, description="clean real images that the defender holds")
    images: int | None = Field(
        None, ge=1, description=f"test images measured (quick: {QUICK_IMAGES}, others: all)"
    )

    @property
    def most_images(self) -> int | None:
        """The cap on test images; ``None`` for none."""
        return QUICK_IMAGES if self.images is None and self.budget == "quick" else self.images


def make_defense(name: str, budget: Budget, given: Mapping[str, Any]) -> Defense:
    """A defense by name or ``package.module:Class``, with a budget's options and one's own.

    Errors: ``RequestError`` for an unknown name, option or value.
    """
    found: type[Defense] = find_class(name, DEFENSES, Defense, "defense")
    less = found.quick if budget == "quick" else {}
    return found(build_options(found.Options, {**less, **given}, name))


def choose_defenses(
    names: list[str], budget: Budget, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Defense]:
    """The defenses of ``names``, ``all`` for the whole catalogue, each with its options."""
    wanted = [each for name in names for each in (DEFENSES if name == "all" else [name])]
    idle = [name for name in options if name not in wanted]
    if idle:
        raise RequestError(f"options for {', '.join(idle)}, which was not chosen: --defense NAME")
    return {
        name: make_defense(name, budget, options.get(name, {})) for name in dict.fromkeys(wanted)
    }


def check_holdout(options: BenchOptions, workshop: Workshop) -> None:
    """Refuse a holdout that leaves nothing to measure on."""
    count = len(workshop.data.test)
    if options.holdout >= count:
        raise RequestError(
            f"holdout {options.holdout}: there are {count} test images, and some must be left to "
            "measure on"
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is defended: a set and its clean twin (``None`` where there is none), and the truth.

    case: the attack's test on the workshop's test images. poisoned: the set's poisoned rows.
    """

    workshop: Workshop
    attacked: DistilledSet
    twin: DistilledSet | None
    case: TestCase | None
    poisoned: Tensor | None


@final
class Bench:
    """The trials of one subject, made once, and the outcome of each defense over them."""

    def __init__(
        self,
        subject: Subject,
        options: BenchOptions,
        store: VictimStore,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._subject, self._options, self._store = subject, options, store
        self._progress = progress
        self._network = next(iter(subject.workshop.victim_networks().values()))
        count = subject.workshop.config.victims.victims
        self._holdout, self._test, self._case = self._split()
        self._inputs = self._mixed()
        sides = [side for side in (subject.attacked, subject.twin) if side is not None]
        self._trials: list[list[Trial]] = []
        for side in sides:
            poisoned = subject.poisoned if side is subject.attacked else None
            trials = []
            for number in range(count):
                trials.append(self._trial(side, number, poisoned))
                done = len(self._trials) * count + number + 1
                progress("training victims", done, count * len(sides))
            self._trials.append(trials)
        self._before = [[undefended(trial) for trial in side] for side in self._trials]
        self._shared = Untouched(
            tensor for side in self._trials for trial in side for tensor in shared_tensors(trial)
        )

    def before(self) -> Metrics:
        """What the victims score with no defense, on the images that defenses are measured on."""
        return collect(self._before[0], self._before[1] if len(self._before) > 1 else None)

    def outcome(self, defense: Defense, budget: Budget) -> Outcome:
        """One defense over all trials; whatever keeps it from an answer is its outcome too."""
        if not isinstance(defense, MEASURED):
            raise RequestError(f"{defense.name}: {type(defense).__name__} is of no family")
        began, trials = time.monotonic(), self._handed_out()
        view = trials[0][0].view
        told: dict[str, Any] = {
            "family": defense.family,
            "budget": budget,
            "options": defense.options.model_dump(mode="json"),
        }
        try:
            objection = defense.objection(view) or self._objection(defense)
            if objection:
                return Outcome(status="not applicable", reason=objection, **told)
            told["caution"] = defense.caution(view)
            metrics = self._measure(defense, budget, trials, told)
            if self._restored(trials):
                raise RunError(
                    f"{defense.name} changed what other defenses see (images, labels or the "
                    "victim): copy before changing"
                )
        except (Exception, SystemExit) as error:  # a user's defense runs here too; others go on
            if out_of_memory(error):
                raise
            self._restored(trials)
            text = str(error) if isinstance(error, DistillsecError) else repr(error)
            return Outcome(status="error", reason=" ".join(text.split()), **told)
        return Outcome(status="done", metrics=metrics, seconds=time.monotonic() - began, **told)

    def _objection(self, defense: Defense) -> str | None:
        if defense.family == "input scores" and self._inputs is None:
            return "no trigger is known: there are no triggered inputs to tell from clean ones"
        return None

    def _measure(
        self, defense: Defense, budget: Budget, trials: list[list[Trial]], told: dict[str, Any]
    ) -> Metrics:
        """The defense's figures over all trials. A tuned defender chooses the settings on the first
        victim, of the attacked set as of its twin; what was tried goes into ``told``."""
        total, cautions = sum(map(len, trials)), [told["caution"]]
        measured: list[list[Measured]] = []
        for name, side in zip(("attacked", "twin"), trials, strict=False):
            used, found = defense, []
            if budget == "tuned" and defense.grid:
                used, tuning = tune_defense(defense, side[0].view)
                told.setdefault("tuning", {})[name] = tuning
                cautions.append(tuning.caution)
            for trial in side:
                found.append(measure(used, trial))
                done = sum(map(len, measured)) + len(found)
                self._progress(defense.name, done, total)
            measured.append(found)
        told["caution"] = "; ".join(dict.fromkeys(filter(None, cautions))) or None
        if len(measured) > 1:
            calibrated(measured[0], measured[1], self._subject.poisoned)
        numbers = [[each.numbers for each in side] for side in measured]
        for before, after in zip(self._before[0], numbers[0], strict=True):
            rating = effectiveness(before, after)
            if rating is not None:
                after["defense_effectiveness_rating"] = rating
        return collect(numbers[0], numbers[1] if len(numbers) > 1 else None)

    def _handed_out(self) -> list[list[Trial]]:
        """The trials for one defense: each with a copy of its victim, all else shared."""
        return [
            [
                replace(trial, view=replace(trial.view, victim=copy.deepcopy(trial.view.victim)))
                for trial in side
            ]
            for side in self._trials
        ]

    def _restored(self, trials: list[list[Trial]]) -> bool:
        """Put back what a defense changed in ``trials``; whether it changed anything."""
        pairs = [
            (given.view, own.view)
            for givens, owns in zip(trials, self._trials, strict=True)
            for given, own in zip(givens, owns, strict=True)
        ]
        changed = self._shared.restore()
        changed |= not all(same_network(given.victim, own.victim) for given, own in pairs)
        if changed:  # what is remembered may rest on it
            for _, own in pairs:
                own.forget()
        return changed

    # Who sees what -----------------------------------------------------------------------------

    @cached_property
    def _chance(self) -> Streams:
        """The bench's random streams, of the defenders too.

        Their seed is a digest of the sets, not the run's seed: that one can be found by trying all
        small numbers, and would lead to the attack's draws.
        """
        sides = [side for side in (self._subject.attacked, self._subject.twin) if side is not None]
        tensors = [t for side in sides for t in (side.batch.images, side.batch.labels)]
        return Streams(int(digest(*tensors), 16))

    def _split(self) -> tuple[Batch, Batch, TestCase | None]:
        """The defender's clean images, and the others, which everything is measured on."""
        subject, options = self._subject, self._options
        test = subject.workshop.data.test
        generator = self._chance.generator("defense", "held-out images")
        order = torch.randperm(len(test), generator=generator).to(test.labels.device)
        held = order[: options.holdout]
        rest = order[options.holdout :][: options.most_images]
        holdout = replace(test.rows(held), index=None)
        case = None if subject.case is None else subject.case.rows(rest)
        return holdout, replace(test.rows(rest), index=None), case

    def _mixed(self) -> Inputs | None:
        if self._case is None:
            return None
        generator = self._chance.generator("defense", "order of inputs")
        return shuffle_inputs(self._test, self._case, generator)

    def _trial(self, side: DistilledSet, number: int, poisoned: Tensor | None) -> Trial:
        streams = self._subject.workshop.streams
        network: NetworkMaker = self._network

        def victim(distilled: DistilledSet) -> nn.Module:
            return self._store.victim(distilled, network, streams, number)

        view = DefenderView(
            distilled=side,
            victim=victim(side),
            network=network,
            holdout=self._holdout,
            entropy=self._chance.integer("defense", "view", number),
        )
        return Trial(
            view=view,
            test=self._test,
            case=self._case,
            inputs=self._inputs,
            poisoned=poisoned,
            retrain=victim,
        )
