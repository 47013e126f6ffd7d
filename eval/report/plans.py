"""A report's sweeps and suites, from their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...attacks import labels_of
from ..grid.suite import TwinGroup
from ..results.ablation import Ablation, AblationRow
from ..results.benchmark import Benchmark, BenchmarkRow
from ..results.record import Metrics
from .model import NO_CELL, Row, Shown, Source, described, inside, shown_run, told_place


def of_sweep(path: Path, table: Ablation) -> Source:
    """A sweep: a row for each point and victims' network, and for each defense of it."""
    rows = [_of_point(path, row) for row in table.rows]
    rows += [each for row in table.rows for each in _defended(path, row)]
    points = {row.key: row for row in rows if row.defense is None and row.primary}
    return Source(
        path=path,
        shape="sweep",
        kind=table.kind,
        status=table.status,
        title=described(table.sweep) or path.name,
        columns=table.axes,
        axes=table.axes,
        one_at_a_time=table.one_at_a_time,
        rows=rows,
        shown=[
            shown_run(told_place(row), row.folders[0]) for row in points.values() if row.folders
        ],
        cells=len({folder for row in rows for folder in row.folders}),
        budget=str(table.sweep.get("budget") or ""),
        failures=table.failures,
        command=table.command,
        environment=table.environment,
        config=table.sweep,
        notes=[] if any(row.seeds for row in rows) else [NO_CELL],
    )


def _of_point(path: Path, row: AblationRow) -> Row:
    return Row(
        place=row.values,
        key=(row.axis or "", *(f"{name}={row.values[name]}" for name in sorted(row.values))),
        network=row.network,
        axis=row.axis,
        primary=row.primary,
        seeds=row.seeds,
        wanted=len(row.wanted),
        labels=row.labels,
        note=row.reason or "",
        folders=[inside(path, place) for place in row.folders],
        metrics=row.metrics,
    )


def _defended(path: Path, row: AblationRow) -> list[Row]:
    """A point's defenses; seeds only where each of them has a figure, else nobody knows which."""
    point = _of_point(path, row)
    return [
        replace(
            point,
            key=(*point.key, name),
            defense=name,
            seeds=row.seeds if _longest(metrics) == len(row.seeds) else (),
            note="",
            metrics=metrics,
        )
        for name, metrics in row.defenses.items()
    ]


def _longest(metrics: Metrics) -> int:
    return max((len(summary.values) for summary in metrics.values()), default=0)


# Suites -------------------------------------------------------------------------------------------


def of_suite(path: Path, table: Benchmark) -> Source:
    """A suite: a row for each setting, attack, victims' network and defense."""
    runs = {
        (row.setting, row.attack): [
            inside(path, TwinGroup(row.setting, seed).place(row.attack)) for seed in row.seeds
        ]
        for row in reversed(table.rows)
        if row.defense == "none" and row.seeds
    }
    shown = {
        place: shown_run(f"{place[0]}, {place[1]}", folders[0])
        for place, folders in reversed(runs.items())
    }
    labels = {place: _labels(table, place, shown.get(place)) for place in _places(table)}
    return Source(
        path=path,
        shape="suite",
        kind=table.kind,
        status=table.status,
        title=described(table.suite) or path.name,
        columns=["setting", "attack"],
        rows=[_of_line(row, runs, labels) for row in table.rows],
        shown=list(shown.values()),
        cells=sum(len(folders) for folders in runs.values()),
        budget=str(table.suite.get("budget") or ""),
        failures=table.failures,
        command=table.command,
        environment=table.environment,
        config=table.suite,
        notes=[] if runs else [NO_CELL],
    )


def _of_line(
    row: BenchmarkRow,
    runs: Mapping[tuple[str, str], Sequence[Path]],
    labels: Mapping[tuple[str, str], Sequence[str]],
) -> Row:
    place = (row.setting, row.attack)
    state = next((name for name in ("done", "error", "not applicable") if row.cells.get(name)), "")
    told = row.reason or row.caution or ""
    if told and state not in ("done", ""):
        told = f"{state}: {told}"
    return Row(
        place={"setting": row.setting, "attack": row.attack},
        key=(*place, row.defense),
        network=row.network,
        defense=None if row.defense == "none" else row.defense,
        family=row.family,
        state=state or "missing",
        holds=row.holds,
        seeds=row.seeds,
        wanted=sum(row.cells.values()),
        labels=labels[place],
        note=told,
        folders=runs.get(place, ()),
        metrics=row.metrics,
    )


def _places(table: Benchmark) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.setting, row.attack) for row in table.rows))


def _labels(table: Benchmark, place: tuple[str, str], shown: Shown | None) -> list[str]:
    """What the run's record says; where it isn't there, what the suite's own keys tell."""
    if shown is not None and shown.record is not None:
        return shown.record.labels
    suite, (setting, attack) = table.suite, place
    own = (suite.get("settings") or {}).get(setting) or {}
    named = ((suite.get("attacks") or {}).get(attack), (own.get("attacks") or {}).get(attack))
    keys: dict[str, Any] = {}
    for layer in (own.get("keys"), *named):
        keys |= layer if isinstance(layer, dict) else {}
    return labels_of(keys.get("trigger_range"))
