"""The tuned budget: a defender chooses a defense's settings by the accuracy on held-out images.

Neither a trigger nor an attack success rate is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from typing import Any, final

import torch
from torch import nn

from ..distill.training import fit, predict
from ..distill.types import Batch, DistillsecError
from .base import DefenderView, Defense, Predictor, Purifier, Repairer, Sanitiser, Trainer

ALLOWED_LOSS = 0.02
"""How much held-out accuracy a setting may lose against the victim."""
LEAST_IMAGES = 20
"""With fewer held-out images nothing is chosen: half of them measure the accuracy."""
_NAME = "tuned"


@final
@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting that was tried. accuracy: on the second half of the held-out images; ``None`` if
    the setting failed, for this ``reason``. chosen: whether it is used."""

    options: dict[str, Any]
    accuracy: float | None
    reason: str | None = None
    chosen: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The settings that a tuned defender tried. least: the held-out accuracy that a setting must
    keep; ``None`` if nothing was compared. caution: why the choice means little."""

    least: float | None = None
    tried: list[Tried] = field(default_factory=list)
    caution: str | None = None


def candidates(defense: Defense) -> list[Defense]:
    """``defense`` with each setting of its grid, from the gentlest to the strongest.

    Options that the user set stay; settings that are then equal are tried once.
    """
    given = defense.options.model_dump(include=defense.options.model_fields_set)
    found: list[Defense] = []
    for changes in defense.grid:
        options = type(defense.options).model_validate({**changes, **given})
        if all(options != each.options for each in found):
            found.append(type(defense)(options))
    return found


def tune_defense(defense: Defense, view: DefenderView) -> tuple[Defense, Tuning]:
    """The strongest setting in ``defense.grid`` that keeps the accuracy on clean images.

    While settings are compared, the defense gets half of the held-out images, and the other half
    measures the accuracy. Of the settings within ``ALLOWED_LOSS`` of the victim's accuracy the last
    in the grid is used; if there is none, the most accurate one. ``defense`` is returned unchanged
    if no setting succeeds or there are fewer than ``LEAST_IMAGES`` held-out images.
    """
    if len(view.holdout) < LEAST_IMAGES:
        return defense, Tuning(caution="too few held-out images to choose settings")
    given, measuring = _halves(view)
    least = _accuracy(partial(predict, view.victim), measuring) - ALLOWED_LOSS
    choices = candidates(defense)
    tried = [_measured(choice, given, measuring) for choice in choices]
    known = {n: each.accuracy for n, each in enumerate(tried) if each.accuracy is not None}
    if not known:
        return defense, Tuning(least=least, tried=tried, caution="no setting succeeded")
    accurate = [number for number, accuracy in known.items() if accuracy >= least]
    best = accurate[-1] if accurate else max(known, key=lambda number: known[number])
    tried[best] = replace(tried[best], chosen=True)
    caution = None if accurate else f"no setting keeps the held-out accuracy ({least:.3f})"
    return choices[best], Tuning(least=least, tried=tried, caution=caution)


@singledispatch
def predictor_of(defense: Defense, view: DefenderView) -> Predictor:
    """The predictor behind ``defense``: a repaired or newly trained model, or a purifier.

    Errors: ``TypeError`` for a detector, which does not classify images.
    """
    raise TypeError(f"{type(defense).__name__} is a detector and does not classify images")


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
    first, second = order[: count // 2], order[count // 2 :]
    return view.with_holdout(view.holdout.rows(first)), view.holdout.rows(second)


def _measured(defense: Defense, view: DefenderView, clean: Batch) -> Tried:
    options = defense.options.model_dump(mode="json")
    reason = defense.not_applicable_because(view)
    accuracy = None
    if reason is None:
        try:
            accuracy = _accuracy(predictor_of(defense, view), clean)
        except torch.OutOfMemoryError:
            raise
        except (DistillsecError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
    return Tried(options=options, accuracy=accuracy, reason=reason)


def _accuracy(predictor: Callable[[torch.Tensor], torch.Tensor], clean: Batch) -> float:
    return float((predictor(clean.images) == clean.labels).double().mean())
