"""The thresholds of a benchmark's verdict."""

from __future__ import annotations

import pytest

from distillsec.eval.results.judgement import meets_thresholds
from distillsec.eval.results.metrics import summarise


@pytest.mark.parametrize(
    ("metrics", "holds"),
    [
        ({"row_auroc": 0.95, "auroc": 0.1}, True),
        ({"auroc": 0.89}, False),
        ({"model_auroc": 0.95}, True),
        ({"model_auroc": 0.95, "target_suspected": 0.7}, True),
        ({"model_auroc": 0.7, "target_suspected": 0.8}, True),
        ({"model_auroc": 0.7, "target_suspected": 0.7}, False),
        ({"attack_success_rate": 0.05, "clean_test_accuracy": 0.86}, True),
        ({"attack_success_rate": 0.05, "clean_test_accuracy": 0.84}, False),
        ({"attack_success_rate": 0.11, "clean_test_accuracy": 0.9}, False),
        ({"clean_test_accuracy": 0.9}, None),
    ],
)
def test_the_thresholds_of_each_kind_of_defense(
    metrics: dict[str, float], holds: bool | None
) -> None:
    given = {name: summarise([value]) for name, value in metrics.items()}
    before = {"attack_success_rate": summarise([0.8]), "clean_test_accuracy": summarise([0.9])}
    assert meets_thresholds(given, before) is holds
    weak = before | {"attack_success_rate": summarise([0.05])}
    if "attack_success_rate" in metrics:
        assert meets_thresholds(given, weak) is None
