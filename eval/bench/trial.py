"""A trial of a defense: one victim of one set, with the truth that only the evaluator knows.

A defense gets the view and images, never the truth. A detector of inputs gets clean and triggered
images in one shuffled tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, singledispatch
from typing import final

import torch
from torch import Tensor, nn

from ...attacks import TestCase
from ...defenses.base import (
    DefenderView,
    Defense,
    InputScorer,
    Inspector,
    Purifier,
    Repairer,
    Sanitiser,
    SetScorer,
    Trainer,
)
from ...defenses.tuned import predictor_of
from ...distill.training import predict
from ...distill.types import Batch, DistilledSet, RequestError, RunError
from ..results.metrics import rates, rates_of, share
from ..results.statistics import CALIBRATED, auroc

Numbers = dict[str, float | None]

# The false-positive rates of a detector of inputs, with the endings of its figures' names.
_FALSE_POSITIVE_RATES = {0.01: "1", 0.05: "5"}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ShuffledInputs:
    """Clean and triggered images, shuffled into one tensor. triggered: ``bool (N,)``."""

    images: Tensor
    triggered: Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """The view of a defender, and the truth.

    test: clean test images, none of them in the view's holdout. case: the same images with the
    trigger; ``None`` where no trigger is known. inputs: the eligible images, clean and triggered.
    poisoned: ``bool (N,)``, the poisoned rows of the set, where they are known. retrain: trains a
    new victim, with the seed of the view's victim, on another set.
    """

    view: DefenderView
    test: Batch
    case: TestCase | None
    inputs: ShuffledInputs | None
    poisoned: Tensor | None
    retrain: Callable[[DistilledSet], nn.Module]


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """The figures of one defense in one trial. rows: its scores of the set's rows, if any."""

    numbers: Numbers
    rows: Tensor | None = field(default=None)


def shuffle_inputs(
    test: Batch, case: TestCase, generator: torch.Generator
) -> ShuffledInputs | None:
    """The eligible images, each clean and triggered; ``None`` where there are none."""
    eligible = case.eligible
    if not bool(eligible.any()):
        return None
    images = torch.cat([test.images[eligible], case.triggered[eligible]])
    triggered = torch.arange(len(images), device=images.device) >= len(images) // 2
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return ShuffledInputs(images=images[order], triggered=triggered[order])


FAMILY_CLASSES = (SetScorer, Sanitiser, Trainer, InputScorer, Purifier, Inspector, Repairer)
"""The base classes of the families of defenses."""


@singledispatch
def measure(defense: Defense, trial: Trial) -> Measured:
    """Run ``defense`` in ``trial`` and measure it by the figures of its family.

    Errors: ``RunError`` for a result of the wrong shape, or with numbers that are not finite.
    """
    raise TypeError(f"{type(defense).__name__} belongs to no family")


@measure.register
def _(defense: SetScorer, trial: Trial) -> Measured:
    answer = defense.score_set(trial.view)
    _check_finite(defense, answer.statistic)
    rows, flagged = answer.rows.detach().double(), answer.flagged.bool()
    _check_numbers(defense, rows, len(trial.view.labels))
    _check_numbers(defense, flagged, len(trial.view.labels))
    numbers: Numbers = {
        "set_statistic": float(answer.statistic),
        "set_alarm": None if answer.alarm is None else float(answer.alarm),
        "rows_flagged": share(flagged),
    }
    if defense.names_class:
        numbers |= _target_figures(answer.suspect, answer.alarm, trial.case)
    poisoned = trial.poisoned
    if poisoned is not None:
        numbers["row_auroc"] = auroc(rows, poisoned)
        numbers["row_tpr_paper"] = share(flagged[poisoned])
        numbers["row_fpr_paper"] = share(flagged[~poisoned])
    return Measured(numbers, rows)


@measure.register
def _(defense: InputScorer, trial: Trial) -> Measured:
    inputs, view = trial.inputs, trial.view
    if inputs is None:
        raise RequestError("no trigger is known: there are no triggered inputs to detect")
    scores = _input_scores(defense, view, inputs.images)
    clean, triggered = scores[~inputs.triggered], scores[inputs.triggered]
    numbers: Numbers = {"auroc": auroc(scores, inputs.triggered)}
    if len(view.holdout):
        known = _input_scores(defense, view, view.holdout.images)
        for rate, name in _FALSE_POSITIVE_RATES.items():
            threshold = torch.quantile(known, 1 - rate, interpolation="higher")
            numbers[f"tpr_at_{name}"] = share(triggered > threshold)
            numbers[f"fpr_at_{name}"] = share(clean > threshold)
    paper = defense.threshold(view)
    if paper is not None:
        numbers["tpr_paper"] = share(triggered > paper)
        numbers["fpr_paper"] = share(clean > paper)
    return Measured(numbers)


