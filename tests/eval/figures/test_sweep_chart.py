"""The chart of a sweep: what is drawn where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from distillsec.eval.figures.style import as_png, save
from distillsec.eval.figures.sweep_chart import ASR, CTA, ChartedMetric, SweepChart, draw_chart
from distillsec.eval.results.metrics import Summary


def summary(mean: float | None, low: float = 0.0, high: float = 1.0) -> Summary:
    return Summary(mean=mean, std=None, ci95=(low, high), values=(mean,))


def chart(
    values: Sequence[Any],
    means: Mapping[str, Sequence[float | None]],
    *,
    categories: bool,
    metric: ChartedMetric = ASR,
) -> SweepChart:
    return SweepChart(
        metric=metric,
        axis="axis",
        values=values,
        categories=categories,
        series={
            name: {
                value: {metric.name: summary(mean), metric.twin: summary(0.1)}
                for value, mean in zip(values, each, strict=True)
            }
            for name, each in means.items()
        },
    )


def drawn(found: SweepChart) -> Axes:
    (axes,) = draw_chart(found).axes
    return axes


def parts(axes: Axes) -> list[tuple[Any, ...]]:
    """(line, caps, bars) of everything drawn, twins first in each series."""
    return [each.lines for each in axes.containers if isinstance(each, ErrorbarContainer)]


def lines(axes: Axes) -> list[Any]:
    return [line for line, *_ in parts(axes)]


def test_numbers_are_joined_and_categories_are_not() -> None:
    for categories, style in ((False, "-"), (True, "None")):
        twin, attacked = lines(
            drawn(chart([1, 2, 3], {"": [0.2, 0.5, 0.9]}, categories=categories))
        )
        assert attacked.get_linestyle() == style
        assert (twin.get_linestyle() == "None") == categories
        assert list(attacked.get_ydata()) == [0.2, 0.5, 0.9]
        assert twin.get_markerfacecolor() == "white" != attacked.get_markerfacecolor()


def test_categories_have_a_place_each_and_every_mark_has_its_own() -> None:
    names = ["dm", "$dc$", "dd"]
    axes = drawn(chart(names, {"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.3]}, categories=True))
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    places = [place for line in lines(axes) for place in line.get_xdata()]
    assert len(set(places)) == 12
    assert sorted(round(place) for place in places) == sorted([0, 1, 2] * 4)


@pytest.mark.parametrize(("values", "scale"), [([1, 2, 8], "linear"), ([0.001, 0.1, 1], "log")])
def test_more_than_a_decade_is_logarithmic(values: list[float], scale: str) -> None:
    axes = drawn(chart(values, {"": [0.1, 0.2, 0.3]}, categories=False))
    assert axes.get_xscale() == scale
    assert list(lines(axes)[1].get_xdata()) == pytest.approx(values)


def test_intervals_are_cut_and_missing_means_are_left_out() -> None:
    found = chart([1, 2, 3], {"": [0.1, None, 0.9]}, categories=False)
    found.series[""][1][ASR.name] = summary(0.1, -0.4, 1.3)
    axes = drawn(found)
    assert list(lines(axes)[1].get_ydata()) == [0.1, 0.9]
    _, _, (bars,) = parts(axes)[1]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.0, 1.0])


def test_accuracies_are_shown_in_detail_and_rates_in_full() -> None:
    means = {"": [0.93, 0.95]}
    assert drawn(chart([1, 2], means, categories=False)).get_ylim() == (-0.03, 1.03)
    found = chart([1, 2], means, categories=False, metric=CTA)
    for point in found.series[""].values():
        point[CTA.name] = point[CTA.twin] = summary(0.94, 0.93, 0.95)
    low, high = drawn(found).get_ylim()
    assert low == pytest.approx(0.795) and high == pytest.approx(1.005)


def test_many_series_differ_in_colour_or_marker() -> None:
    found = chart([1, 2], {f"series {n}": [0.1, 0.2] for n in range(14)}, categories=False)
    looks = {(line.get_color(), line.get_marker()) for line in lines(drawn(found))}
    assert len(looks) == 14


def test_equal_charts_give_equal_files(tmp_path: Path) -> None:
    found = chart(["a", "猫"], {"": [0.1, 0.2]}, categories=True)
    for name in ("1.svg", "2.svg", "1.png"):
        save(draw_chart(found), tmp_path / name)
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == as_png(draw_chart(found))
