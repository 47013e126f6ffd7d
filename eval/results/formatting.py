"""Times, figures and table rows as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from .record import Failure, Metrics

# Brackets only where they make a link, since intervals have them too.
_MARKUP: Final = re.compile(r"([\\|`*<>]|!(?=\[)|\](?=[(\[:])|\b_|_\b)")
_ADDRESS: Final = re.compile(r"(?<![A-Za-z0-9])(https?|ftp|www)([:.])", re.IGNORECASE)


def duration(seconds: float) -> str:
    """A time in readable units: ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def mean_and_interval(metrics: Metrics, name: str) -> str:
    """``mean [low, high]``; an en dash where nothing was measured."""
    summary = metrics.get(name)
    if summary is None or summary.mean is None:
        return "–"
    return f"{minus(f'{summary.mean:.3f}')} {interval(summary.ci95, 2)}".rstrip()


def interval(ci95: tuple[float, float] | None, digits: int) -> str:
    """``[low, high]``, empty for ``None``."""
    return "" if ci95 is None else f"[{', '.join(minus(f'{end:.{digits}f}') for end in ci95)}]"


def minus(number: str) -> str:
    """A formatted number with a true minus sign, and no sign before zero."""
    return number.removeprefix("-") if not number.strip("-0.") else number.replace("-", "−")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as indented lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def markdown_head(titles: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [markdown_row(titles), "| --- " * len(titles) + "|"]


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown_failures(failures: Sequence[Failure]) -> list[str]:
    """The section of failures below a table; no lines where there are none."""
    if not failures:
        return []
    listed = [f"- `{each.place}`: {markdown_text(each.reason)}" for each in failures]
    return ["", "## Failures", "", *listed]


def markdown_text(text: str) -> str:
    """Text on one line that Markdown shows as it is: no table, HTML, link, image or address.

    Records come from others, and an image or an address in a table would be loaded or followed.
    """
    plain = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return _ADDRESS.sub(r"\1\\\2", plain)
