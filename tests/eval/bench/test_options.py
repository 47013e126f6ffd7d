"""Options of a bench, and the choice of defenses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distillsec.distill.types import RequestError
from distillsec.eval.bench import options as bench_options
from distillsec.eval.bench.options import BenchOptions, choose_defenses, make_defense

MakeBench = Callable[..., Any]
MakeToy = Callable[..., Any]


def test_a_quick_budget_measures_fewer_images() -> None:
    assert BenchOptions().most_images == 500
    assert BenchOptions(budget="paper").most_images is None
    assert BenchOptions(images=7).most_images == BenchOptions(budget="paper", images=7).most_images


def test_options_of_a_defense_and_of_its_budget(
    toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    corner, watching = type(toy("corner")), type(toy("watching"))
    monkeypatch.setattr(corner, "quick", {"level": 1})
    monkeypatch.setattr(bench_options, "DEFENSES", {"corner": corner, "watching": watching})
    monkeypatch.setattr(bench_options, "GROUPS", {"all": ("corner", "watching")})

    def level(budget: Any, **options: Any) -> int:
        made = make_defense("corner", budget, options)
        return int(made.options.model_dump()["level"])

    assert (level("quick"), level("paper"), level("quick", level=9)) == (1, 3, 9)
    assert list(choose_defenses(["all", "corner"], "quick", {})) == ["corner", "watching"]
    for names, options, text in (
        (["cornr"], {}, "unknown defense 'cornr'.*did you mean corner"),
        (["corner"], {"corner": {"lvl": 1}}, "corner has no option lvl; it takes level"),
        (["corner"], {"corner": {"level": "x"}}, "corner: level: .*got 'x'"),
        (["corner"], {"watching": {"level": 1}}, "options for watching, which was not chosen"),
        (["corner:Nope"], {}, "no module corner"),
    ):
        with pytest.raises(RequestError, match=text):
            choose_defenses(names, "quick", options)
