"""How well a statistic of sets or models separates attacked ones from clean ones, over seeds.

Calibrated: an alarm is raised above the 95 % quantile of the statistics of clean sets: the twins of
the other seeds, and sets that were made for calibration. A receiver with clean sets of the same
kind can do the same. Fewer than twenty clean sets calibrate nothing: one clean set in nine, for
example, exceeds the largest of eight others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .columns import twin_pair
from .metrics import Summary, summarise
from .record import Metrics
from .statistics import CALIBRATED, auroc, auroc_interval

FEWEST_CLEAN = 20
"""A calibrated threshold needs as many clean sets."""


def detection_of_sets(outcomes: Sequence[Metrics], references: Sequence[Metrics] = ()) -> Metrics:
    """A set statistic's AUROC, attacked against clean sets over the seeds, and calibrated alarms.

    The statistic of a set is the mean over its victims. references: the metrics on clean sets that
    were made for calibration. Empty for fewer than two seeds.
    """
    pairs = [twin_pair(metrics, "set_statistic") for metrics in outcomes]
    known = [pair for pair in pairs if pair.attacked is not None and pair.twin is not None]
    if len(known) < 2:
        return {}
    ours = [[pair.attacked] for pair in known if pair.attacked is not None]
    clean = [[pair.twin] for pair in known if pair.twin is not None]
    more = [metrics["set_statistic"].mean for metrics in references if "set_statistic" in metrics]
    limits = _limits(clean, [[value] for value in more if value is not None])
    found = {"set_auroc": _area(ours, clean)}
    if limits:
        found["set_alarm_calibrated"] = _above(ours, limits)
        found["control_set_alarm_calibrated"] = _above(clean, limits)
    return found


def detection_of_models(outcomes: Sequence[Metrics], references: Sequence[Metrics] = ()) -> Metrics:
    """A model statistic's AUROC, attacked against clean models, and calibrated alarms.

    Each victim counts. The target is found where the calibrated alarm is raised and the target is
    the class with the largest anomaly. references: as for ``detection_of_sets``.
    """
    wanted = ("model_statistic", "control_model_statistic")
    known = [metrics for metrics in outcomes if all(name in metrics for name in wanted)]
    ours, clean = ([_values(metrics[name]) for metrics in known] for name in wanted)
    if len(known) < 2 or not all(ours) or not all(clean):
        return {}
    more = [_values(metrics[wanted[0]]) for metrics in references if wanted[0] in metrics]
    limits = _limits(clean, more)
    found = {"model_auroc": _area(ours, clean)}
    if limits:
        found["alarm_calibrated"] = _above(ours, limits)
        found["control_alarm_calibrated"] = _above(clean, limits)
        if all("target_suspected" in metrics for metrics in known):
            right = [_values(metrics["target_suspected"]) for metrics in known]
            found["target_found_calibrated"] = _above(ours, limits, right)
    return found


def _values(summary: Summary) -> list[float]:
    return [value for value in summary.values if value is not None]


def _area(ours: list[list[float]], clean: list[list[float]]) -> Summary:
    """The area under the ROC curve, all seeds together; its interval counts seeds, not victims."""
    positive, negative = ([value for seed in side for value in seed] for side in (ours, clean))
    statistics = torch.tensor([*positive, *negative], dtype=torch.float64)
    area = auroc(statistics, torch.arange(len(statistics)) < len(positive))
    interval = None if area is None else auroc_interval(area, len(ours), len(clean))
    return Summary(mean=area, std=None, ci95=interval, values=(area,))


def _limits(clean: list[list[float]], more: list[list[float]]) -> list[float]:
    """For each seed the threshold from all clean sets except its twin; empty for too few sets."""
    if len(clean) - 1 + len(more) < FEWEST_CLEAN:
        return []
    limits = []
    for seed in range(len(clean)):
        others = [*clean[:seed], *clean[seed + 1 :], *more]
        known = torch.tensor([value for values in others for value in values], dtype=torch.float64)
        limits.append(float(torch.quantile(known, 1 - CALIBRATED, interpolation="higher")))
    return limits


def _above(
    values: list[list[float]], limits: list[float], right: list[list[float]] | None = None
) -> Summary:
    """Each seed's share of statistics above its limit, times ``right`` where that is given."""
    counted = right or [[1.0] * len(seed) for seed in values]
    shares = [
        sum(float(value > limit) * good for value, good in zip(seed, goods, strict=True))
        / len(seed)
        for seed, limit, goods in zip(values, limits, counted, strict=True)
    ]
    return summarise(shares, "share")
