"""A report as tables only: CSV and Parquet for programs, Markdown and LaTeX for papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ..results.formatting import markdown_text
from .compare import Comparison
from .model import Experiment
from .spreadsheet import as_csv, as_parquet, as_wide_csv
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


Exporter = Callable[[Sequence[Experiment], Sequence[Comparison]], str | bytes]
FORMATS: Final[Mapping[str, Exporter]] = {
    "csv": as_csv,
    "md": as_markdown,
    "latex": as_latex,
    "parquet": as_parquet,
}
WIDE: Final[Mapping[str, Exporter]] = {"csv": as_wide_csv}
"""The formats with one line a row instead of one a metric."""
