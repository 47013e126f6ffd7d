"""A report as tables alone: CSV for programs, Markdown and LaTeX for papers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..grid.ablation_table import COLUMNS
from .cells import Table, change_table, defense_table, over, summary_table
from .compare import COMPARED, Comparison
from .model import Row, Source

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


def as_csv(sources: Sequence[Source], comparisons: Sequence[Comparison] = ()) -> str:
    """A line for every row of every source; each figure's mean, std, interval and n by itself.

    With a comparison also the baseline's mean, the paired difference with interval, p, q, the
    number of shared seeds, and the verdict.
    """
    rows = [(source, row) for source in sources for row in source.rows]
    names = dict.fromkeys(name for source in sources for name in source.columns)
    metrics = dict.fromkeys([*COLUMNS, *(name for _, row in rows for name in row.metrics)])
    changes = {
        (id(change.row), change.metric): change for each in comparisons for change in each.changes
    }
    lines: list[dict[str, Any]] = []
    for source, row in rows:
        line: dict[str, Any] = {"source": source.name, "kind": source.kind}
        line |= {f"swept.{name}": row.place.get(name) for name in names}
        line |= _where(row)
        for name in metrics:
            line |= _figures(row, name)
        for name in COMPARED if comparisons else ():
            change = changes.get((id(row), name))
            parts = ("before", "difference", "p", "q", "verdict")
            line |= {f"{name}_{part}": change and getattr(change, part) for part in parts}
            low, high = (change and change.ci95) or (None, None)
            line |= {f"{name}_difference_low": low, f"{name}_difference_high": high}
            line |= {f"{name}_shared_seeds": change and len(change.seeds)}
        lines.append({key: _safe(value) for key, value in line.items()})
    buffer = io.StringIO()
    heads = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(buffer, heads or ["source"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _where(row: Row) -> dict[str, Any]:
    return {
        "victims": row.network,
        "defense": row.defense or "",
        "family": row.family or "",
        "state": row.state,
        "seeds": " ".join(map(str, row.seeds)),
        "seeds_wanted": row.wanted,
        "conditional_on_set": row.conditional,
        "labels": "; ".join(row.labels),
        "note": row.note,
    }


def _figures(row: Row, name: str) -> dict[str, Any]:
    summary = row.metrics.get(name)
    low, high = (summary and summary.ci95) or (None, None)
    return {
        f"{name}_mean": summary and summary.mean,
        f"{name}_std": summary and summary.std,
        f"{name}_ci_low": low,
        f"{name}_ci_high": high,
        f"{name}_n": summary and sum(value is not None for value in summary.values),
    }


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def as_markdown(sources: Sequence[Source], comparisons: Sequence[Comparison] = ()) -> str:
    """A heading and a table for each source, its defenses, and its comparison."""
    lines: list[str] = []
    for source, tables, told in _parts(sources, comparisons):
        lines += [f"# {_in_line(source.title)}", "", *(f"{_in_line(text)}\n" for text in told)]
        for table in tables:
            heads = [_in_line(title) for title, _ in table.heads]
            lines += [f"## {_in_line(table.caption)}", "", f"| {' | '.join(heads)} |"]
            lines.append("| " + " | ".join("---:" if n else "---" for _, n in table.heads) + " |")
            lines += [f"| {' | '.join(_in_line(str(c)) for c in row)} |" for row in table.rows]
            lines.append("")
    return "\n".join(lines)


def _in_line(text: str) -> str:
    """Text in a cell: no line break, no bar and no HTML."""
    plain = " ".join(text.split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", plain) if re.search(r"[\\|`<>*]", plain) else plain


def as_latex(sources: Sequence[Source], comparisons: Sequence[Comparison] = ()) -> str:
    """A ``table`` of booktabs rules for each; wants ``\\usepackage{booktabs}``."""
    lines = [r"% \usepackage{booktabs}"]
    for source, tables, told in _parts(sources, comparisons):
        command = " ".join(source.command.split())
        lines += ["", f"% {' '.join(source.title.split())}", *([f"% {command}"] if command else [])]
        for table in tables:
            caption = ". ".join([table.caption, *told])
            heads = " & ".join(latex(title) for title, _ in table.heads)
            lines += [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{latex(caption)}}}",
                rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for _, n in table.heads)}}}",
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
    sources: Sequence[Source], comparisons: Sequence[Comparison]
) -> list[tuple[Source, list[Table], list[str]]]:
    """Each source with its tables and what is said above them."""
    against = {id(each.source): each for each in comparisons}
    found = []
    for source in sources:
        tables = [summary_table(source)]
        tables += [defense_table(source)] if source.defended else []
        told = [over(source)]
        if source.status != "done":
            told.append(f"Status: {source.status}. {source.error}".strip())
        told += [f"{text}." for text in source.labels]
        comparison = against.get(id(source))
        if comparison is not None:
            tables.append(change_table(comparison))
            told += remarks(comparison)
        found.append((source, tables, told))
    return found


def remarks(found: Comparison) -> list[str]:
    """What has to be said of a comparison, in sentences."""
    told = []
    if found.one_set:
        told.append(
            "One distilled set stands against another: a difference of two sets of one seed can't "
            "be told from the noise of distillation. Victims are nested in their set, so more of "
            "them don't help; three distillation seeds or more do (--seeds)."
        )
    lists = {
        "In the baseline only": found.missing,
        "Not in the baseline": found.added,
        "Without a figure on a shared seed": found.unpaired,
    }
    told += [f"{title}: {'; '.join(rows)}." for title, rows in lists.items() if rows]
    return told


FORMATS: Final[Mapping[str, Callable[[Sequence[Source], Sequence[Comparison]], str]]] = {
    "csv": as_csv,
    "md": as_markdown,
    "latex": as_latex,
}
