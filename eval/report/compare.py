"""Compares experiments with a baseline: what changed, and whether it is more than noise.

Rows of the same settings are paired seed by seed. Both sides drew the same clean set, networks and
batches from a seed, so what the seed itself contributes cancels in the difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy
from scipy import stats

from ...distill.types import RequestError
from ..results.metrics import summarise
from .model import Experiment, ResultRow

COMPARED: Final = {
    "clean_test_accuracy": "CTA",
    "attack_success_rate": "ASR",
    "control_attack_success_rate": "ASR, control",
    "backdoor_gain": "backdoor gain",
    "row_auroc": "AUROC of rows",
    "auroc": "AUROC",
}
FEWEST: Final = 3  # shared seeds below which nothing is claimed
LEVEL: Final = 0.05
_SAME: Final = 1e-12  # two floats of the same rate may differ in the last bits

Verdict = Literal["more than noise", "within noise", "too few seeds"]


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of two rows of the same settings, over the seeds that both have.

    before, now: means over the shared seeds. ci95: Student's t-interval of the mean of the paired
    differences. p: of the two-sided paired t-test; q: adjusted after Benjamini and Hochberg over
    all figures of the comparison. Both ``None`` below three shared seeds.
    """

    row: ResultRow
    metric: str
    seeds: tuple[int, ...]
    before: float
    now: float
    difference: float
    ci95: tuple[float, float] | None
    p: float | None = None
    q: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What the seeds support."""
        if self.q is None:
            return "too few seeds"
        return "more than noise" if self.q <= LEVEL else "within noise"


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An experiment against its baseline.

    one_set: whether a side is a single distilled set. settings: keys of the configuration that
    differ, with both values. missing: rows that only the baseline has; added: rows that only the
    experiment has; unpaired: rows without a figure on a shared seed.
    """

    experiment: Experiment
    baseline: Experiment
    changes: Sequence[Change]
    settings: Sequence[tuple[str, Any, Any]]
    one_set: bool
    missing: Sequence[str]
    added: Sequence[str]
    unpaired: Sequence[str]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the comparison, in sentences."""
        found = []
        if self.one_set:
            found.append(
                "One distilled set is compared with another. The noise of distillation alone can "
                "explain a difference between two sets. More victims do not help, as they are "
                "nested in their set; three or more distillation seeds do (--seeds)."
            )
        lists = {
            "In the baseline only": self.missing,
            "Not in the baseline": self.added,
            "Without a figure on a shared seed": self.unpaired,
        }
        return found + [f"{title}: {'; '.join(rows)}." for title, rows in lists.items() if rows]


def compare(experiments: Sequence[Experiment], baseline: Experiment) -> list[Comparison]:
    """Each experiment against ``baseline``; the false discovery rate is controlled over all.

    Errors: ``RequestError`` where the shapes differ (a run and a sweep, for example).
    """
    for experiment in experiments:
        if experiment.shape != baseline.shape:
            raise RequestError(
                f"{experiment.path} is a {experiment.shape}, the baseline {baseline.path} a "
                f"{baseline.shape}: both must be runs, sweeps or suites"
            )
    found = [_compare(experiment, baseline) for experiment in experiments]
    tested = [change.p for each in found for change in each.changes if change.p is not None]
    adjusted = iter(stats.false_discovery_control(tested).tolist() if tested else [])
    return [
        replace(
            each,
            changes=[
                change if change.p is None else replace(change, q=next(adjusted))
                for change in each.changes
            ],
        )
        for each in found
    ]


def _compare(experiment: Experiment, baseline: Experiment) -> Comparison:
    theirs = {_identity(row): row for row in baseline.rows}
    ours = {_identity(row): row for row in experiment.rows}
    changes, unpaired = [], []
    for identity in (key for key in ours if key in theirs):
        found = _changes(ours[identity], theirs[identity])
        changes += found
        if not found:
            unpaired.append(str(ours[identity]))
    return Comparison(
        experiment=experiment,
        baseline=baseline,
        changes=changes,
        settings=_settings(experiment, baseline),
        one_set=any(row.conditional for row in (*experiment.rows, *baseline.rows)),
        missing=[str(row) for key, row in theirs.items() if key not in ours],
        added=[str(row) for key, row in ours.items() if key not in theirs],
        unpaired=unpaired,
    )


def _identity(row: ResultRow) -> tuple[tuple[str, ...], str, str | None]:
    return row.key, row.network, row.defense


def by_seed(row: ResultRow, metric: str) -> dict[int, float]:
    """A row's figure for each of its seeds; empty where it is unknown which seed has which.

    A single set's figure is the mean over its victims, which are nested in it.
    """
    summary = row.metrics.get(metric)
    if summary is None:
        return {}
    values = (summary.mean,) if row.conditional else summary.values
    if len(values) != len(row.seeds):
        return {}
    return {s: v for s, v in zip(row.seeds, values, strict=True) if v is not None}


def _changes(row: ResultRow, base: ResultRow) -> list[Change]:
    found = []
    for metric in COMPARED:
        ours, theirs = by_seed(row, metric), by_seed(base, metric)
        seeds = tuple(sorted(ours.keys() & theirs.keys()))
        if seeds:
            before, now = ([side[seed] for seed in seeds] for side in (theirs, ours))
            found.append(_change(row, metric, seeds, before, now))
    return found


def _change(
    row: ResultRow, metric: str, seeds: tuple[int, ...], before: list[float], now: list[float]
) -> Change:
    difference = numpy.array(now) - numpy.array(before)
    difference[numpy.abs(difference) < _SAME] = 0.0
    return Change(
        row=row,
        metric=metric,
        seeds=seeds,
        before=float(numpy.mean(before)),
        now=float(numpy.mean(now)),
        difference=float(difference.mean()),
        ci95=summarise(difference.tolist()).ci95,
        p=_p_value(difference) if len(seeds) >= FEWEST else None,
    )


def _p_value(difference: numpy.typing.NDArray[numpy.float64]) -> float:
    """Of the paired t-test; 1 where nothing changed, 0 where every seed changed by the same."""
    if numpy.ptp(difference) < _SAME:
        return 1.0 if abs(float(difference.mean())) < _SAME else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences are nearly equal
        return float(stats.ttest_1samp(difference, 0.0).pvalue)


def _settings(experiment: Experiment, baseline: Experiment) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ; those of a sweep's base one by one."""
    ours, theirs = _flat(experiment), _flat(baseline)
    return [
        (key, theirs.get(key), ours.get(key))
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key) and key != "description"
    ]


def _flat(experiment: Experiment) -> dict[str, Any]:
    config = dict(experiment.config)
    base = config.pop("base", None) if experiment.shape == "sweep" else None
    keys = base if isinstance(base, dict) else {}
    return config | {f"base: {key}": value for key, value in keys.items()}
