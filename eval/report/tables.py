"""A report's tables, cell by cell, before they become HTML, Markdown, LaTeX or CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from ..grid.ablation_table import COLUMNS
from ..grid.benchmark_table import judged
from ..results.defense_tables import budget_label
from ..results.metrics import Summary
from ..results.record import Metrics
from .compare import COMPARED, Change, Comparison, told_row
from .model import Row, Source

_ALARMS: Final = ("set_alarm", "alarm")
_NAMED: Final = "target_suspected"
_OF: Final = {
    "row_auroc": "rows",
    "auroc": "inputs",
    "set_auroc": "sets",
    "model_auroc": "models",
}
_ANSWERS: Final = {
    "attack_success_rate": "ASR",
    "control_attack_success_rate": "ASR, control",
    "clean_test_accuracy": "CTA",
    "control_clean_test_accuracy": "CTA, clean twin",
    "defense_effectiveness_rating": "DER",
}


@final
@dataclass(frozen=True)
class Cell:
    """One cell. more: an interval, or what a figure is of. value: what rows are sorted by."""

    text: str
    more: str = ""
    value: float | None = None
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.more}".strip()


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """heads: (title, whether its column holds figures). naming: how many columns name the row.

    labels: for each row what must stand beside its figures.
    """

    caption: str
    heads: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Cell]]
    naming: int = 1
    labels: Sequence[Sequence[str]] = ()


def without_empty(table: Table) -> Table:
    """The table without columns in which no row says anything, but those that name the rows."""
    kept = [
        number
        for number in range(len(table.heads))
        if number < table.naming or any(row[number].text not in ("", "–") for row in table.rows)
    ]
    return replace(
        table,
        heads=[table.heads[number] for number in kept],
        rows=[[row[number] for number in kept] for row in table.rows],
    )


def figure(summary: Summary | None) -> Cell:
    """``0.768 [0.69, 0.85]``; an en dash where nothing was measured."""
    if summary is None or summary.mean is None:
        return Cell("–")
    low_high = ""
    if summary.ci95 is not None:
        low_high = f"[{minus(f'{summary.ci95[0]:.3f}')}, {minus(f'{summary.ci95[1]:.3f}')}]"
    return Cell(minus(f"{summary.mean:.3f}"), low_high, summary.mean)


def minus(text: str) -> str:
    """A number with a true minus sign, and none before zero."""
    return text.removeprefix("-") if not text.strip("-0.") else text.replace("-", "−")


def plain(value: Any) -> Cell:
    """A swept value."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell("" if value is None else str(value), value=float(value) if number else None)


def over(source: Source) -> str:
    """What the intervals of a source are over, as a sentence."""
    if all(row.conditional for row in source.rows) and source.rows:
        return (
            "Intervals are 95 % intervals over the victims of this one distilled set: they say "
            "nothing of another distillation."
        )
    return (
        "Intervals are 95 % intervals over distillation seeds (Student's t for rates, cut to "
        "[0, 1]; Wilson's for shares); each seed counts once, with the mean over its victims."
    )


def summary_table(source: Source) -> Table:
    """The undefended figures of every row."""
    rows = source.undefended
    shown = {key: title for key, title in COLUMNS.items() if any(key in r.metrics for r in rows)}
    several = _several(rows) or not source.columns
    heads = _place_heads(source) + ([("victims", False)] if several else [])
    naming = len(heads)
    heads += [*((title, True) for title in shown.values()), ("seeds", True), ("note", False)]
    found = Table(
        caption=f"{source.name}: no defense",
        heads=heads,
        naming=naming,
        labels=[row.labels for row in rows],
        rows=[
            [
                *_place(source, row, several=several),
                *(figure(row.metrics.get(key)) for key in shown),
                _seeds(row),
                _note(row),
            ]
            for row in rows
        ],
    )
    return without_empty(found)


def defense_table(source: Source) -> Table:
    """The figures of every defense, detectors and others in one table."""
    rows = source.defended
    several = _several(rows)
    shown = {key: title for key, title in _ANSWERS.items() if any(key in r.metrics for r in rows)}
    alarms = any(key in row.metrics for row in rows for key in _ALARMS)
    families = any(row.family for row in rows)
    heads = _place_heads(source) + ([("victims", False)] if several else [])
    naming = len(heads) + 1
    heads += [("defense", False), *([("family", False)] if families else [])]
    heads += [(title, True) for title in shown.values()]
    heads += [("AUROC", True)]
    heads += [("alarm", True), ("false alarm", True)] if alarms else []
    named = any(_NAMED in row.metrics for row in rows)
    heads += [("target most anomalous", True)] if named else []
    bar = any(row.holds is not None for row in rows)
    heads += [("holds", False)] if bar else []
    heads += [("seeds", True), ("note", False)]
    found = Table(
        caption=f"{source.name}: after each defense"
        + (f", {budget_label(source.budget)}" if source.budget else ""),
        heads=heads,
        naming=naming,
        labels=[row.labels for row in rows],
        rows=[
            [
                *_place(source, row, several=several),
                Cell(row.defense or ""),
                *([Cell(row.family or "–")] if families else []),
                *(figure(row.metrics.get(key)) for key in shown),
                _auroc(row.metrics),
                *(_alarms(row.metrics) if alarms else ()),
                *([figure(row.metrics.get(_NAMED))] if named else []),
                *([_holds(row)] if bar else []),
                _seeds(row),
                _note(row),
            ]
            for row in rows
        ],
    )
    return without_empty(found)


