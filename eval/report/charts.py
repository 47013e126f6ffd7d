"""The charts of a sweep: ASR and CTA against each setting that it varies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...distill.types import RequestError
from ..figures.style import save
from ..figures.sweep_chart import ASR, CTA, SweepChart, draw_chart
from ..results.metrics import kind_of, summarise
from ..results.record import Metrics
from .compare import by_seed
from .model import Experiment, ResultRow

MOST_SERIES: Final = 6
_NETWORK: Final = "victim network"
_NUMBERED_CLASSES: Final = frozenset({"target", "source"})  # numbers that are names of classes
_CHARTED: Final = (ASR, CTA)
_MOST_IN_WORDS: Final = 8

_ChartedRow = tuple[Mapping[str, Any], ResultRow]
"""The varied settings with the victims' network, and the row."""


def axis_charts(experiment: Experiment) -> list[SweepChart]:
    """ASR and CTA against each axis of a sweep.

    There is a series for each combination of the other axes and victims' networks. Where those are
    more than six, a series is the mean over the other axes, seed by seed; networks are never
    averaged. An axis of one value with several victims' networks is charted against the networks,
    one of a single value and network not at all.
    """
    found: list[SweepChart] = []
    for axis in experiment.axes:
        rows = [
            (_settings(row), row)
            for row in experiment.undefended
            if axis in row.varied and row.axis in (None, axis) and row.seeds
        ]
        shown = next((name for name in (axis, _NETWORK) if len(_grouped([name], rows)) > 1), None)
        if shown is not None:
            found += _charts(shown, rows)
    return found


def _settings(row: ResultRow) -> dict[str, Any]:
    return {name: _plain(value) for name, value in row.varied.items()} | {_NETWORK: row.network}


def _plain(value: Any) -> Any:
    """A value that can be a key, and that reads as people wrote it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return value if isinstance(value, int | float | str) else str(value)


def _charts(axis: str, rows: Sequence[_ChartedRow]) -> list[SweepChart]:
    values = [value for (value,) in _grouped([axis], rows)]
    numbers = numeric(values)
    if numbers:
        values.sort()
    others, along = _others(axis, rows)
    averaged = [name for name in others if name != _NETWORK]
    notes = []
    if averaged and len(_grouped(others, rows)) > MOST_SERIES:
        count = len(_grouped(averaged, rows))
        notes.append(f"Mean over the {count} combinations of {', '.join(averaged)}, seed by seed.")
        others = [name for name in others if name == _NETWORK]
    if along:
        notes.append(f"{', '.join(along)} varies along with {axis}.")
    series = {
        ", ".join(f"{name} {value}" for name, value in zip(others, combination, strict=True)): {
            value: _metrics(here) for (value,), here in _grouped([axis], members).items()
        }
        for combination, members in _grouped(others, rows).items()
    }
    return [
        SweepChart(
            metric=metric,
            axis=axis,
            values=values,
            categories=not numbers or axis in _NUMBERED_CLASSES,
            series=series,
            note=" ".join(notes),
        )
        for metric in _CHARTED
        if any(metric.name in point for line in series.values() for point in line.values())
    ]


def numeric(values: Sequence[Any]) -> bool:
    """Whether values are several numbers on one scale; truth values are not."""
    return len(values) > 1 and {type(value) for value in values} <= {int, float}


def _grouped(
    names: Sequence[str], rows: Sequence[_ChartedRow]
) -> dict[tuple[Any, ...], list[_ChartedRow]]:
    """The rows by their values of the settings ``names``."""
    found: dict[tuple[Any, ...], list[_ChartedRow]] = {}
    for settings, row in rows:
        found.setdefault(tuple(settings.get(n, "–") for n in names), []).append((settings, row))
    return found


def _others(axis: str, rows: Sequence[_ChartedRow]) -> tuple[list[str], list[str]]:
    """The settings that vary independently of ``axis``, and those whose value it determines."""
    free, along = [], []
    for name in dict.fromkeys(name for settings, _ in rows for name in settings if name != axis):
        if len(_grouped([name], rows)) < 2:
            continue
        if any(len(_grouped([name], here)) > 1 for here in _grouped([axis], rows).values()):
            free.append(name)
        elif name != _NETWORK:  # the victims' network follows the distilling one
            along.append(name)
    return free, along


def _metrics(rows: Sequence[_ChartedRow]) -> Metrics:
    """A row's metrics; of several rows the mean seed by seed, over the seeds that all have."""
    if len(rows) == 1:
        return dict(rows[0][1].metrics)
    found: Metrics = {}
    for name in (key for metric in _CHARTED for key in (metric.name, metric.twin)):
        each = [by_seed(row, name) for _, row in rows]
        shared = sorted(set(each[0]).intersection(*each))
        if shared:
            means = [sum(row[seed] for row in each) / len(each) for seed in shared]
            found[name] = summarise(means, kind_of(name))
    return found


def chart_text(chart: SweepChart) -> str:
    """The figures in words, for readers who do not see the picture."""
    metric, found = chart.metric, []
    for name, points in chart.series.items():
        means = _means(chart, points, metric.name)
        if not means:
            continue
        text = ", ".join(f"{mean:.2f} at {value}" for value, mean in means[:_MOST_IN_WORDS])
        if len(means) > _MOST_IN_WORDS:
            text += f" and {len(means) - _MOST_IN_WORDS} more"
        twins = [mean for _, mean in _means(chart, points, metric.twin)]
        if twins:
            text += f"; {metric.twin_title} {min(twins):.2f} to {max(twins):.2f}"
        found.append(f"with {name}: {text}" if name else text)
    return f"Chart of {chart.title}: {'. '.join(found)}."


def _means(chart: SweepChart, points: Mapping[Any, Metrics], name: str) -> list[tuple[Any, float]]:
    found = [(v, points[v][name].mean) for v in chart.values if name in points.get(v, {})]
    return [(value, mean) for value, mean in found if mean is not None]


def write_charts(experiments: Sequence[Experiment], folder: Path) -> list[Path]:
    """Every chart as an SVG file in ``folder``, which is made; existing files are replaced.

    Errors: ``RequestError`` where a file can't be written.
    """
    charts: dict[str, SweepChart] = {}
    for experiment in experiments:
        for chart in axis_charts(experiment):
            name = f"{experiment.name}-{chart.axis}-{chart.metric.title.lower()}"
            name = re.sub(r"[^\w.-]+", "-", name)
            charts[name if name not in charts else f"{name}-{len(charts)}"] = chart
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write {folder}: {error.strerror}") from None
    paths = [folder / f"{name}.svg" for name in charts]
    for path, chart in zip(paths, charts.values(), strict=True):
        save(draw_chart(chart), path)
    return paths
