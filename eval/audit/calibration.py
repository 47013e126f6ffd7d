"""Calibration: the evidence of clean sets, and the score of a set among them.

The score is exact in this sense: if a set that is audited is as those of the calibration, each of
the n + 1 sets is equally likely to have the highest score. So a set that exceeds all n clean ones
is a false alarm with a chance of 1 / (n + 1), and no smaller rate can be stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ...distill.files.safe import fault, read_json, write_json
from ...distill.types import RequestError
from ..results.record_parts import first_fault

SCORED: Final = ("inversion", "rows")
"""The kinds of evidence that a score adds up; others are reported only."""

_FEWEST: Final = 3
_LEAST_SPREAD: Final = 1e-6
_SHIPPED: Final = "calibrations"


@final
class Conditions(BaseModel):
    """What must be equal for a calibration to say something about a set.

    per_class: the smallest and the largest number of rows of a class. clean: the number of clean
    images. network: the victims' architecture. seed: of the victims.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    image_shape: tuple[int, int, int]
    classes: int
    per_class: tuple[int, int]
    network: dict[str, str | int]
    clean: int
    seed: int

    def difference(self, other: Conditions) -> list[str]:
        """Which of these ``other`` has differently, in words."""
        theirs = other.model_dump()
        return [
            f"{name.replace('_', ' ')} {_text(value)}, not {_text(theirs[name])}"
            for name, value in self.model_dump().items()
            if value != theirs[name]
        ]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return "×".join(map(str, value))
    return str(value)


@final
class CleanSet(BaseModel):
    """One clean set's evidence by kind, a number for each class."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    fingerprint: str
    evidence: dict[str, list[float]]


@final
class Calibration(BaseModel):
    """The evidence of clean sets under the same conditions. made_by: the command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["audit calibration"] = "audit calibration"
    schema_version: Literal[1] = 1
    made_by: str
    conditions: Conditions
    sets: list[CleanSet] = Field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write atomically as JSON."""
        write_json(path, self.model_dump(mode="json"))

    @property
    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that can be stated: ``1 / (n + 1)``."""
        return 1 / (len(self.sets) + 1)


def read_calibration(path: Path) -> Calibration:
    """The calibration in ``path``.

    Errors: ``RequestError`` naming the file where it is missing, damaged or something else.
    """
    return _checked(path, read_json(path))


def _checked(path: Path, found: Any) -> Calibration:
    try:
        calibration = Calibration.model_validate(found)
    except ValidationError as error:
        raise fault(path, f"no calibration of an audit: {first_fault(error)}") from error
    classes = calibration.conditions.classes
    kinds = {frozenset(each.evidence) for each in calibration.sets}
    lengths = {len(values) for each in calibration.sets for values in each.evidence.values()}
    if len(kinds) > 1 or lengths - {classes}:
        raise fault(path, f"its sets differ in their evidence, or it is not of {classes} classes")
    return calibration


def shipped_calibrations() -> list[Calibration]:
    """The calibrations in the package."""
    folder = resources.files(__package__).joinpath(_SHIPPED)
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".json"))
    found = []
    for name in files:
        with resources.as_file(folder.joinpath(name)) as path:
            found.append(read_calibration(path))
    return found


def fitting(conditions: Conditions, known: Sequence[Calibration]) -> Calibration:
    """The calibration of ``known`` that fits.

    Errors: ``RequestError`` that says what is different in the nearest one.
    """
    apart = [(each.conditions.difference(conditions), each) for each in known]
    if not apart:
        raise RequestError("there is no calibration")
    differences, nearest = min(apart, key=lambda pair: len(pair[0]))
    if differences:
        raise RequestError(f"the nearest calibration is for {'; '.join(differences)}")
    return nearest


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """A set's score among clean ones.

    suspect: the class with the highest score. value: its score, in deviations of clean sets.
    parts: what each kind of evidence gave, in the same unit. above: the share of sets, this one
    among them, with a score as high: the chance of a false alarm at this score.
    """

    suspect: int
    value: float
    parts: Mapping[str, float]
    above: float


def score(evidence: Mapping[str, Tensor], calibration: Calibration) -> Score:
    """The score of a set with this ``evidence``, each ``(K,)``.

    Each set, the clean ones too, is compared with all others: a class's evidence less the others'
    mean for this class, divided by their deviation (of this class, or of all classes where that is
    larger); the kinds are added and divided by the root of their number; the largest class counts.
    Errors: ``RequestError`` where kinds of evidence, or clean sets, are missing.
    """
    kinds = [kind for kind in SCORED if kind in evidence]
    if len(calibration.sets) < _FEWEST:
        raise RequestError(f"the calibration has {len(calibration.sets)} sets, expected {_FEWEST}")
    theirs = [kind for kind in SCORED if kind in calibration.sets[0].evidence]
    if kinds != theirs:
        have = f"the set has evidence of the kinds {', '.join(kinds)}"
        raise RequestError(f"{have}, the calibration {', '.join(theirs)}")
    parts = {
        kind: deviations(
            torch.stack(
                [
                    evidence[kind].double().cpu(),
                    *(torch.tensor(each.evidence[kind]).double() for each in calibration.sets),
                ]
            )
        )
        for kind in kinds
    }
    total = torch.stack(list(parts.values())).sum(dim=0) / len(parts) ** 0.5
    highest = total.amax(dim=1)
    suspect = int(total[0].argmax())
    return Score(
        suspect=suspect,
        value=float(highest[0]),
        parts={kind: float(values[0, suspect]) for kind, values in parts.items()},
        above=float((highest >= highest[0]).double().mean()),
    )


def deviations(values: Tensor) -> Tensor:
    """For each row of ``values (n, K)`` its distance from the mean of the others, in deviations.

    A column's deviation counts where it is larger than the root mean square of all columns'.
    """
    rows = []
    for number in range(len(values)):
        others = torch.cat([values[:number], values[number + 1 :]])
        spread = others.var(dim=0)
        spread = torch.maximum(spread, spread.mean()).sqrt().clamp(min=_LEAST_SPREAD)
        rows.append((values[number] - others.mean(dim=0)) / spread)
    return torch.stack(rows)