def _several(rows: Iterable[Row]) -> bool:
    return len({row.network for row in rows}) > 1


def _place_heads(source: Source) -> list[tuple[str, bool]]:
    names = ("axis", "value") if source.one_at_a_time else source.columns
    return [(name, False) for name in names]


def _place(source: Source, row: Row, *, several: bool) -> list[Cell]:
    if source.one_at_a_time:
        cells = [Cell(str(row.axis)), *map(plain, row.place.values())]
    else:
        cells = [plain(row.place.get(name)) for name in source.columns]
    return [*cells, *([Cell(row.network)] if several else [])]


def _auroc(metrics: Metrics) -> Cell:
    """The figure that a detector is judged by, and what it is of."""
    name = judged(metrics)
    if name is None:
        return Cell("–")
    found = figure(metrics[name])
    return Cell(found.text, f"of {_OF[name]} {found.more}".strip(), found.value)


def _alarms(metrics: Metrics) -> tuple[Cell, Cell]:
    name = next((name for name in _ALARMS if name in metrics), "")
    return figure(metrics.get(name)), figure(metrics.get(f"control_{name}"))


def _holds(row: Row) -> Cell:
    if row.holds is None:
        return Cell("–")
    return Cell("holds", mark="good", value=1.0) if row.holds else Cell("no", value=0.0)


def _seeds(row: Row) -> Cell:
    got = len(row.seeds)
    if row.conditional:
        return Cell("1 set", value=1.0)
    if not row.seeds and row.metrics:
        return Cell("–")
    return Cell(f"{got}/{row.wanted}" if got != row.wanted else f"{got}", value=float(got))


def _note(row: Row) -> Cell:
    mark = "bad" if row.labels else ""
    return Cell("; ".join([*row.labels, *([row.note] if row.note else [])]), mark=mark)


def overview_table(sources: Sequence[Source]) -> Table:
    """What is on a page: a line for each run, sweep or suite; figures where there is one row."""
    heads = [("name", False), ("kind", False), ("status", False), ("what", False)]
    heads += [("rows", True), *((title, True) for title in COLUMNS.values())]
    rows = []
    for source in sources:
        count = len(source.rows)
        alone = source.undefended[0] if len(source.undefended) == 1 else None
        cells = [Cell(source.name), Cell(source.kind), Cell(source.status), Cell(source.title)]
        cells.append(Cell(str(count), value=float(count)))
        cells += [figure(alone.metrics.get(key) if alone else None) for key in COLUMNS]
        rows.append(cells)
    labels = [source.labels for source in sources]
    return Table(caption="On this page", heads=heads, rows=rows, labels=labels)


# A comparison -------------------------------------------------------------------------------------


def change_table(found: Comparison) -> Table:
    """Every compared figure, with its verdict."""
    heads = ("row", "figure", "baseline", "now", "difference", "p", "q", "seeds", "verdict")
    return Table(
        caption=f"{found.source.name} against {found.baseline.name}",
        heads=[(head, head not in ("row", "figure", "verdict")) for head in heads],
        naming=2,
        labels=[change.row.labels for change in found.changes],
        rows=[
            [
                Cell(told_row(change.row)),
                Cell(COMPARED[change.metric]),
                Cell(minus(f"{change.before:.3f}"), value=change.before),
                Cell(minus(f"{change.now:.3f}"), value=change.now),
                _difference(change),
                _chance(change.p),
                _chance(change.q),
                Cell(str(len(change.seeds)), value=float(len(change.seeds))),
                Cell(change.verdict, mark=_MARKS[change.verdict]),
            ]
            for change in found.changes
        ],
    )


_MARKS: Mapping[str, str] = {
    "more than noise": "more",
    "within noise": "",
    "too few seeds": "few",
}


def _difference(change: Change) -> Cell:
    text = minus(f"{change.difference:+.3f}") if round(change.difference, 3) else "0.000"
    if change.ci95 is None:
        return Cell(text, value=change.difference)
    low, high = (minus(f"{end:.3f}") for end in change.ci95)
    return Cell(text, f"[{low}, {high}]", change.difference)


def _chance(value: float | None) -> Cell:
    if value is None:
        return Cell("–")
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}", value=value)
