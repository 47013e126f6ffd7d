"""Two reports against each other: what changed, and whether it is more than noise.

Rows that stand for the same are paired seed by seed: both sides drew the same clean set, networks
and batches from a seed, so the difference of one seed is free of what the seed itself brings.
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
from .model import Row, Source, told_place

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
    """One figure of two rows that stand for the same, over the seeds that both have.

    before, now: means over the shared seeds. ci95: Student's t-interval of the mean of the paired
    differences. p: of the paired t-test, two-sided; q: after Benjamini and Hochberg, over all
    figures of the comparison. Both ``None`` below three shared seeds.
    """

    row: Row
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
        """What may be said of it."""
        if self.q is None:
            return "too few seeds"
        return "more than noise" if self.q <= LEVEL else "within noise"


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A source against its baseline.

    one_set: whether a side is a single distilled set. settings: keys of the configuration that
    differ, with both values. missing: rows of the baseline that this source hasn't got; added: its
    own that the baseline hasn't got; unpaired: rows without a figure on a shared seed.
    """

    source: Source
    baseline: Source
    changes: Sequence[Change]
    settings: Sequence[tuple[str, Any, Any]]
    one_set: bool
    missing: Sequence[str]
    added: Sequence[str]
    unpaired: Sequence[str]

    def of(self, row: Row) -> dict[str, Change]:
        """The changes of one of the source's rows, by figure."""
        return {change.metric: change for change in self.changes if change.row is row}


def compare(sources: Sequence[Source], baseline: Source) -> list[Comparison]:
    """Every source against ``baseline``, false discoveries controlled over all of them together.

    Errors: ``RequestError`` where the two are of different shapes, a run and a sweep say.
    """
    for source in sources:
        if source.shape != baseline.shape:
            raise RequestError(
                f"{source.path} is a {source.shape}, the baseline {baseline.path} a "
                f"{baseline.shape}: like is compared with like"
            )
    found = [_compare(source, baseline) for source in sources]
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


def _compare(source: Source, baseline: Source) -> Comparison:
    theirs = {_identity(row): row for row in baseline.rows}
    ours = {_identity(row): row for row in source.rows}
    changes, unpaired = [], []
    for identity, row in ours.items():
        if identity not in theirs:
            continue
        found = _changes(row, theirs[identity])
        changes += found
        if not found:
            unpaired.append(told_row(row))
    return Comparison(
        source=source,
        baseline=baseline,
        changes=changes,
        settings=_settings(source, baseline),
        one_set=any(row.conditional for row in (*source.rows, *baseline.rows)),
        missing=[told_row(row) for key, row in theirs.items() if key not in ours],
        added=[told_row(row) for key, row in ours.items() if key not in theirs],
        unpaired=unpaired,
    )


def _identity(row: Row) -> tuple[tuple[str, ...], str, str | None]:
    return row.key, row.network, row.defense


def told_row(row: Row) -> str:
    """A row in words: where it stands, the victims' network, the defense."""
    where = told_place(row) if row.place else ""
    parts = [where, row.network and f"victims: {row.network}", row.defense and f"{row.defense}"]
    return ", ".join(part for part in parts if part) or "the run"


def by_seed(row: Row, metric: str) -> dict[int, float]:
    """A row's figure for each of its seeds; empty where nobody knows which seed has which.

    A single set's figure is its mean over victims: they are nested in it.
    """
    summary = row.metrics.get(metric)
    if summary is None:
        return {}
    values = (summary.mean,) if row.conditional else summary.values
    if len(values) != len(row.seeds):
        return {}
    return {s: v for s, v in zip(row.seeds, values, strict=True) if v is not None}


def _changes(row: Row, base: Row) -> list[Change]:
    found = []
    for metric in COMPARED:
        ours, theirs = by_seed(row, metric), by_seed(base, metric)
        seeds = tuple(sorted(ours.keys() & theirs.keys()))
        if seeds:
            before, now = ([side[seed] for seed in seeds] for side in (theirs, ours))
            found.append(_change(row, metric, seeds, before, now))
    return found


def _change(
    row: Row, metric: str, seeds: tuple[int, ...], before: list[float], now: list[float]
) -> Change:
    apart = numpy.array(now) - numpy.array(before)
    apart[numpy.abs(apart) < _SAME] = 0.0
    told = summarise(apart.tolist())
    return Change(
        row=row,
        metric=metric,
        seeds=seeds,
        before=float(numpy.mean(before)),
        now=float(numpy.mean(now)),
        difference=float(apart.mean()),
        ci95=told.ci95,
        p=_p_value(apart) if len(seeds) >= FEWEST else None,
    )


def _p_value(apart: numpy.typing.NDArray[numpy.float64]) -> float:
    """Of the paired t-test; 1 where nothing moved, 0 where every seed moved by the same."""
    if numpy.ptp(apart) < _SAME:
        return 1.0 if abs(float(apart.mean())) < _SAME else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly equal differences
        return float(stats.ttest_1samp(apart, 0.0).pvalue)


def _settings(source: Source, baseline: Source) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ; a sweep's or suite's by its parts."""
    ours, theirs = source.config, baseline.config
    if source.shape == "sweep":
        ours, theirs = ({**side.config, **_base(side)} for side in (source, baseline))
        ours.pop("base", None), theirs.pop("base", None)
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    return [
        (key, theirs.get(key), ours.get(key))
        for key in keys
        if theirs.get(key) != ours.get(key) and key != "description"
    ]


def _base(source: Source) -> dict[str, Any]:
    base = source.config.get("base")
    return {f"base: {key}": value for key, value in base.items()} if isinstance(base, dict) else {}
