"""The picture of what survives: CTA and ASR of each variant of a set, beside its clean twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes

from ..results.metrics import Summary
from ..results.record import Record
from ..results.subject import subject
from .canvas import shorten
from .style import BLUE, INK, SOFT, VERMILLION, new_figure, save, style_axes
from .sweep_chart import ASR, CTA, ChartedMetric

_ROW_HEIGHT: Final = 0.34  # inches
_ASIDE: Final = 0.14  # of a row: a mark and its twin's stand a little apart


def survival_picture(path: Path, record: Record) -> None:
    """A row for each variant of ``record.survival``: on the left CTA, on the right ASR.

    A filled mark is the set, a hollow one its clean twin. Bars are 95 % intervals over victims; for
    fewer than three victims there are none.
    """
    names = list(record.survival)
    figure = new_figure(9.5, 1.4 + _ROW_HEIGHT * max(len(names), 3), wspace=0.04)
    figure.suptitle(
        f"What survives\n{shorten(subject(record), 9, 1500)}",
        fontsize=9,
        fontweight="bold",
        x=0.01,
        ha="left",
        parse_math=False,
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metric, colour in ((left, CTA, BLUE), (right, ASR, VERMILLION)):
        _panel(axes, record, metric, colour)
    left.set_yticks(range(len(names)), [shorten(name, 8, 500) for name in names], parse_math=False)
    left.set_ylim(len(names) - 0.4, -0.6)
    save(figure, path)


def _panel(axes: Axes, record: Record, metric: ChartedMetric, colour: str) -> None:
    outcomes = [each.metrics for each in record.survival.values()]
    sides = (
        (metric.name, metric.title, -_ASIDE, "o", colour),
        (metric.twin, f"{metric.title}, {metric.twin_title}", _ASIDE, "s", "white"),
    )
    for key, label, aside, marker, face in sides:
        found = [(y + aside, each[key]) for y, each in enumerate(outcomes) if key in each]
        drawn = [(y, each, each.mean) for y, each in found if each.mean is not None]
        if not drawn:
            continue
        axes.errorbar(
            [mean for _, _, mean in drawn],
            [y for y, _, _ in drawn],
            xerr=_bars([each for _, each, _ in drawn]),
            linestyle="",
            marker=marker,
            markersize=5,
            color=colour,
            markerfacecolor=face,
            elinewidth=0.8,
            capsize=2.5,
            label=label,
        )
    for y, each in enumerate(record.survival.values()):
        if each.error is not None:
            axes.annotate("training failed", (0.0, y), fontsize=7, color=SOFT, va="center")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share of test images", fontsize=8)
    style_axes(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
        )


def _bars(found: Sequence[Summary]) -> list[list[float]]:
    """How far each interval reaches below and above its mean; 0 where there is none."""
    low, high = [], []
    for each in found:
        mean = each.mean or 0.0
        ends = each.ci95 or (mean, mean)
        low.append(max(0.0, mean - ends[0]))
        high.append(max(0.0, ends[1] - mean))
    return [low, high]
