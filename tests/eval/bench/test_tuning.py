"""The tuned budget: settings are chosen by held-out accuracy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from distillsec.defenses.base import DefenderView, DefenseOptions, Repairer

MakeBench = Callable[..., Any]
MakeToy = Callable[..., Any]


class LevelOptions(DefenseOptions):
    level: int = 3


class Shift(Repairer):
    """Adds ``level / 10`` to the bias of class 0, which then gets more predictions."""

    name, Options = "shift", LevelOptions
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({"level": 0}, {"level": 1}, {"level": 1000})

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def repair(self, view: DefenderView) -> nn.Module:
        network = view.trainable_victim()
        with torch.no_grad():
            network.head.bias[0] += self.options.level / 10  # type: ignore[attr-defined,index,operator,union-attr]
        return network.requires_grad_(False)


def test_tuning_chooses_by_held_out_accuracy_alone(toy: MakeToy, make_bench: MakeBench) -> None:
    made = make_bench()
    outcome = made.bench.outcome(Shift(LevelOptions()), "tuned")
    assert outcome.status == "done" and outcome.options == {"level": 3}  # as given
    assert outcome.tuning.keys() == {"attacked", "twin"}
    for tuning in outcome.tuning.values():
        tried = tuning.tried
        assert [each.options["level"] for each in tried] == [0, 1, 1000]
        least = (tried[0].accuracy or 0) - 0.02  # level 0 is the victim itself
        assert tuning.least == pytest.approx(least) and tuning.caution is None
        wanted = max(n for n, each in enumerate(tried) if (each.accuracy or 0) >= least)
        assert [each.chosen for each in tried] == [n == wanted for n in range(3)]
    few = make_bench(holdout=19).bench.outcome(Shift(LevelOptions()), "tuned")
    assert few.caution == "too few held-out images to choose settings"
    assert all(tuning.tried == [] for tuning in few.tuning.values())
    assert made.bench.outcome(Shift(LevelOptions()), "paper").tuning == {}
    assert made.bench.outcome(toy("corner"), "tuned").tuning == {}  # it has no grid


def test_given_options_are_not_tuned(make_bench: MakeBench) -> None:
    outcome = make_bench().bench.outcome(Shift(LevelOptions(level=1)), "tuned")
    (tried,) = outcome.tuning["attacked"].tried  # the grid changes nothing else
    assert tried.options == {"level": 1} and tried.chosen


class Ruins(Shift):
    """Returns a broken network, or raises an error."""

    name = "ruins"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({"level": 1000}, {"level": 2000})

    def repair(self, view: DefenderView) -> nn.Module:
        if self.options.level == 2000:  # type: ignore[attr-defined]
            raise RuntimeError("no such\nkernel")
        return super().repair(view)


class Silent(Ruins):
    name = "silent"
    grid = ({"level": 2000},)

    def caution(self, view: DefenderView) -> str:
        return "of little use"


def test_tuning_reports_that_no_setting_is_good_enough(make_bench: MakeBench) -> None:
    made = make_bench()
    outcome = made.bench.outcome(Ruins(LevelOptions()), "tuned")
    tried = outcome.tuning["twin"].tried
    assert outcome.status == "done" and [each.chosen for each in tried] == [True, False]
    assert tried[1].accuracy is None and tried[1].reason == "no such kernel"
    assert (outcome.caution or "").startswith("no setting keeps the held-out accuracy (0.")
    silent = made.bench.outcome(Silent(LevelOptions()), "tuned")
    assert silent.caution == "of little use; no setting succeeded"
    assert not any(each.chosen for each in silent.tuning["attacked"].tried)
