"""Outcomes without figures: errors, and defenses that are not applicable."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.defenses.base import (
    DefenderView,
    Defense,
    DefenseOptions,
    InputScorer,
    SetScorer,
    SetScores,
)
from distillsec.distill.types import RequestError

MakeBench = Callable[..., Any]
MakeToy = Callable[..., Any]


class LevelOptions(DefenseOptions):
    level: int = 3


class Brightness(InputScorer):
    """Scores an input by its brightness."""

    name, Options = "brightness", LevelOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def threshold(self, view: DefenderView) -> None:
        return None


class Broken(Brightness):
    name = "broken"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return torch.full((len(images),), torch.nan)


class Crash(Brightness):
    name = "crash"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        raise ValueError("no luck\nat all")


class Refusing(Brightness):
    name = "refusing"

    def not_applicable_because(self, view: DefenderView) -> str:
        return "the network has no batch norm"


class Stray(Defense):
    """Belongs to no family."""

    name, Options = "stray", LevelOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options


@pytest.mark.parametrize(
    ("defense", "status", "reason"),
    [
        (Crash, "error", r"ValueError\('no luck.*at all'\)"),
        (
            Broken,
            "error",
            r"broken: expected (\d+) finite numbers, got shape .*, \1 of them not .*",
        ),
        (Refusing, "not applicable", "the network has no batch norm"),
    ],
)
def test_an_outcome_without_figures_has_a_reason(
    make_bench: MakeBench, defense: type[Brightness], status: str, reason: str
) -> None:
    outcome = make_bench().bench.outcome(defense(LevelOptions()), "paper")
    assert (outcome.status, outcome.budget) == (status, "paper")
    assert outcome.reason is not None and outcome.metrics == {}
    assert re.fullmatch(reason, outcome.reason)
    assert "\n" not in outcome.reason
    assert outcome.options == {"level": 3}


def test_without_a_trigger_detectors_of_inputs_are_not_applicable(
    toy: MakeToy, make_bench: MakeBench
) -> None:
    made = make_bench(without=("case", "twin"))
    outcome = made.bench.outcome(toy("corner"), "quick")
    assert outcome.status == "not applicable" and "no trigger is known" in (outcome.reason or "")
    assert made.bench.outcome(toy("zero"), "quick").metrics.keys() == {"clean_test_accuracy"}
    assert made.bench.outcome(toy("watching"), "quick").status == "done"


def test_a_class_of_no_family_is_refused(make_bench: MakeBench) -> None:
    with pytest.raises(RequestError, match="stray: Stray belongs to no family"):
        make_bench().bench.outcome(Stray(LevelOptions()), "quick")


class Infinite(SetScorer):
    """Its statistic is infinite."""

    name, Options = "infinite", LevelOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def score_set(self, view: DefenderView) -> SetScores:
        rows = torch.zeros(len(view.labels))
        return SetScores(rows=rows, flagged=rows > 0, statistic=float("inf"), alarm=None)


class Exits(Brightness):
    name = "exits"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        raise SystemExit(3)


def test_infinite_figures_and_exits_are_errors(make_bench: MakeBench) -> None:
    bench = make_bench().bench
    infinite = bench.outcome(Infinite(LevelOptions()), "quick")
    assert infinite.reason == "infinite: one of its figures is inf"
    assert bench.outcome(Exits(LevelOptions()), "quick").reason == "SystemExit(3)"
