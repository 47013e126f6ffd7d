"""What a statistic of sets or of models tells: attacked ones against clean ones over the seeds.

Calibrated: an alarm is raised where a statistic is above those of all clean ones of the other
seeds, which is what a receiver with clean sets of his own can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .defense_tables import cell
from .metrics import Summary, summarise
from .record import Metrics
from .trial import auroc


def of_sets(outcomes: Sequence[Metrics]) -> Metrics:
    """What a set statistic tells, attacked against clean sets over the seeds.

    A set's statistic is the mean over the victims that looked at it.
    """
    pairs = [cell(metrics, "set_statistic") for metrics in outcomes]
    ours = [
        [pair.attacked] for pair in pairs if pair.attacked is not None and pair.twin is not None
    ]
    clean = [[pair.twin] for pair in pairs if pair.attacked is not None and pair.twin is not None]
    if len(ours) < 2:
        return {}
    limits = _limits(clean)
    return {
        "set_auroc": _area(ours, clean),
        "set_alarm_calibrated": _above(ours, limits),
        "control_set_alarm_calibrated": _above(clean, limits),
    }


def of_models(outcomes: Sequence[Metrics]) -> Metrics:
    """What a model's statistic tells, attacked against clean models, each victim by itself.

    The target is found where the calibrated alarm is raised and the target is the class with the
    largest anomaly.
    """
    wanted = ("model_statistic", "control_model_statistic")
    told = [metrics for metrics in outcomes if all(name in metrics for name in wanted)]
    ours, clean = ([_known(metrics[name]) for metrics in told] for name in wanted)
    if len(told) < 2 or not all(ours) or not all(clean):
        return {}
    limits = _limits(clean)
    found = {
        "model_auroc": _area(ours, clean),
        "alarm_calibrated": _above(ours, limits),
        "control_alarm_calibrated": _above(clean, limits),
    }
    if all("target_suspected" in metrics for metrics in told):
        right = [_known(metrics["target_suspected"]) for metrics in told]
        found["target_found_calibrated"] = _above(ours, limits, right)
    return found


def _known(summary: Summary) -> list[float]:
    return [value for value in summary.values if value is not None]


def _area(ours: list[list[float]], clean: list[list[float]]) -> Summary:
    """The area under the ROC curve, all seeds together."""
    positive, negative = ([value for seed in side for value in seed] for side in (ours, clean))
    statistics = torch.tensor([*positive, *negative], dtype=torch.float64)
    area = auroc(statistics, torch.arange(len(statistics)) < len(positive))
    return Summary(mean=area, std=None, ci95=None, values=(area,))


def _limits(clean: list[list[float]]) -> list[float]:
    """For each seed the largest clean statistic of all other seeds, which is what a receiver with
    clean sets of his own can know."""
    return [
        max(value for other, values in enumerate(clean) if other != seed for value in values)
        for seed in range(len(clean))
    ]


def _above(
    values: list[list[float]], limits: list[float], right: list[list[float]] | None = None
) -> Summary:
    """Each seed's share of statistics above its limit, of those that are ``right`` too."""
    counted = right or [[1.0] * len(seed) for seed in values]
    return summarise(
        [
            sum(float(value > limit) * good for value, good in zip(seed, goods, strict=True))
            / len(seed)
            for seed, limit, goods in zip(values, limits, counted, strict=True)
        ]
    )