@measure.register
def _(defense: Sanitiser, trial: Trial) -> Measured:
    cleaned = defense.sanitise(trial.view)
    numbers = dict(rates(trial.retrain(cleaned), trial.test, trial.case))
    return Measured(numbers | {"rows_left": len(cleaned.batch) / len(trial.view.labels)})


@measure.register(Repairer)
@measure.register(Purifier)
def _(defense: Repairer | Purifier, trial: Trial) -> Measured:
    return Measured(rates_of(predictor_of(defense, trial.view), trial.test, trial.case))


@measure.register
def _(defense: Trainer, trial: Trial) -> Measured:
    numbers = rates_of(predictor_of(defense, trial.view), trial.test, trial.case)
    figures = defense.figures(trial.view)
    for value in figures.values():
        _check_finite(defense, value)
    return Measured(numbers | dict(figures))


@measure.register
def _(defense: Inspector, trial: Trial) -> Measured:
    answer = defense.inspect(trial.view)
    numbers: Numbers = {"model_statistic": answer.statistic}
    _check_finite(defense, answer.statistic)
    if answer.alarm is not None:
        numbers["alarm"] = float(answer.alarm)
    if answer.anomaly is not None:
        _check_numbers(defense, answer.anomaly, trial.view.classes)
        numbers |= _target_figures(answer.suspect, answer.alarm, trial.case)
    return Measured(numbers)


def undefended(trial: Trial) -> Numbers:
    """The rates of the victim without a defense."""
    return rates_of(partial(predict, trial.view.victim), trial.test, trial.case)


def shared_tensors(trial: Trial) -> list[Tensor]:
    """The tensors that a defense gets and must not change, without the victim's: each defense gets
    a copy of the victim."""
    view, case, inputs = trial.view, trial.case, trial.inputs
    batches = (view.distilled.batch, view.holdout, trial.test)
    found = [tensor for batch in batches for tensor in (batch.images, batch.labels)]
    found += [] if case is None else [case.triggered, case.targets, case.eligible]
    return found + ([] if inputs is None else [inputs.images, inputs.triggered])


def add_calibrated_rates(
    measured: list[Measured], twins: list[Measured], poisoned: Tensor | None
) -> None:
    """Add the rates of row scores above a threshold from clean sets, in place.

    The threshold for a victim is the 95 % quantile of the scores of the clean twin's rows for the
    next victim: a network with the same architecture and data, and nothing else in common.
    """
    for number, (ours, theirs) in enumerate(zip(measured, twins, strict=True)):
        reference = twins[(number + 1) % len(twins)].rows
        if len(twins) < 2 or reference is None or ours.rows is None or theirs.rows is None:
            continue
        threshold = torch.quantile(reference, 1 - CALIBRATED, interpolation="higher")
        theirs.numbers["row_fpr_calibrated"] = share(theirs.rows > threshold)
        if poisoned is not None:
            ours.numbers["row_tpr_calibrated"] = share((ours.rows > threshold)[poisoned])
            ours.numbers["row_fpr_calibrated"] = share((ours.rows > threshold)[~poisoned])


def _input_scores(defense: InputScorer, view: DefenderView, images: Tensor) -> Tensor:
    scores = defense.score_inputs(view, images).detach().double()
    _check_numbers(defense, scores, len(images))
    return scores


def _check_numbers(defense: Defense, values: Tensor, count: int) -> None:
    if values.shape != (count,) or not bool(values.isfinite().all()):
        raise RunError(
            f"{defense.name}: expected {count} finite numbers, got shape {tuple(values.shape)}, "
            f"{int((~values.isfinite()).sum())} of them not finite"
        )


def _check_finite(defense: Defense, value: float) -> None:
    if not math.isfinite(value):
        raise RunError(f"{defense.name}: one of its figures is {value}")


def _target_figures(suspect: int | None, alarm: bool | None, case: TestCase | None) -> Numbers:
    """Whether the target is the most anomalous class (chance: 1 / classes), and whether an alarm is
    raised for it; nothing where the case has no single target."""
    if case is None or case.target is None:
        return {}
    correct = float(suspect == case.target)
    numbers: Numbers = {"target_suspected": correct}
    return numbers if alarm is None else numbers | {"target_found": correct * alarm}
