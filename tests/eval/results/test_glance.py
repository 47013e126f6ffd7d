"""A record in a notebook: one line, a table, a frame, a plot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from distillsec.distill.types import RequestError
from distillsec.eval.results.record import Outcome, Record, read_record

Run = Callable[..., Path]


@pytest.fixture
def record(make_run: Run, tmp_path: Path) -> Record:
    found = read_record(make_run(tmp_path / "run", seed=3, labels=["a <b> label"], files=False))
    figures = {name: found.metrics[name] for name in ("attack_success_rate",)}
    fields = {"family": "repair", "budget": "quick"}
    found.defenses = {
        "nad": Outcome(status="done", metrics=figures, **fields),
        "clp": Outcome(status="not applicable", reason="no batch norm", **fields),
    }
    return found


def test_one_line(record: Record) -> None:
    expected = (
        "<Record attack: digits · dc · IPC 2 · convnet · naive; done; CTA 0.900; ASR 0.700; "
        "control ASR 0.010; 2 defenses>"
    )
    assert repr(record) == str(record) == expected


def test_the_table_shows_text_as_it_is(record: Record) -> None:
    html = record._repr_html_()
    assert "a &lt;b&gt; label" in html and "<b> label" not in html
    for cell in ("convnet", "nad", "0.700", "backdoor gain"):
        assert f"<td>{cell}" in html or f"<th>{cell}" in html
    assert "clp" not in html  # it has no figures


def test_a_record_knows_its_folder(record: Record, tmp_path: Path) -> None:
    assert record.folder == tmp_path / "run"
    copied = Record.model_validate(record.model_dump())
    with pytest.raises(RequestError, match="in no folder"):
        _ = copied.folder
    (tmp_path / "other").mkdir()
    copied.write(tmp_path / "other" / "record.json")
    assert read_record(tmp_path / "other").folder == copied.folder == tmp_path / "other"


def test_the_frame_has_a_row_for_each_value(record: Record) -> None:
    pandas = pytest.importorskip("pandas")
    frame = record.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns[:4]) == ["dataset", "backend", "attack", "ipc"]
    assert set(frame.seed) == {3} and set(frame.victim_network) == {"convnet"}
    ours = frame[(frame.on == "attacked set") & frame.defense.isna()]
    rates = ours[ours.metric == "attack_success_rate"]
    assert list(rates.value) == list(record.metrics["attack_success_rate"].values)
    assert list(rates.victim) == [0, 1]
    twins = frame[(frame.on == "clean twin") & (frame.metric == "attack_success_rate")]
    assert list(twins.value) == list(record.metrics["control_attack_success_rate"].values)
    assert set(frame.defense.dropna()) == {"nad"}


def test_a_frame_over_seeds_has_no_victims(record: Record) -> None:
    pytest.importorskip("pandas")
    record.kind, record.seeds, record.defenses = "seeds", [3, 4], {}
    frame = record.to_frame()
    assert frame.victim.isna().all()
    assert list(frame[frame.metric == "backdoor_gain"].seed) == [3, 4]


def test_a_frame_needs_pandas(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RequestError, match=r"pip install 'distillsec\[pandas\]'"):
        record.to_frame()


def test_the_plot_has_a_line_for_each_rate(record: Record) -> None:
    from matplotlib.figure import Figure

    axes = record.plot(Figure().subplots())
    titles = [label.get_text() for label in axes.get_yticklabels()]
    assert titles == ["CTA", "CTA, clean twin", "ASR", "ASR, control", "ASR, nad"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    means = numpy.ravel([line.get_xdata() for line in dots]).tolist()
    assert means == pytest.approx([0.9, 0.91, 0.7, 0.01, 0.7], abs=1e-3)
    colours = {line.get_color() for line in axes.lines}
    assert len(colours) == 2
