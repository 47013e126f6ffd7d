"""One victim of one set: what its defender sees, what only the evaluator knows, what is measured.

A defense is given its view and images, never what the evaluator knows; the images on which inputs
are told apart come in one shuffled tensor, clean and triggered alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, singledispatch
from typing import final

import torch
from sklearn.metrics import roc_auc_score
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

Numbers = dict[str, float | None]

# False-positive rates at which a detector of inputs is read, with the names of its figures.
_RATES = {0.01: "1", 0.05: "5"}
CALIBRATED = 0.05
"""The false-positive rate at which a calibrated threshold aims, where there is one."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Clean and triggered images, shuffled into one tensor. triggered: ``bool (N,)``."""

    images: Tensor
    triggered: Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A view, and the truth beside it.

    test: clean test images, none of them in the view's holdout; case: the same with the trigger,
    ``None`` where none is known. inputs: the eligible ones, clean and triggered. poisoned:
    ``bool (N,)``, the set's poisoned rows, where rows can be told. retrain: a fresh victim, the
    view's own twin, trained on another set.
    """

    view: DefenderView
    test: Batch
    case: TestCase | None
    inputs: Inputs | None
    poisoned: Tensor | None
    retrain: Callable[[DistilledSet], nn.Module]


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """What one defense did in one trial. rows: the scores of the set's rows, where it gave any."""

    numbers: Numbers
    rows: Tensor | None = field(default=None)


def shuffle_inputs(test: Batch, case: TestCase, generator: torch.Generator) -> Inputs | None:
    """The eligible images, each once clean and once triggered; ``None`` where there are none."""
    eligible = case.eligible
    if not bool(eligible.any()):
        return None
    images = torch.cat([test.images[eligible], case.triggered[eligible]])
    triggered = torch.arange(len(images), device=images.device) >= len(images) // 2
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return Inputs(images=images[order], triggered=triggered[order])


MEASURED = (SetScorer, Sanitiser, Trainer, InputScorer, Purifier, Inspector, Repairer)
"""The families; a defense belongs to one of them."""


@singledispatch
def measure(defense: Defense, trial: Trial) -> Measured:
    """Run ``defense`` in ``trial`` and measure it as its family is measured.

    Errors: ``RunError`` for an answer that breaks the family's promise: a wrong shape, a score that
    is not finite.
    """
    raise TypeError(f"{type(defense).__name__} is of no family")


@measure.register
def _(defense: SetScorer, trial: Trial) -> Measured:
    answer = defense.score_set(trial.view)
    _finite(defense, answer.statistic)
    rows, flagged = answer.rows.detach().double(), answer.flagged.bool()
    _promised(defense, rows, len(trial.view.labels))
    _promised(defense, flagged, len(trial.view.labels))
    numbers: Numbers = {
        "set_statistic": float(answer.statistic),
        "set_alarm": None if answer.alarm is None else float(answer.alarm),
        "rows_flagged": share(flagged),
    }
    if defense.names_class:
        numbers |= _named(answer.suspect, answer.alarm, trial.case)
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
        raise RequestError("no trigger is known: there are no triggered inputs to tell from clean")
    scores = _input_scores(defense, view, inputs.images)
    clean, triggered = scores[~inputs.triggered], scores[inputs.triggered]
    numbers: Numbers = {"auroc": auroc(scores, inputs.triggered)}
    if len(view.holdout):
        known = _input_scores(defense, view, view.holdout.images)
        for rate, name in _RATES.items():
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
        _finite(defense, value)
    return Measured(numbers | dict(figures))


@measure.register
def _(defense: Inspector, trial: Trial) -> Measured:
    answer = defense.inspect(trial.view)
    numbers: Numbers = {"model_statistic": answer.statistic}
    _finite(defense, answer.statistic)
    if answer.alarm is not None:
        numbers["alarm"] = float(answer.alarm)
    if answer.anomaly is not None:
        _promised(defense, answer.anomaly, trial.view.classes)
        numbers |= _named(answer.suspect, answer.alarm, trial.case)
    return Measured(numbers)


def undefended(trial: Trial) -> Numbers:
    """What the victim scores with no defense."""
    return rates_of(partial(predict, trial.view.victim), trial.test, trial.case)


def shared_tensors(trial: Trial) -> list[Tensor]:
    """The tensors that a defense is given and must not change, but the victim's: of that one each
    defense has a copy."""
    view, case, inputs = trial.view, trial.case, trial.inputs
    batches = (view.distilled.batch, view.holdout, trial.test)
    found = [tensor for batch in batches for tensor in (batch.images, batch.labels)]
    found += [] if case is None else [case.triggered, case.targets, case.eligible]
    return found + ([] if inputs is None else [inputs.images, inputs.triggered])


def calibrated(measured: list[Measured], twins: list[Measured], poisoned: Tensor | None) -> None:
    """Read row scores at a threshold that clean sets set, and add the figures in place.

    The threshold for a victim is the 95 % quantile of the clean twin's rows as the next victim sees
    them: a network that shares nothing with this one but its architecture and data.
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


def effectiveness(before: Numbers, after: Numbers) -> float | None:
    """Defense effectiveness rating: (max(0, ΔASR) − max(0, ΔCTA) + 1) / 2, Δ = before − after.

    Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
    ICCV 2023. 0 to 1; a half: nothing gained and nothing lost.
    """
    drops = []
    for name in ("attack_success_rate", "clean_test_accuracy"):
        first, then = before.get(name), after.get(name)
        if first is None or then is None:
            return None
        drops.append(max(0.0, first - then))
    return (drops[0] - drops[1] + 1) / 2


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve of ``scores`` (N,); ``None`` where all are of one kind."""
    if bool(positive.all()) or not bool(positive.any()):
        return None
    return float(roc_auc_score(positive.cpu().numpy(), scores.cpu().numpy()))


def _input_scores(defense: InputScorer, view: DefenderView, images: Tensor) -> Tensor:
    scores = defense.score_inputs(view, images).detach().double()
    _promised(defense, scores, len(images))
    return scores


def _promised(defense: Defense, values: Tensor, count: int) -> None:
    if values.shape != (count,) or not bool(values.isfinite().all()):
        raise RunError(
            f"{defense.name}: expected {count} finite numbers, got shape {tuple(values.shape)}, "
            f"{int((~values.isfinite()).sum())} of them not finite"
        )


def _finite(defense: Defense, value: float) -> None:
    if not math.isfinite(value):
        raise RunError(f"{defense.name}: one of its figures is {value}")


def _named(suspect: int | None, alarm: bool | None, case: TestCase | None) -> Numbers:
    """Whether the target is the most anomalous class (chance: 1 / classes), and whether an alarm
    says so."""
    if case is None or case.target is None:
        return {}
    right = float(suspect == case.target)
    numbers: Numbers = {"target_suspected": right}
    return numbers if alarm is None else numbers | {"target_found": right * alarm}
