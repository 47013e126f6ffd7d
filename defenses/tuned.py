"""The tuned budget: a defender chooses a defense's settings on clean held-out images.

Neither a trigger nor an attack success rate is known here, so none can be chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import Any, final

import torch
from torch import nn

from ..distill.training import fit, predict
from ..distill.types import Batch, DistillsecError
from .base import DefenderView, Defense, Predictor, Purifier, Repairer, Sanitiser, Trainer

ALLOWED_LOSS = 0.02
"""The held-out accuracy, below the victim's, that a setting may cost."""
LEAST_IMAGES = 20
"""Held-out images below which nothing is chosen: half of them measure the accuracy."""
_NAME = "tuned"


@final
@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting that was tried. accuracy: on the measuring half of the held-out images, ``None``
    where the setting gave no answer; reason: why not; chosen: whether it is the one used."""

    options: dict[str, Any]
    accuracy: float | None
    reason: str | None = None
    chosen: bool = False


def candidates(defense: Defense) -> Iterator[Defense]:
    """``defense`` with each setting of its grid, from the gentlest to the strongest."""
    for changes in defense.grid:
        options = type(defense.options).model_validate({**defense.options.model_dump(), **changes})
        yield type(defense)(options)


def tune_defense(defense: Defense, view: DefenderView) -> tuple[Defense, list[Tried]]:
    """The strongest setting in ``defense.grid`` that keeps the accuracy on clean images.

    Half of the held-out images are the defense's while settings are compared, the other half
    measure them. Of the settings within ``ALLOWED_LOSS`` of the victim's accuracy the last in the
    grid is used; where none is, the most accurate one. Returns it with all that was tried; the
    defense itself and an empty list where there is nothing to choose, or nothing to choose by.
    """
    if not defense.grid or len(view.holdout) < LEAST_IMAGES:
        return defense, []
    tuning, measuring = _halves(view)
    least = _accuracy(partial(predict, view.victim), measuring) - ALLOWED_LOSS
    choices = list(candidates(defense))
    tried = [_measured(choice, tuning, measuring) for choice in choices]
    usable = [number for number, each in enumerate(tried) if each.accuracy is not None]
    if not usable:
        return defense, tried
    accuracies = {number: tried[number].accuracy or 0.0 for number in usable}
    accurate = [number for number in usable if accuracies[number] >= least]
    best = accurate[-1] if accurate else max(usable, key=lambda number: accuracies[number])
    tried[best] = replace(tried[best], chosen=True)
    return choices[best], tried


@singledispatch
def predictor_of(defense: Defense, view: DefenderView) -> Predictor:
    """The predictor that ``defense`` gives: a repaired or newly trained model, a purified input.

    Errors: ``TypeError`` for a detector, which answers nothing.
    """
    raise TypeError(f"{type(defense).__name__} gives no predictor")


@predictor_of.register
def _(defense: Purifier, view: DefenderView) -> Predictor:
    return defense.purify(view)


@predictor_of.register
def _(defense: Repairer, view: DefenderView) -> Predictor:
    return partial(predict, defense.repair(view))


@predictor_of.register
def _(defense: Trainer, view: DefenderView) -> Predictor:
    return partial(predict, defense.train(view))


@predictor_of.register
def _(defense: Sanitiser, view: DefenderView) -> Predictor:
    cleaned = defense.sanitise(view)
    network: nn.Module = view.network(view.seed(_NAME, "weights"))
    generator = view.generator(_NAME, "training")
    return partial(predict, fit(network, cleaned.batch, cleaned.recipe, generator))


def _halves(view: DefenderView) -> tuple[DefenderView, Batch]:
    """The view with one half of its held-out images, and the other half."""
    count = len(view.holdout)
    order = torch.randperm(count, generator=view.generator(_NAME)).to(view.holdout.labels.device)
    mine, others = order[: count // 2], order[count // 2 :]
    return view.with_holdout(view.holdout.rows(mine)), view.holdout.rows(others)


def _measured(defense: Defense, view: DefenderView, clean: Batch) -> Tried:
    options = defense.options.model_dump(mode="json")
    reason = defense.objection(view)
    accuracy = None
    if reason is None:
        try:
            accuracy = _accuracy(predictor_of(defense, view), clean)
        except DistillsecError as error:
            reason = " ".join(str(error).split())
    return Tried(options=options, accuracy=accuracy, reason=reason)


def _accuracy(predictor: Callable[[torch.Tensor], torch.Tensor], clean: Batch) -> float:
    return float((predictor(clean.images) == clean.labels).double().mean())
