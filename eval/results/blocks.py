"""Summaries as blocks: lines and tables, which a terminal shows in colour and a file as text.

A tone says what a figure means, from a receiver's view: ``good`` where an attack does not work or a
defense does, ``bad`` where an attack works, ``chance`` for what says nothing (a control, an AUROC
around 0.5).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

Tone = Literal["", "good", "bad", "chance", "title", "warning"]

_WIDTH = 100
_LEAST_AUROC, _CHANCE = 0.9, (0.4, 0.6)
_MOST_ASR, _WORKS, _MOST_LOST_CTA = 0.1, 0.5, 0.05


@final
@dataclass(frozen=True)
class TextCell:
    """A cell of a table, or a line."""

    text: str
    tone: Tone = ""


@final
@dataclass(frozen=True)
class TextTable:
    """A table. heads: the titles, all empty for none. right: the columns of numbers, by position.
    one_line: whether a narrow terminal cuts cells off instead of wrapping them."""

    heads: tuple[str, ...]
    rows: tuple[tuple[TextCell, ...], ...]
    right: frozenset[int] = frozenset()
    one_line: bool = False

    def lines(self) -> list[str]:
        """The table as indented lines with aligned columns."""
        rows = [tuple(cell.text for cell in row) for row in self.rows]
        if any(self.heads):
            rows.insert(0, self.heads)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  "
            + "  ".join(
                text.rjust(width) if place in self.right else text.ljust(width)
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]


@final
@dataclass(frozen=True)
class Paragraph:
    """Sentences, wrapped to the width there is."""

    text: str


Block = str | TextCell | TextTable | Paragraph


def plain(blocks: Iterable[Block]) -> str:
    """The blocks as text without colours."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, TextTable):
            lines += block.lines()
        elif isinstance(block, Paragraph):
            lines += textwrap.wrap(
                block.text,
                _WIDTH,
                initial_indent="  ",
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
        else:
            lines.append(block.text if isinstance(block, TextCell) else block)
    return "\n".join(lines)


def asr_tone(value: float | None) -> Tone:
    """What an attack success rate means."""
    if value is None:
        return ""
    return "good" if value <= _MOST_ASR else "bad" if value >= _WORKS else ""


def auroc_tone(value: float | None) -> Tone:
    """What the AUROC of a detector means."""
    if value is None:
        return ""
    low, high = _CHANCE
    return "good" if value >= _LEAST_AUROC else "chance" if low <= value <= high else ""


def cta_tone(value: float | None, before: float | None) -> Tone:
    """What clean test accuracy after a defense means, beside that before it."""
    lost = None if value is None or before is None else before - value
    return "bad" if lost is not None and lost > _MOST_LOST_CTA else ""


def alarm_tone(attacked: float | None, twin: float | None) -> Tone:
    """What an alarm means: right on the attacked set, false on the clean twin."""
    if attacked is None:
        return ""
    false = twin is not None and twin >= _WORKS
    return "bad" if false else "good" if attacked >= _WORKS else ""
