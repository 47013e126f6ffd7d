"""The tables of a report, before they become HTML, CSV, Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from ..results.columns import UNDEFENDED_COLUMNS, budget_label
from ..results.formatting import interval, minus
from ..results.judgement import DETECTION_FIGURES, detection_figure
from ..results.metrics import Summary
from .compare import COMPARED, Change, Comparison
from .model import Experiment, ResultRow

ALARMS: Final = ("set_alarm", "alarm")
_NAMED: Final = {"target_suspected": "target most anomalous"}
_MITIGATED: Final = {
    "attack_success_rate": "ASR",
    "control_attack_success_rate": "ASR, control",
    "clean_test_accuracy": "CTA",
    "control_clean_test_accuracy": "CTA, clean twin",
    "defense_effectiveness_rating": "DER",
}
_NOTHING: Final = ("", "–")

ColumnKind = Literal["name", "figure", "text", "note"]
"""``name`` identifies the row; a ``note`` is a long text."""


@final
@dataclass(frozen=True)
class TableCell:
    """detail: an interval, or what the figure is of. value: for sorting. mark: a CSS class."""

    text: str
    detail: str = ""
    value: float | None = None
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


@final
@dataclass(frozen=True)
class TableColumn:
    """A column with its cells, one for each row."""

    title: str
    kind: ColumnKind
    cells: Sequence[TableCell]

    @property
    def shown(self) -> bool:
        """Whether any row has something in it; columns that identify rows always are shown."""
        return self.kind == "name" or any(cell.text not in _NOTHING for cell in self.cells)


@final
@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """labels: for each row what must stand beside its figures."""

    caption: str
    columns: Sequence[TableColumn]
    labels: Sequence[Sequence[str]]

    @property
    def rows(self) -> list[tuple[TableCell, ...]]:
        """The cells row by row."""
        return list(zip(*(column.cells for column in self.columns), strict=True))


# Cells --------------------------------------------------------------------------------------------


def figure_cell(summary: Summary | None) -> TableCell:
    """``0.768 [0.690, 0.850]``; an en dash where nothing was measured."""
    if summary is None or summary.mean is None:
        return TableCell("–")
    return TableCell(minus(f"{summary.mean:.3f}"), interval(summary.ci95, 3), summary.mean)


def _setting_cell(value: Any) -> TableCell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return TableCell("" if value is None else str(value), value=float(value) if number else None)


def _auroc_cell(row: ResultRow) -> TableCell:
    """The figure that a detector is judged by, and what it detects."""
    name = detection_figure(row.metrics)
    if name is None:
        return TableCell("–")
    found = figure_cell(row.metrics[name])
    return TableCell(
        found.text, f"of {DETECTION_FIGURES[name]} {found.detail}".strip(), found.value
    )


def _alarm_cell(row: ResultRow, prefix: str = "") -> TableCell:
    name = next((name for name in ALARMS if name in row.metrics), "")
    return figure_cell(row.metrics.get(f"{prefix}{name}"))


def _holds_cell(row: ResultRow) -> TableCell:
    if row.holds is None:
        return TableCell("–")
    return TableCell("holds", mark="good", value=1.0) if row.holds else TableCell("no", value=0.0)


def _seeds_cell(row: ResultRow) -> TableCell:
    count = len(row.seeds)
    if row.conditional:
        return TableCell("1 set", value=1.0)
    if not row.seeds and row.metrics:
        return TableCell("–")
    text = f"{count}" if count == row.seeds_wanted else f"{count}/{row.seeds_wanted}"
    return TableCell(text, value=float(count))


def _note_cell(row: ResultRow) -> TableCell:
    mark = "bad" if row.labels else ""
    return TableCell("; ".join([*row.labels, *([row.note] if row.note else [])]), mark=mark)


# Tables of results --------------------------------------------------------------------------------


def summary_table(experiment: Experiment) -> ReportTable:
    """The undefended figures of every row."""
    rows = experiment.undefended
    columns = [
        *_setting_columns(experiment, rows, victims=not experiment.varied),
        *_figure_columns(rows, UNDEFENDED_COLUMNS),
        *_last_columns(rows),
    ]
    return _table(f"{experiment.name}: no defense", rows, columns)


def defended_table(experiment: Experiment) -> ReportTable:
    """The figures of every defense, detectors and others in one table."""
    rows = experiment.defended
    budget = f", {budget_label(experiment.budget)}" if experiment.budget else ""
    columns = [
        *_setting_columns(experiment, rows),
        _column("defense", "name", rows, lambda row: TableCell(row.defense or "")),
        _column("family", "text", rows, lambda row: TableCell(row.family or "–")),
        *_figure_columns(rows, _MITIGATED),
        _column("AUROC", "figure", rows, _auroc_cell),
        _column("alarm", "figure", rows, _alarm_cell),
        _column("false alarm", "figure", rows, lambda row: _alarm_cell(row, "control_")),
        *_figure_columns(rows, _NAMED),
        _column("holds", "text", rows, _holds_cell),
        *_last_columns(rows),
    ]
    return _table(f"{experiment.name}: after each defense{budget}", rows, columns)


def overview_table(experiments: Sequence[Experiment]) -> ReportTable:
    """What is on a page: a line for each experiment, with figures where it has a single row."""
    single = [each.undefended[0] if len(each.undefended) == 1 else None for each in experiments]

    def column(
        title: str, kind: ColumnKind, value: Callable[[Experiment], str | int]
    ) -> TableColumn:
        return TableColumn(title, kind, [_setting_cell(value(each)) for each in experiments])

    columns = [
        column("name", "name", lambda each: each.name),
        column("kind", "text", lambda each: each.kind),
        column("status", "text", lambda each: each.status),
        column("what", "note", lambda each: each.title),
        column("rows", "figure", lambda each: len(each.rows)),
    ]
    for key, title in UNDEFENDED_COLUMNS.items():
        cells = [figure_cell(row.metrics.get(key) if row else None) for row in single]
        columns.append(TableColumn(title, "figure", cells))
    labels = [each.labels for each in experiments]
    return ReportTable(caption="On this page", columns=columns, labels=labels)


def _table(caption: str, rows: Sequence[ResultRow], columns: list[TableColumn]) -> ReportTable:
    return ReportTable(
        caption=caption,
        columns=[column for column in columns if column.shown],
        labels=[row.labels for row in rows],
    )


def _column(
    title: str, kind: ColumnKind, rows: Sequence[ResultRow], cell: Callable[[ResultRow], TableCell]
) -> TableColumn:
    return TableColumn(title, kind, [cell(row) for row in rows])


def _setting_columns(
    experiment: Experiment, rows: Sequence[ResultRow], *, victims: bool = False
) -> list[TableColumn]:
    """The varied settings, and the victims' network where there are several or ``victims``."""
    if experiment.one_at_a_time:
        columns = [
            _column("axis", "name", rows, lambda row: TableCell(str(row.axis))),
            _column("value", "name", rows, lambda row: _setting_cell(*row.varied.values())),
        ]
    else:
        columns = [
            TableColumn(name, "name", [_setting_cell(row.varied.get(name)) for row in rows])
            for name in experiment.varied
        ]
    if victims or len({row.network for row in rows}) > 1:
        columns.append(_column("victims", "name", rows, lambda row: TableCell(row.network)))
    return columns


