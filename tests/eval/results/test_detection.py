"""Detection over seeds against counted pairs, and calibrated alarms by hand."""

from __future__ import annotations

from typing import Any

import pytest

from distillsec.eval.results.detection import detection_of_models, detection_of_sets
from distillsec.eval.results.metrics import summarise


def test_sets_are_compared_with_clean_sets_of_other_seeds() -> None:
    def outcome(ours: float, clean: float) -> dict[str, Any]:
        return {"set_statistic": summarise([ours]), "control_set_statistic": summarise([clean])}

    pairs = [outcome(5, 1), outcome(2, 2), outcome(9, 3)]
    found = detection_of_sets(pairs)
    # Pairs: 5 is above all three, 2 is above one and equal to one, 9 is above all three.
    assert found["set_auroc"].mean == pytest.approx((3 + 1.5 + 3) / 9)
    assert found["set_auroc"].ci95 is not None
    assert found.keys() == {"set_auroc"}  # three clean sets calibrate nothing
    assert detection_of_sets([outcome(5, 1)]) == {}
    made = [{"set_statistic": summarise([value / 10])} for value in range(1, 20)]
    assert found.keys() < detection_of_sets(pairs, made).keys()
    calibrated = detection_of_sets(pairs, made)
    # 19 clean sets and two twins: the second largest statistic is the limit, 2, 1.9 and 1.9.
    assert calibrated["set_alarm_calibrated"].values == (1, 1, 1)
    assert calibrated["control_set_alarm_calibrated"].values == (0, 1, 1)
    assert "set_alarm_calibrated" not in detection_of_sets(pairs, made[:17])


def test_each_model_is_compared_with_clean_models_of_other_seeds() -> None:
    def outcome(ours: list[float], clean: list[float], right: list[float]) -> dict[str, Any]:
        values = {
            "model_statistic": ours,
            "target_suspected": right,
            "control_model_statistic": clean,
        }
        return {name: summarise(each) for name, each in values.items()}

    outcomes = [
        outcome([5, 1], [1, 0], [1, 1]),
        outcome([4, 6], [3, 0], [1, 0]),
        outcome([9, 9], [2, 2], [0, 1]),
    ]
    found = detection_of_models(outcomes)
    ours, clean = [5, 1, 4, 6, 9, 9], [1, 0, 3, 0, 2, 2]
    pairs = [(a > b) + 0.5 * (a == b) for a in ours for b in clean]
    assert found["model_auroc"].mean == pytest.approx(sum(pairs) / 36)
    assert found.keys() == {"model_auroc"}
    clean_models = [{"model_statistic": summarise([0.0, 4.5])}]
    clean_models += [{"model_statistic": summarise([0.0, 0.5])}] * 16
    assert detection_of_models(outcomes, clean_models).keys() == found.keys()  # 17 and 2 sets
    clean_models += [{"model_statistic": summarise([4.5, 4.5])}]
    found = detection_of_models(outcomes, clean_models)  # 40 models of 20 sets: limits 4.5
    assert found["alarm_calibrated"].values == (0.5, 0.5, 1)
    assert found["control_alarm_calibrated"].values == (0, 0, 0)
    assert found["target_found_calibrated"].values == (0.5, 0, 0.5)
    assert detection_of_models(outcomes[:1]) == {}
    nameless = [{k: v for k, v in each.items() if k != "target_suspected"} for each in outcomes]
    assert "target_found_calibrated" not in detection_of_models(nameless, clean_models)
    assert detection_of_models([{"model_statistic": summarise([1.0])}] * 3) == {}
