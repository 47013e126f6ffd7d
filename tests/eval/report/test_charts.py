"""The charts of a sweep: which there are, their series, their text, and their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from distillsec.eval.report.charts import MOST_SERIES, axis_charts, chart_text, numeric
from distillsec.eval.report.load import load_experiment

Make = Callable[..., Path]
Cli = Callable[..., Result]
NETWORKS = ("convnet", "mlp", "lenet")


def test_series_are_combinations_of_the_other_axes_or_their_mean(
    make_sweep: Make, tmp_path: Path
) -> None:
    def rates(size: int, rate: int) -> dict[int, float]:
        return {seed: 0.1 * size + 0.01 * rate + 0.001 * seed for seed in range(3)}

    def grid(count: int) -> dict[Any, dict[int, float]]:
        pairs = [(size, rate) for size in (1, 2) for rate in range(count)]
        return {(("trigger_size", size), ("rate", rate)): rates(size, rate) for size, rate in pairs}

    few = axis_charts(load_experiment(make_sweep(tmp_path / "few", grid(2), files=False)))
    assert [(chart.axis, chart.metric.title) for chart in few] == [
        ("trigger_size", "ASR"),
        ("trigger_size", "CTA"),
        ("rate", "ASR"),
        ("rate", "CTA"),
    ]
    assert "with rate 0: 0.10 at 1, 0.20 at 2" in chart_text(few[0]) and not few[0].note
    count = MOST_SERIES + 1
    many = axis_charts(load_experiment(make_sweep(tmp_path / "many", grid(count), files=False)))
    assert many[0].note == f"Mean over the {count} combinations of rate, seed by seed."
    assert "trigger_size: 0.13 at 1, 0.23 at 2" in chart_text(many[0])


def test_axes_that_vary_together_are_one_series(make_sweep: Make, tmp_path: Path) -> None:
    points = {(("ipc", n), ("epochs", 100 * n)): {0: 0.1 * n, 1: 0.2} for n in (1, 10, 50)}
    charts = axis_charts(load_experiment(make_sweep(tmp_path / "zip", points, files=False)))
    assert charts[0].note == "epochs varies along with ipc."
    assert "at 1, 0.60 at 10" in chart_text(charts[0])


@pytest.mark.parametrize("axis", ["trigger_size", "ipc"])
def test_several_victim_networks_share_a_chart(make_sweep: Make, tmp_path: Path, axis: str) -> None:
    points = {((axis, value),): {0: 0.1 * value} for value in (1, 2)}
    sweep = make_sweep(tmp_path / "sweep", points, files=False, networks=NETWORKS)
    asr, cta = axis_charts(load_experiment(sweep))
    assert (asr.metric.title, cta.metric.title) == ("ASR", "CTA")
    assert list(asr.series) == [f"victim network {name}" for name in NETWORKS]
    assert list(asr.values) == [1, 2] and not asr.categories


def test_an_axis_of_one_value_is_charted_against_the_networks(
    make_sweep: Make, tmp_path: Path
) -> None:
    points = {(("victim_network", NETWORKS),): {0: 0.5, 1: 0.6, 2: 0.7}}
    sweep = make_sweep(tmp_path / "sweep", points, files=False, networks=NETWORKS)
    asr, _ = axis_charts(load_experiment(sweep))
    assert asr.title == "ASR against victim network"
    assert asr.categories and tuple(asr.values) == NETWORKS and list(asr.series) == [""]
    alone = make_sweep(tmp_path / "alone", {(("ipc", 1),): {0: 0.5}}, files=False)
    assert axis_charts(load_experiment(alone)) == []


def test_networks_are_never_averaged(make_sweep: Make, tmp_path: Path) -> None:
    points = {
        (("trigger_size", size), ("rate", rate)): {0: 0.1 * rate, 1: 0.2 * rate}
        for size in (1, 2)
        for rate in range(MOST_SERIES)
    }
    sweep = make_sweep(tmp_path / "sweep", points, files=False, networks=NETWORKS)
    chart = axis_charts(load_experiment(sweep))[0]
    assert chart.note == f"Mean over the {MOST_SERIES} combinations of rate, seed by seed."
    assert list(chart.series) == [f"victim network {name}" for name in NETWORKS]


def test_names_truth_values_and_class_numbers_are_categories(
    make_sweep: Make, tmp_path: Path
) -> None:
    assert numeric([1, 2.5]) and not numeric([1]) and not numeric([1, "a"])
    assert not numeric([True, False])
    cases: dict[str, list[Any]] = {"backend": ["dm", "dc"], "target": [9, 0], "ipc": [10, 1]}
    for axis, values in cases.items():
        points = {((axis, value),): {0: 0.5} for value in values}
        chart = axis_charts(load_experiment(make_sweep(tmp_path / axis, points, files=False)))[0]
        assert chart.categories == (axis != "ipc")
        assert list(chart.values) == (values if axis == "backend" else sorted(values))


# Files --------------------------------------------------------------------------------------------


def test_charts_are_written_as_files(cli: Cli, small_sweep: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "charts"
    done = cli("report", small_sweep, "--charts", folder)
    assert done.exit_code == 0 and done.stdout == f"{folder}: 2 charts\n", done.stderr
    names = ["sweep-trigger_size-asr.svg", "sweep-trigger_size-cta.svg"]
    assert sorted(path.name for path in folder.iterdir()) == names
    first = (folder / names[0]).read_bytes()
    assert b"<svg" in first
    assert not list(Path.cwd().glob("report.html"))
    done = cli("report", small_sweep, "--charts", folder, "--format", "csv")
    assert done.stdout.startswith('"source","kind",') and "2 charts" in done.stderr
    assert (folder / names[0]).read_bytes() == first
    (tmp_path / "file").write_text("")
    refused = cli("report", small_sweep, "--charts", tmp_path / "file")
    assert refused.exit_code == 2 and "cannot write" in refused.stderr


def test_charts_of_folders_with_one_name_are_all_written(
    cli: Cli, make_sweep: Make, tmp_path: Path
) -> None:
    points = {(("a/b", value),): {0: 0.5} for value in (1, 2)}
    sweeps = [tmp_path / name / "sweep" for name in "xy"]
    for sweep in sweeps:
        sweep.parent.mkdir()
        make_sweep(sweep, points, files=False)
    assert cli("report", *sweeps, "--charts", tmp_path / "charts").exit_code == 0
    found = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert len(found) == 4 and all(name.startswith("sweep-a-b-") for name in found)


def test_a_table_alone_is_enough(cli: Cli, small_sweep: Path, tmp_path: Path) -> None:
    """A recorded table has no runs beside it: figures and charts, no pictures."""
    table = (small_sweep / "table.json").rename(tmp_path / "recorded.json")
    found = load_experiment(table)
    assert (found.name, len(found.rows), found.pictured) == ("recorded", 3, ())
    assert cli("report", table, "--baseline", table, "--format", "md").exit_code == 0
    (tmp_path / "other.json").write_text("{}")
    refused = cli("report", tmp_path / "other.json", "--format", "md")
    assert refused.exit_code == 2 and "no table of a sweep or a suite" in refused.stderr
