"""Figures against what a sweep varies: CTA and ASR with their twins, intervals over seeds."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..figures.canvas import BLUE, DPI, INK, SOFT, VERMILLION, shorten
from ..results.metrics import Summary, kind_of, summarise
from .compare import by_seed
from .model import Row, Source

MOST_SERIES: Final = 6
_MOST_NETWORKS: Final = 4
# Okabe and Ito's, dark enough on white; the marker tells the series apart in a grey print.
_COLOURS: Final = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#8A6D00", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_PANELS: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("ASR", "attack_success_rate", "control_attack_success_rate", "control"),
    ("CTA", "clean_test_accuracy", "control_clean_test_accuracy", "clean twin"),
)

Panel = tuple[str, str, str, str]
Points = dict[Any, dict[str, Summary]]  # by the axis' value: the summary of each figure


@final
@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture of one figure against one axis. text: what it shows, in words. note: of what."""

    axis: str
    title: str
    network: str
    png: bytes
    text: str
    note: str


def axis_charts(source: Source) -> list[Chart]:
    """For every axis of a sweep ASR and CTA, for each architecture of the victims.

    With one series for each combination of the other axes, or where those are more than six, the
    mean over them seed by seed.
    """
    networks = list(dict.fromkeys(row.network for row in source.undefended))[:_MOST_NETWORKS]
    found: list[Chart] = []
    for axis in source.axes:
        for network in networks:
            rows = [
                row
                for row in source.undefended
                if row.network == network and axis in row.place and row.axis in (None, axis)
            ]
            name = f"{axis}, victims: {network}" if len(networks) > 1 else axis
            found += _charts(axis, name, network, [row for row in rows if row.seeds])
    return found


def _charts(axis: str, name: str, network: str, rows: Sequence[Row]) -> list[Chart]:
    values = list(dict.fromkeys(_plain(row.place[axis]) for row in rows))
    if numeric(values):
        values.sort()
    others, along = _others(axis, rows)
    series: dict[str, Points] = {}
    for row in rows:
        told = ", ".join(f"{other} {_plain(row.place.get(other, '–'))}" for other in others)
        series.setdefault(told, {})[_plain(row.place[axis])] = dict(row.metrics)
    note = ""
    if len(series) > MOST_SERIES:
        note = f"Mean over the {len(series)} combinations of {', '.join(others)}, seed by seed."
        series = {"": {value: _mean(axis, value, rows) for value in values}}
    if along:
        note = f"{note} Along with {axis} goes {', '.join(along)}.".strip()
    return [
        Chart(
            axis=axis,
            title=panel[0],
            network=network,
            png=_picture(panel, name, series, values),
            text=_in_words(panel, name, series, values),
            note=note,
        )
        for panel in _PANELS
        if any(panel[1] in point for line in series.values() for point in line.values())
    ]


