"""The chart of one figure against one varied setting, with clean twins and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results.metrics import Summary
from ..results.record import Metrics
from .canvas import shorten
from .style import BLUE, INK, SOFT, VERMILLION, new_figure, style_axes

# Okabe and Ito's, dark enough on white. The marker distinguishes the series in a grey print.
_COLOURS: Final = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#8A6D00", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_TWIN: Final = {"linewidth": 0.9, "linestyle": ":", "markerfacecolor": "white"}
_ZOOMED_FROM: Final = 0.8  # a CTA axis starts at this value or below


@final
@dataclass(frozen=True, kw_only=True)
class ChartedMetric:
    """A metric, its title, and the same metric on the clean twin."""

    title: str
    name: str
    twin: str
    twin_title: str
    zoomed: bool = False


ASR: Final = ChartedMetric(
    title="ASR",
    name="attack_success_rate",
    twin="control_attack_success_rate",
    twin_title="control",
)
CTA: Final = ChartedMetric(
    title="CTA",
    name="clean_test_accuracy",
    twin="control_clean_test_accuracy",
    twin_title="clean twin",
    zoomed=True,  # an attack costs a few points, which a full axis would hide
)


@final
@dataclass(frozen=True, kw_only=True)
class SweepChart:
    """What a chart shows.

    axis: the varied setting. values: its values in their order. categories: whether they are
    separate things (backends, networks, classes), whose points are not joined. series: for each
    name the metrics at each value. note: what must be said beside the chart.
    """

    metric: ChartedMetric
    axis: str
    values: Sequence[Any]
    categories: bool
    series: Mapping[str, Mapping[Any, Metrics]]
    note: str = ""

    @property
    def title(self) -> str:
        """Both axes."""
        return f"{self.metric.title} against {self.axis}"


def draw_chart(chart: SweepChart) -> Figure:
    """Filled marks are the attacked sets, hollow ones their clean twins; bars are intervals, cut
    to [0, 1]."""
    several, metric = len(chart.series) > 1, chart.metric
    figure = new_figure(4.4, 3.2 + 0.19 * several * len(chart.series))
    axes = figure.subplots()
    place = (_category_axis if chart.categories else _number_axis)(axes, chart)
    for number, (name, points) in enumerate(chart.series.items()):
        style = _series_style(number)
        for key, twin in ((metric.twin, True), (metric.name, False)):
            drawn = [
                (place(value, number, twin), points[value][key])
                for value in chart.values
                if key in points.get(value, {})
            ]
            look = style | (_TWIN if twin else {"label": name or None})
            _points(axes, drawn, **look | ({"linestyle": ""} if chart.categories else {}))
    axes.set_ylim(*_limits(axes.get_ylim()[0], zoomed=metric.zoomed))
    axes.set_xlabel(chart.axis, fontsize=9, parse_math=False)
    axes.set_title(metric.title, fontsize=10, fontweight="bold", loc="left", color=INK)
    legend = f"filled: {metric.title} · hollow: {metric.twin_title}"
    axes.set_title(legend, fontsize=8, loc="right", color=SOFT)
    style_axes(axes, "y" if chart.categories else "both")
    if several:
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower left",
            fontsize=8,
            frameon=False,
            labelcolor=INK,
        )
    return figure


def _series_style(number: int) -> dict[str, Any]:
    """A colour and a marker, a combination of its own for each of the first 36 series."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
    }


def _limits(bottom: float, *, zoomed: bool) -> tuple[float, float]:
    if not zoomed:
        return -0.03, 1.03
    return max(-0.03, min(_ZOOMED_FROM, math.floor(bottom * 10) / 10) - 0.005), 1.005


_Place = Callable[[Any, int, bool], float]
"""Where a value is drawn, given the series' number and whether it is a clean twin's."""


def _number_axis(axes: Axes, chart: SweepChart) -> _Place:
    """A linear axis, or a logarithmic one from a decade on; series stand a little apart."""
    low, high = min(chart.values), max(chart.values)
    log = low > 0 and high > 10 * low
    if log:
        axes.set_xscale("log")
    axes.set_xticks(chart.values, [f"{value:g}" for value in chart.values])
    axes.minorticks_off()
    middle = (len(chart.series) - 1) / 2

    def place(value: float, number: int, twin: bool) -> float:
        shift = 0.008 * (number - middle)
        return float(value * (high / low) ** shift if log else value + shift * (high - low))

    return place


def _category_axis(axes: Axes, chart: SweepChart) -> _Place:
    """A place for each value; each series has its own part of it, its twin beside it."""
    names = [shorten(str(value), 8, 300) for value in chart.values]
    slanted = sum(map(len, names)) > 36
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=35 if slanted else 0,
        ha="right" if slanted else "center",
        parse_math=False,
    )
    axes.set_xlim(-0.5, len(names) - 0.5)
    count = len(chart.series)
    width = min(0.24, 0.8 / count)

    def place(value: Any, number: int, twin: bool) -> float:
        aside = number - (count - 1) / 2 + (0.25 if twin else -0.25)
        return chart.values.index(value) + width * aside

    return place


def _points(axes: Axes, drawn: Sequence[tuple[float, Summary]], **style: Any) -> None:
    """Means with their intervals; a line joins them in the order of the axis."""
    known = [(x, each.mean, each.ci95) for x, each in drawn if each.mean is not None]
    if not known:
        return
    known.sort(key=lambda point: point[0])
    low = [0.0 if ci is None else max(0.0, y - max(0.0, ci[0])) for _, y, ci in known]
    high = [0.0 if ci is None else max(0.0, min(1.0, ci[1]) - y) for _, y, ci in known]
    axes.errorbar(
        [x for x, _, _ in known],
        [y for _, y, _ in known],
        yerr=[low, high],
        markersize=5,
        elinewidth=0.8,
        capsize=2.5,
        **{"linewidth": 1.4} | style,
    )
