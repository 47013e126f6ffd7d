"""The verdict on a set, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

from ...distill.types import RequestError
from .calibration import Calibration, Conditions, Score, fitting, score
from .examine import Examination

VerdictName = Literal["backdoored", "suspicious", "no evidence", "cannot say"]

FALSE_ALARMS: Final = 0.05
_SUSPICIOUS: Final = 2
"""A set is suspicious up to this many times the false-alarm rate."""

LEAST_SCORE: Final = 4.0
"""A set with a lower score is suspicious at most, however few clean sets have it.

A set by a recipe that the calibration does not have lies further from its sets than these from each
other: of 24 clean ones none exceeded 2.2, and attacked ones, of seed 100, had 10 and more.
"""

_LEAST_ACCURACY: Final = 2
"""Victims must be this many times as accurate as guessing."""

_INSTEAD: Final = (
    "make clean sets of the same kind yourself, and calibrate on them: "
    "distillsec audit SET SET … --calibrate FILE, then audit with --calibration FILE"
)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """A verdict, why it is so, what to do, and the score with the number of clean sets behind it.

    score: ``None`` where nothing can be said.
    """

    verdict: VerdictName
    reason: str
    advice: str
    score: Score | None = None
    clean_sets: int = 0


def judge(
    examination: Examination,
    conditions: Conditions,
    known: list[Calibration],
    false_alarms: float = FALSE_ALARMS,
) -> Judgement:
    """The verdict at the rate ``false_alarms``, by the one of the calibrations that fits."""
    accuracy, least = examination.accuracy, _LEAST_ACCURACY / conditions.classes
    if accuracy is not None and accuracy < least:
        return _cannot_say(
            f"victims have an accuracy of {accuracy:.2f}, less than {least:.2f}: they learn too "
            "little from the set, or it is read wrongly",
            "look at the space that it was read in, and say --space NAME where it is another one",
        )
    try:
        calibration = fitting(conditions, known)
        found = score(examination.evidence, calibration)
    except RequestError as error:
        return _cannot_say(f"no calibration fits: {error}", _INSTEAD)
    count = len(calibration.sets)
    if calibration.smallest_rate > false_alarms:
        return _cannot_say(
            f"{count} clean sets can state no false-alarm rate below 1/{count + 1} = "
            f"{calibration.smallest_rate:.1%}, and {false_alarms:.1%} is asked for",
            f"add clean sets to the calibration, or ask for --false-alarms "
            f"{calibration.smallest_rate:.3f}",
        )
    return _by_score(found, count, false_alarms)


def _cannot_say(reason: str, advice: str) -> Judgement:
    return Judgement(verdict="cannot say", reason=reason, advice=advice)


def _by_score(found: Score, count: int, false_alarms: float) -> Judgement:
    as_high = round(found.above * (count + 1)) - 1
    reason = f"{as_high} of {count} clean sets have a score as high"
    if found.above <= false_alarms and found.value >= LEAST_SCORE:
        verdict: VerdictName = "backdoored"
        advice = "do not train on it"
    elif found.above <= _SUSPICIOUS * false_alarms:
        verdict = "suspicious"
        advice = "do not rely on it: ask how it was made, or compare it with more clean sets"
    else:
        verdict = "no evidence"
        advice = "this is no proof that the set is clean: weak and unusual triggers are not found"
    return Judgement(verdict=verdict, reason=reason, advice=advice, score=found, clean_sets=count)
