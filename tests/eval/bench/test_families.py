"""How each family of defenses is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distillsec.defenses.base import FAMILIES
from distillsec.eval.bench.bench import Bench, SetUnderTest
from distillsec.eval.bench.options import BenchOptions
from distillsec.eval.bench.store import VictimStore
from distillsec.eval.bench.trial import Measured, add_calibrated_rates

MakeBench = Callable[..., Any]
MakeToy = Callable[..., Any]


def test_every_family_is_measured(toy: MakeToy, make_bench: MakeBench) -> None:
    made = make_bench()
    names = ("watching", "halve", "fresh", "corner", "zero", "look", "nothing")
    outcomes = {name: made.bench.outcome(toy(name), "quick") for name in names}
    assert tuple(outcome.family for outcome in outcomes.values()) == FAMILIES
    look = outcomes["look"].metrics
    assert look["model_statistic"].mean == 0.5 and look["alarm"].mean == 1
    # It suspects class 9, which is not the target, with or without an alarm.
    assert look["target_found"].mean == look["target_suspected"].mean == 0
    assert outcomes["fresh"].metrics["epsilon"].values == (2.5, 2.5)
    for outcome in outcomes.values():
        assert outcome.status == "done"
        for summary in outcome.metrics.values():
            assert len(summary.values) == 2  # a value for each victim


def test_scores_of_inputs_by_brute_force(toy: MakeToy, make_bench: MakeBench) -> None:
    made = make_bench()
    bench = made.bench
    found = bench.outcome(toy("corner"), "quick").metrics
    case, test = bench._case, bench._test
    assert case is not None
    score = toy("corner").score_inputs
    view = made.views[0]
    clean = score(view, test.images[case.eligible]).double()
    triggered = score(view, case.triggered[case.eligible]).double()
    pairs = (triggered[:, None] > clean[None]).double() + 0.5 * (triggered[:, None] == clean[None])
    assert found["auroc"].mean == pytest.approx(float(pairs.mean()), abs=1e-12)
    held = score(view, view.holdout.images).double().sort().values
    threshold = held[-1 - int(0.05 * (len(held) - 1))]
    assert found["fpr_at_5"].mean == pytest.approx(float((clean > threshold).double().mean()))
    assert found["tpr_paper"].mean == float((triggered > 0.99).double().mean())
    assert found["control_auroc"] == found["auroc"]  # it does not use the victim


def test_without_a_holdout_there_is_no_calibrated_rate(toy: MakeToy, make_bench: MakeBench) -> None:
    found = make_bench(holdout=0).bench.outcome(toy("corner"), "quick").metrics
    assert "auroc" in found and "tpr_at_5" not in found and "fpr_paper" in found


def test_scores_of_rows_by_hand(toy: MakeToy, tested: SetUnderTest, tmp_path: Path) -> None:
    poisoned = torch.zeros(10, dtype=torch.bool)
    poisoned[[1, 9]] = True
    tested = dataclasses.replace(tested, poisoned=poisoned)
    bench = Bench(tested, BenchOptions(), VictimStore(tmp_path), lambda *_: None)
    found = bench.outcome(toy("watching"), "quick").metrics
    assert found["set_statistic"].mean == 45 and found["set_alarm"].mean == 1
    assert found["rows_flagged"].mean == pytest.approx(0.2)
    assert found["row_auroc"].mean == pytest.approx(9 / 16)  # rows 1, 9 among 0 to 9
    assert found["row_tpr_paper"].mean == 0.5 and found["row_fpr_paper"].mean == 1 / 8
    assert found["target_found"].mean == 0
    assert "control_row_auroc" not in found and "control_set_statistic" in found
    assert found["control_row_fpr_calibrated"].mean == pytest.approx(0.0)


def test_the_threshold_of_rows_is_from_the_next_victims_twin() -> None:
    def made(*values: float) -> Measured:
        return Measured({}, torch.tensor(values, dtype=torch.float64))

    poisoned = torch.tensor([True, False, False])
    ours, twins = [made(5, 3, 1), made(5, 3, 1)], [made(1, 2, 4), made(1, 2, 2)]
    add_calibrated_rates(ours, twins, poisoned)
    assert ours[0].numbers == {"row_tpr_calibrated": 1.0, "row_fpr_calibrated": 0.5}  # above 2
    assert ours[1].numbers == {"row_tpr_calibrated": 1.0, "row_fpr_calibrated": 0.0}  # above 4
    assert twins[0].numbers == {"row_fpr_calibrated": pytest.approx(1 / 3)}
    single = [made(1, 2, 3)]
    add_calibrated_rates(single, single, poisoned)
    assert single[0].numbers == {}


def test_accuracies_are_measured_on_the_set_and_its_twin(
    toy: MakeToy, make_bench: MakeBench
) -> None:
    made = make_bench()
    before = made.bench.before()
    found = made.bench.outcome(toy("zero"), "quick").metrics
    test = made.bench._test
    share = float((test.labels == 0).double().mean())
    assert found["clean_test_accuracy"].mean == pytest.approx(share)
    assert found["control_clean_test_accuracy"].mean == pytest.approx(share)
    assert found["attack_success_rate"].mean == 0
    asr, cta = before["attack_success_rate"].values, before["clean_test_accuracy"].values
    expected = [
        (max(0.0, a or 0) - max(0.0, (c or 0) - share) + 1) / 2
        for a, c in zip(asr, cta, strict=True)
    ]
    assert found["defense_effectiveness_rating"].values == pytest.approx(expected)
    nothing = made.bench.outcome(toy("nothing"), "quick").metrics
    assert nothing["attack_success_rate"] == before["attack_success_rate"]
    assert nothing["defense_effectiveness_rating"].mean == 0.5


def test_only_a_detector_that_names_classes_is_rated_by_the_target(
    toy: MakeToy, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, watching = make_bench().bench, toy("watching")
    assert "target_suspected" in bench.outcome(watching, "quick").metrics
    monkeypatch.setattr(type(watching), "names_class", False)
    assert "target_suspected" not in bench.outcome(watching, "quick").metrics
