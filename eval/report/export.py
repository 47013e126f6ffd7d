"""A report as tables only: CSV for programs, Markdown and LaTeX for papers."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..results.columns import UNDEFENDED_COLUMNS
from ..results.formatting import markdown_text
from .compare import COMPARED, Change, Comparison
from .model import Experiment, ResultRow
from .tables import ReportTable, change_table, defended_table, summary_table

_LATEX: Final = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "−": "$-$",
    "∞": r"$\infty$",
    "×": r"$\times$",
    "ε": r"$\varepsilon$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
}


_FORMULA_SIGNS: Final = ("=", "+", "-", "@")


def as_csv(experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()) -> str:
    """A line for every row; each figure's mean, std, interval and n in columns of their own.

    With a comparison also the baseline's mean, the paired difference with interval, p, q, the
    number of shared seeds, and the verdict.
    """
    rows = [(experiment, row) for experiment in experiments for row in experiment.rows]
    names = dict.fromkeys(name for experiment in experiments for name in experiment.varied)
    metrics = dict.fromkeys(
        [*UNDEFENDED_COLUMNS, *(name for _, row in rows for name in row.metrics)]
    )
    changes = {
        (id(change.row), change.metric): change for each in comparisons for change in each.changes
    }
    lines: list[dict[str, Any]] = []
    for experiment, row in rows:
        line: dict[str, Any] = {"source": experiment.name, "kind": experiment.kind}
        line |= {f"swept.{name}": row.varied.get(name) for name in names}
        line |= _row_keys(row)
        for name in metrics:
            line |= _figures(row, name)
        for name in COMPARED if comparisons else ():
            line |= _compared(name, changes.get((id(row), name)))
        lines.append({_in_cell(key): _in_cell(value) for key, value in line.items()})
    buffer = io.StringIO()
    heads = list(dict.fromkeys(key for line in lines for key in line))
    # Quotes around all text: a spreadsheet that splits at semicolons leaves quoted ones alone.
    writer = csv.DictWriter(
        buffer, heads or ["source"], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _row_keys(row: ResultRow) -> dict[str, Any]:
    return {
        "victims": row.network,
        "defense": row.defense or "",
        "family": row.family or "",
        "state": row.state,
        "seeds": " ".join(map(str, row.seeds)),
        "seeds_wanted": row.seeds_wanted,
        "conditional_on_set": row.conditional,
        "labels": "; ".join(row.labels),
        "note": row.note,
    }


def _figures(row: ResultRow, name: str) -> dict[str, Any]:
    summary = row.metrics.get(name)
    low, high = (summary and summary.ci95) or (None, None)
    return {
        f"{name}_mean": summary and summary.mean,
        f"{name}_std": summary and summary.std,
        f"{name}_ci_low": low,
        f"{name}_ci_high": high,
        f"{name}_n": summary and sum(value is not None for value in summary.values),
    }


def _compared(name: str, change: Change | None) -> dict[str, Any]:
    parts = ("before", "difference", "p", "q", "verdict")
    low, high = (change and change.ci95) or (None, None)
    return {
        **{f"{name}_{part}": change and getattr(change, part) for part in parts},
        f"{name}_difference_low": low,
        f"{name}_difference_high": high,
        f"{name}_shared_seeds": change and len(change.seeds),
    }


def _in_cell(value: Any) -> Any:
    """Text on one line, marked as text where a spreadsheet would take it for a formula.

    Spreadsheets skip spaces before a formula, and some take full-width signs too.
    """
    if not isinstance(value, str):
        return value
    plain = " ".join(value.split())
    return f"'{plain}" if unicodedata.normalize("NFKC", plain[:1]) in _FORMULA_SIGNS else plain


def as_markdown(experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()) -> str:
    """For each experiment a heading, its tables, and its comparison."""
    lines: list[str] = []
    for experiment, tables, notes in _parts(experiments, comparisons):
        lines += [
            f"# {markdown_text(experiment.title)}",
            "",
            *(f"{markdown_text(text)}\n" for text in notes),
        ]
        for table in tables:
            heads = [markdown_text(column.title) for column in table.columns]
            rules = ["---:" if column.kind == "figure" else "---" for column in table.columns]
            lines += [f"## {markdown_text(table.caption)}", "", f"| {' | '.join(heads)} |"]
            lines.append(f"| {' | '.join(rules)} |")
            lines += [f"| {' | '.join(markdown_text(str(c)) for c in row)} |" for row in table.rows]
            lines.append("")
    return "\n".join(lines)


def as_latex(experiments: Sequence[Experiment], comparisons: Sequence[Comparison] = ()) -> str:
    """A ``table`` for each; needs ``\\usepackage{booktabs}``."""
    lines = [r"% \usepackage{booktabs}"]
    for experiment, tables, notes in _parts(experiments, comparisons):
        comments = (" ".join(text.split()) for text in (experiment.title, experiment.command))
        lines += ["", *(f"% {text}" for text in comments if text)]
        for table in tables:
            heads = " & ".join(latex(column.title) for column in table.columns)
            kinds = "".join("r" if column.kind == "figure" else "l" for column in table.columns)
            lines += [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{latex(' '.join([f'{table.caption}.', *notes]))}}}",
                rf"\begin{{tabular}}{{{kinds}}}",
                r"\toprule",
                rf"{heads} \\",
                r"\midrule",
                *(rf"{' & '.join(latex(str(c)) for c in row)} \\" for row in table.rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _parts(
    experiments: Sequence[Experiment], comparisons: Sequence[Comparison]
) -> list[tuple[Experiment, list[ReportTable], list[str]]]:
    """Each experiment with its tables and the sentences above them."""
    compared = {id(each.experiment): each for each in comparisons}
    found = []
    for experiment in experiments:
        tables = [summary_table(experiment)]
        tables += [defended_table(experiment)] if experiment.defended else []
        notes = [experiment.interval_note]
        if experiment.status != "done":
            notes.append(f"Status: {experiment.status}. {experiment.error}".strip())
        notes += [f"{text}." for text in experiment.labels]
        comparison = compared.get(id(experiment))
        if comparison is not None:
            tables.append(change_table(comparison))
            notes += comparison.notes
        found.append((experiment, tables, notes))
    return found


FORMATS: Final[Mapping[str, Callable[[Sequence[Experiment], Sequence[Comparison]], str]]] = {
    "csv": as_csv,
    "md": as_markdown,
    "latex": as_latex,
}
