"""Figures as rows for programs: a tidy table, a wide one, as CSV or Parquet."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...distill.types import RequestError
from ..results.columns import UNDEFENDED_COLUMNS
from ..results.metrics import Summary
from .compare import COMPARED, Change, Comparison
from .model import Experiment, ResultRow

_FORMULA_SIGNS: Final = ("=", "+", "-", "@")
_CONTROL: Final = "control_"
_ABOUT: Final = ("dataset", "backend", "attack", "ipc")

Line = dict[str, Any]
_Changes = Mapping[tuple[int, str], Change]


def tidy_lines(
    experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()
) -> list[Line]:
    """A line for each metric of each row.

    Columns: the source; data set, backend, attack and IPC as far as they are known; what is swept
    (``swept.NAME``); seeds, the number of victims and their network, the defense; ``on``
    (``attacked set`` or ``clean twin``) and ``metric``; mean, std, 95 % interval and the number of
    values; what must stand beside the figure. With a comparison also the baseline's mean, the
    paired difference with its interval, p, q, the number of shared seeds, and the verdict.
    """
    names = _swept(experiments)
    changes = _changes(comparisons)
    lines = []
    for experiment in experiments:
        for row in experiment.rows:
            about: Line = {"source": experiment.name, "kind": experiment.kind}
            about |= {key: row.about.get(key) for key in _ABOUT}
            about |= {f"swept.{name}": row.varied.get(name) for name in names}
            about |= {"seeds": _text(row.seeds), "victims": row.about.get("victims")}
            about |= {"victim_network": row.network, "defense": row.defense or ""}
            about |= {"family": row.family or "", "state": row.state}
            for name, summary in row.metrics.items() or [(None, None)]:
                lines.append({**about, **_figure(name, summary), **_notes(row)})
                if comparisons:
                    lines[-1] |= _compared(changes.get((id(row), name or "")))
    return lines


def _figure(name: str | None, summary: Summary | None) -> Line:
    """The columns of one metric; empty ones for a row without any."""
    low, high = (summary and summary.ci95) or (None, None)
    twins = name is not None and name.startswith(_CONTROL)
    return {
        "on": None if name is None else "clean twin" if twins else "attacked set",
        "metric": name and name.removeprefix(_CONTROL),
        "mean": summary and summary.mean,
        "std": summary and summary.std,
        "ci_low": low,
        "ci_high": high,
        "n": summary and _count(summary),
    }


def _notes(row: ResultRow) -> Line:
    labels = "; ".join(row.labels)
    return {"conditional_on_set": row.conditional, "labels": labels, "note": row.note}


def as_csv(experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()) -> str:
    """The tidy table as CSV; text that a spreadsheet would take for a formula is marked."""
    return _csv(tidy_lines(experiments, comparisons))


def as_parquet(experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()) -> bytes:
    """The tidy table as a Parquet file; swept values of several types become text.

    Errors: ``RequestError`` where pandas or pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401 (pandas needs it to write; its own message is less clear)
        from pandas import DataFrame
    except ImportError as error:
        raise RequestError(
            f"parquet needs pandas and pyarrow: pip install 'distillsec[pandas]' ({error})"
        ) from error
    lines = tidy_lines(experiments, comparisons)
    for name in _swept(experiments):
        key = f"swept.{name}"
        if len({type(line[key]) for line in lines if line[key] is not None}) > 1:
            for line in lines:
                line[key] = None if line[key] is None else str(line[key])
    buffer = io.BytesIO()
    DataFrame(lines).to_parquet(buffer, index=False, engine="pyarrow")
    return buffer.getvalue()


def as_wide_csv(experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()) -> str:
    """A line for every row; each figure's mean, std, interval and n in columns of their own.

    With a comparison also the baseline's mean, the paired difference with interval, p, q, the
    number of shared seeds, and the verdict.
    """
    rows = [(experiment, row) for experiment in experiments for row in experiment.rows]
    metrics = dict.fromkeys(
        [*UNDEFENDED_COLUMNS, *(name for _, row in rows for name in row.metrics)]
    )
    names, changes = _swept(experiments), _changes(comparisons)
    lines: list[Line] = []
    for experiment, row in rows:
        line: Line = {"source": experiment.name, "kind": experiment.kind}
        line |= {f"swept.{name}": row.varied.get(name) for name in names}
        line |= _wide_keys(row)
        for name in metrics:
            line |= _wide_figure(row, name)
        for name in COMPARED if comparisons else ():
            compared = _compared(changes.get((id(row), name)))
            line |= {f"{name}_{part}": value for part, value in compared.items()}
        lines.append(line)
    return _csv(lines)


def _wide_keys(row: ResultRow) -> Line:
    return {
        "victims": row.network,
        "defense": row.defense or "",
        "family": row.family or "",
        "state": row.state,
        "seeds": _text(row.seeds),
        "seeds_wanted": row.seeds_wanted,
        **_notes(row),
    }


def _wide_figure(row: ResultRow, name: str) -> Line:
    summary = row.metrics.get(name)
    low, high = (summary and summary.ci95) or (None, None)
    return {
        f"{name}_mean": summary and summary.mean,
        f"{name}_std": summary and summary.std,
        f"{name}_ci_low": low,
        f"{name}_ci_high": high,
        f"{name}_n": summary and _count(summary),
    }


def _compared(change: Change | None) -> Line:
    parts = ("before", "difference", "p", "q", "verdict")
    low, high = (change and change.ci95) or (None, None)
    return {
        **{part: change and getattr(change, part) for part in parts},
        "difference_low": low,
        "difference_high": high,
        "shared_seeds": change and len(change.seeds),
    }


def _swept(experiments: Sequence[Experiment]) -> list[str]:
    return list(dict.fromkeys(name for each in experiments for name in each.varied))


def _changes(comparisons: Sequence[Comparison]) -> _Changes:
    return {(id(c.row), c.metric): c for each in comparisons for c in each.changes}


def _count(summary: Summary) -> int:
    return sum(value is not None for value in summary.values)


def _text(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def _csv(lines: Sequence[Line]) -> str:
    marked = [{_in_cell(key): _in_cell(value) for key, value in line.items()} for line in lines]
    buffer = io.StringIO()
    heads = list(dict.fromkeys(key for line in marked for key in line))
    # Quotes around all text: a spreadsheet that splits at semicolons leaves quoted ones alone.
    writer = csv.DictWriter(
        buffer, heads or ["source"], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writeheader()
    writer.writerows(marked)
    return buffer.getvalue()


def _in_cell(value: Any) -> Any:
    """Text on one line, marked as text where a spreadsheet would take it for a formula.

    Spreadsheets skip spaces before a formula, and some take full-width signs too.
    """
    if not isinstance(value, str):
        return value
    plain = " ".join(value.split())
    return f"'{plain}" if unicodedata.normalize("NFKC", plain[:1]) in _FORMULA_SIGNS else plain
