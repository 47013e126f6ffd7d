"""Comparisons with a baseline, checked against scipy and against known differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from scipy import stats

from distillsec.distill.types import RequestError
from distillsec.eval.report.compare import Comparison, compare
from distillsec.eval.report.load import load_experiment

Make = Callable[..., Path]
Cli = Callable[..., Result]
POINT = (("trigger_size", 3),)


def compared(ours: Path, theirs: Path) -> Comparison:
    (found,) = compare([load_experiment(ours)], load_experiment(theirs))
    return found


def of(found: Comparison, metric: str) -> Any:
    (change,) = [change for change in found.changes if change.metric == metric]
    return change


def test_the_paired_test_is_scipys(make_sweep: Make, tmp_path: Path) -> None:
    now = {0: 0.61, 1: 0.72, 2: 0.66, 3: 0.81, 4: 0.77}
    before = {0: 0.52, 1: 0.70, 2: 0.49, 3: 0.73, 4: 0.71}
    found = compared(
        make_sweep(tmp_path / "now", {POINT: now}, cta=0.85),
        make_sweep(tmp_path / "before", {POINT: before}),
    )
    change = of(found, "attack_success_rate")
    ours, theirs = np.array([*now.values()]), np.array([*before.values()])
    wanted = stats.ttest_rel(ours, theirs)
    interval = wanted.confidence_interval(0.95)
    assert change.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert change.ci95 == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert change.difference == pytest.approx((ours - theirs).mean())
    assert (change.before, change.now) == pytest.approx((theirs.mean(), ours.mean()))
    tested = [each.p for each in found.changes if each.p is not None]
    assert [each.q for each in found.changes] == pytest.approx(
        stats.false_discovery_control(tested).tolist()
    )
    # CTA changed by the same on every seed; the control did not change at all.
    assert of(found, "clean_test_accuracy").p == 0.0
    assert of(found, "clean_test_accuracy").verdict == "more than noise"
    assert of(found, "control_attack_success_rate").p == 1.0
    assert of(found, "control_attack_success_rate").verdict == "within noise"


def test_seeds_are_paired_by_number_not_by_position(make_sweep: Make, tmp_path: Path) -> None:
    """In another order, and with seeds that only one side has, the differences are all 0.1."""
    before = {0: 0.2, 1: 0.5, 2: 0.3, 7: 0.9}
    now = {9: 0.05, 2: 0.4, 0: 0.3, 1: 0.6}
    found = compared(
        make_sweep(tmp_path / "now", {POINT: now}),
        make_sweep(tmp_path / "before", {POINT: before}),
    )
    change = of(found, "attack_success_rate")
    assert change.seeds == (0, 1, 2)
    assert change.difference == pytest.approx(0.1)
    assert change.ci95 == pytest.approx((0.1, 0.1), abs=1e-9)
    assert change.verdict == "more than noise"


def test_noise_in_many_figures_is_not_reported_as_a_change(
    make_sweep: Make, tmp_path: Path
) -> None:
    rng = np.random.default_rng(28)
    draw = [dict(enumerate(rng.uniform(0.3, 0.7, 4).tolist())) for _ in range(40)]
    points = {(("trigger_size", size),): draw[size] for size in range(20)}
    others = {(("trigger_size", size),): draw[20 + size] for size in range(20)}
    found = compared(
        make_sweep(tmp_path / "now", points, files=False),
        make_sweep(tmp_path / "before", others, files=False),
    )
    moved = [c for c in found.changes if c.metric in ("attack_success_rate", "backdoor_gain")]
    assert any(
        change.p is not None and change.p < 0.05 for change in moved
    )  # by chance, as some must be
    assert not any(change.verdict == "more than noise" for change in moved)


def test_two_seeds_are_too_few(make_sweep: Make, tmp_path: Path) -> None:
    found = compared(
        make_sweep(tmp_path / "now", {POINT: {0: 0.9, 1: 0.91, 5: 0.9}}),
        make_sweep(tmp_path / "before", {POINT: {0: 0.1, 1: 0.1, 6: 0.1}}),
    )
    change = of(found, "attack_success_rate")
    assert change.verdict == "too few seeds"
    assert (change.p, change.q) == (None, None)
    assert change.ci95 is None  # two values have no interval


def test_rows_without_a_partner_are_listed(make_sweep: Make, tmp_path: Path) -> None:
    rates = {0: 0.5, 1: 0.6, 2: 0.7}
    size = {n: (("trigger_size", n),) for n in (1, 2, 3)}
    found = compared(
        make_sweep(tmp_path / "now", {size[1]: rates, size[2]: rates}),
        make_sweep(tmp_path / "before", {size[2]: rates, size[3]: rates}),
    )
    assert found.missing == ["trigger_size 3, victims: convnet"]
    assert found.added == ["trigger_size 1, victims: convnet"]
    assert {change.row.varied["trigger_size"] for change in found.changes} == {2}
    # A point without figures is paired and listed as such.
    empty = make_sweep(tmp_path / "empty", {size[2]: {}})
    assert compared(empty, tmp_path / "before").unpaired == ["trigger_size 2, victims: convnet"]


def test_one_set_against_another_supports_no_claim(
    make_run: Make, cli: Cli, tmp_path: Path
) -> None:
    """However many victims: they are nested in their sets, and there is one seed."""
    now = make_run(tmp_path / "now", asr=0.9, keys={"trigger_size": 4})
    before = make_run(tmp_path / "before", asr=0.2, keys={"trigger_size": 3})
    found = compared(now, before)
    change = of(found, "attack_success_rate")
    assert (change.verdict, change.seeds, change.p) == ("too few seeds", (0,), None)
    assert found.one_set and ("trigger_size", 3, 4) in found.settings
    done = cli("report", now, "--baseline", before, "--format", "md")
    assert done.exit_code == 0, done.stderr
    assert "noise of distillation alone" in done.stdout
    assert "too few seeds" in done.stdout
    other = make_run(tmp_path / "other", seed=4)
    assert compared(now, other).unpaired == ["victims: convnet"]


def test_a_sweep_and_a_run_are_not_compared(
    make_run: Make, small_sweep: Path, tmp_path: Path
) -> None:
    run = load_experiment(make_run(tmp_path / "run"))
    with pytest.raises(RequestError, match=r"is a sweep, the baseline .* a run"):
        compare([load_experiment(small_sweep)], run)


def test_a_suites_rows_are_matched_by_setting_attack_network_and_defense(tmp_path: Path) -> None:
    def line(defense: str, values: list[float], network: str = "convnet") -> dict[str, Any]:
        summary = {"mean": sum(values) / len(values), "std": None, "ci95": None, "values": values}
        return {
            "setting": "digits",
            "attack": "naive",
            "network": network,
            "defense": defense,
            "family": None if defense == "none" else "repair",
            "cells": {"done": len(values)},
            "seeds": list(range(len(values))),
            "metrics": {"attack_success_rate": summary},
        }

    def suite(name: str, rows: list[dict[str, Any]]) -> Path:
        table = {"schema_version": 1, "kind": "benchmark", "status": "done", "suite": {}}
        table |= {"environment": {}, "command": "", "rows": rows, "failures": []}
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.json").write_text(json.dumps(table))
        return tmp_path / name

    first = [0.8, 0.7, 0.9, 0.85]
    before = suite("before", [line("none", first), line("nad", first), line("clp", first)])
    fell = [value - 0.5 - 0.01 * n for n, value in enumerate(first)]
    now = suite("now", [line("none", first), line("nad", fell), line("nad", first, "mlp")])
    found = compared(now, before)
    verdicts = {change.row.defense: change.verdict for change in found.changes}
    assert verdicts == {None: "within noise", "nad": "more than noise"}
    assert found.missing == ["setting digits, attack naive, victims: convnet, clp"]
    assert found.added == ["setting digits, attack naive, victims: mlp, nad"]