def _figure_columns(rows: Sequence[ResultRow], titles: Mapping[str, str]) -> list[TableColumn]:
    return [
        TableColumn(title, "figure", [figure_cell(row.metrics.get(key)) for row in rows])
        for key, title in titles.items()
    ]


def _last_columns(rows: Sequence[ResultRow]) -> list[TableColumn]:
    return [
        _column("seeds", "figure", rows, _seeds_cell),
        _column("note", "note", rows, _note_cell),
    ]


# A comparison -------------------------------------------------------------------------------------

_VERDICT_MARKS: Final = {"more than noise": "more", "within noise": "", "too few seeds": "few"}


def change_table(found: Comparison) -> ReportTable:
    """Every compared figure, with its verdict."""

    def column(title: str, kind: ColumnKind, cell: Callable[[Change], TableCell]) -> TableColumn:
        return TableColumn(title, kind, [cell(change) for change in found.changes])

    return ReportTable(
        caption=f"{found.experiment.name} against {found.baseline.name}",
        columns=[
            column("row", "name", lambda each: TableCell(str(each.row))),
            column("figure", "name", lambda each: TableCell(COMPARED[each.metric])),
            column("baseline", "figure", lambda each: _mean_cell(each.before)),
            column("now", "figure", lambda each: _mean_cell(each.now)),
            column("difference", "figure", _difference_cell),
            column("p", "figure", lambda each: _probability_cell(each.p)),
            column("q", "figure", lambda each: _probability_cell(each.q)),
            column("seeds", "figure", lambda each: _setting_cell(len(each.seeds))),
            column("verdict", "text", _verdict_cell),
        ],
        labels=[change.row.labels for change in found.changes],
    )


def _mean_cell(value: float) -> TableCell:
    return TableCell(minus(f"{value:.3f}"), value=value)


def _difference_cell(change: Change) -> TableCell:
    text = minus(f"{change.difference:+.3f}") if round(change.difference, 3) else "0.000"
    return TableCell(text, interval(change.ci95, 3), change.difference)


def _probability_cell(value: float | None) -> TableCell:
    if value is None:
        return TableCell("–")
    return TableCell("< 0.001" if value < 0.001 else f"{value:.3f}", value=value)


def _verdict_cell(change: Change) -> TableCell:
    return TableCell(change.verdict, mark=_VERDICT_MARKS[change.verdict])
