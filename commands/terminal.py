"""Summaries on a terminal: in colour and as wide as it is. In a pipe or a file: plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..eval.results.blocks import Block, Paragraph, TextCell, TextTable, Tone, plain
from .exits import printable, write_out

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_STYLES: Mapping[Tone, str] = {
    "": "",
    "good": "green",
    "bad": "red",
    "chance": "bright_black",
    "title": "bold",
    "warning": "yellow",
}


def write_blocks(blocks: Iterable[Block]) -> None:
    """Write a summary to stdout. ``NO_COLOR`` is heeded."""
    if not sys.stdout.isatty():
        write_out(printable(plain(blocks)))
        return
    from rich.console import Console

    draw(blocks, Console(file=sys.stdout, highlight=False))


def draw(blocks: Iterable[Block], console: Console) -> None:
    """Draw the blocks on ``console``, within its width."""
    for block in blocks:
        # A table without its last columns would hide figures: rich wraps them instead.
        console.print(_rendered(block), soft_wrap=isinstance(block, str | TextCell))


def _rendered(block: Block) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    if isinstance(block, TextTable):
        return _table(block)
    if isinstance(block, Paragraph):
        return Padding(Text(printable(block.text)), (0, 2))
    return _text(block if isinstance(block, TextCell) else TextCell(block))


def _text(cell: TextCell) -> Text:
    from rich.text import Text

    return Text(printable(cell.text), style=_STYLES[cell.tone])


def _table(block: TextTable) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        show_edge=False,
        show_header=any(block.heads),
        header_style="bold",
    )
    for place, head in enumerate(block.heads):
        table.add_column(
            _text(TextCell(head)),
            justify="right" if place in block.right else "left",
            no_wrap=place == 0 or block.one_line,
            overflow="ellipsis" if block.one_line else "fold",
        )
    for row in block.rows:
        table.add_row(*map(_text, row))
    return table