def _others(axis: str, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The axes that vary beside ``axis``, and those that only go along with it."""
    names = list(dict.fromkeys(name for row in rows for name in row.place if name != axis))
    free: list[str] = []
    along: list[str] = []
    for name in names:
        seen: dict[Any, set[Any]] = {}
        for row in rows:
            seen.setdefault(_plain(row.place[axis]), set()).add(_plain(row.place.get(name)))
        every = set().union(*seen.values())
        if len(every) > 1:
            (along if all(len(each) == 1 for each in seen.values()) else free).append(name)
    return free, along


def _plain(value: Any) -> Any:
    """A value that can be a key, and that reads as people wrote it."""
    return value if isinstance(value, int | float | str) else str(value)


def _mean(axis: str, value: Any, rows: Sequence[Row]) -> dict[str, Summary]:
    """The mean over the rows at ``value``, seed by seed where all of them have it; the summary."""
    here = [row for row in rows if _plain(row.place[axis]) == value]
    found = {}
    for metric in (name for panel in _PANELS for name in panel[1:3]):
        each = [by_seed(row, metric) for row in here]
        shared = set(each[0]).intersection(*each)
        if shared:
            means = [sum(row[seed] for row in each) / len(each) for seed in sorted(shared)]
            found[metric] = summarise(means, kind_of(metric))
    return found


# Drawing ------------------------------------------------------------------------------------------


def _picture(panel: Panel, name: str, series: dict[str, Points], values: list[Any]) -> bytes:
    several = len(series) > 1
    figure = Figure(
        figsize=(4.4, 3.2 + 0.19 * several * len(series)),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    axes = figure.subplots()
    title, metric, twin, twin_name = panel
    place = _scale(axes, values)
    for number, (told, points) in enumerate(series.items()):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        aside = number - (len(series) - 1) / 2
        for key, hollow in ((twin, True), (metric, False)):
            here = [(value, points[value][key]) for value in values if key in points.get(value, {})]
            drawn = [(place(value, aside), summary) for value, summary in here]
            _line(axes, drawn, colour, marker, hollow=hollow, name="" if hollow else told)
    if metric == "clean_test_accuracy":  # what an attack costs is a few points: from near by
        bottom = axes.get_ylim()[0]
        axes.set_ylim(max(-0.03, min(0.8, math.floor(bottom * 10) / 10) - 0.005), 1.005)
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(name, fontsize=9, parse_math=False)
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left", color=INK)
    axes.set_title(f"filled: {title} · hollow: {twin_name}", fontsize=8, loc="right", color=SOFT)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if several:
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower left",
            fontsize=8,
            frameon=False,
            labelcolor=INK,
        )
    return png_of(figure)


def _scale(axes: Axes, values: list[Any]) -> Callable[[Any, float], float]:
    """Sets the horizontal axis: numbers where they are numbers, else a place for each value.

    Gives where a value goes, for a series that stands ``aside`` so that bars don't cover bars.
    """
    if numeric(values):
        low, high = min(values), max(values)
        log = low > 0 and high > 10 * low
        if log:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        if log:
            return lambda value, aside: float(value * (high / low) ** (0.008 * aside))
        return lambda value, aside: float(value + 0.008 * aside * (high - low))
    names = [shorten(str(value), 8, 300) for value in values]
    slanted = sum(map(len, names)) > 36
    axes.set_xticks(
        range(len(values)),
        names,
        rotation=35 if slanted else 0,
        ha="right" if slanted else "center",
        parse_math=False,
    )
    axes.set_xlim(-0.5, len(values) - 0.5)
    return lambda value, aside: values.index(value) + 0.08 * aside


def numeric(values: Sequence[Any]) -> bool:
    """Whether values are numbers on one scale: more than one, and no truth values."""
    kinds = {type(value) for value in values}
    return len(values) > 1 and kinds <= {int, float}


def _line(
    axes: Axes,
    drawn: Sequence[tuple[float, Summary]],
    colour: str,
    marker: str,
    *,
    hollow: bool,
    name: str,
) -> None:
    """Means joined by a line, intervals as bars that are cut to [0, 1]."""
    points = sorted(
        ((x, summary.mean, summary.ci95) for x, summary in drawn if summary.mean is not None),
        key=lambda point: point[0],
    )
    if not points:
        return
    low = [0.0 if ci is None else max(0.0, y - max(0.0, ci[0])) for _, y, ci in points]
    high = [0.0 if ci is None else max(0.0, min(1.0, ci[1]) - y) for _, y, ci in points]
    axes.errorbar(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        yerr=[low, high],
        color=colour,
        marker=marker,
        markersize=5,
        markerfacecolor="white" if hollow else colour,
        linewidth=0.9 if hollow else 1.4,
        linestyle=":" if hollow else "-",
        elinewidth=0.8,
        capsize=2.5,
        label=name or None,
    )


def png_of(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script the font lacks
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


# Words --------------------------------------------------------------------------------------------


def _in_words(panel: Panel, name: str, series: dict[str, Points], values: list[Any]) -> str:
    """The gist of the numbers, for who doesn't see the picture."""
    title, metric, twin, twin_name = panel
    told = []
    for combination, points in series.items():
        means = [(v, points[v][metric].mean) for v in values if metric in points.get(v, {})]
        known = [(value, mean) for value, mean in means if mean is not None]
        if not known:
            continue
        line = ", ".join(f"{mean:.2f} at {value}" for value, mean in known[:8])
        line += f" and {len(known) - 8} more" if len(known) > 8 else ""
        theirs = [point[twin].mean for point in points.values() if twin in point]
        control = [mean for mean in theirs if mean is not None]
        if control:
            line += f"; {twin_name} {min(control):.2f} to {max(control):.2f}"
        told.append(f"with {combination}: {line}" if combination else line)
    return f"Chart of {title} against {name}: {'. '.join(told)}."
