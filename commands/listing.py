"""The command that shows what can be chosen: ``list``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from ..eval.results.blocks import Block, TextCell, TextTable
from .exits import write_out
from .table import KINDS, Entry, entries
from .terminal import write_blocks

if TYPE_CHECKING:
    from ..eval.config.catalogue import Details


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.argument("name", required=False)
@click.option("--json", "json", is_flag=True, help="As JSON.")
def list_(kind: str | None, name: str | None, json: bool) -> None:
    """List what can be chosen.

    With NAME: all of one entry, its options with their types, bounds and defaults.

    \b
        distillsec list attacks
        distillsec list presets
        distillsec list attacks doorping
        distillsec list defenses neural-cleanse
    """
    chosen = [kind] if kind else KINDS
    if not json and name is None:
        write_blocks(block for each in chosen for block in _kind_blocks(each, entries(each)))
        return
    # These need the classes themselves, and with them torch.
    from ..eval.config.catalogue import as_json, details, details_json

    if kind is None or name is None:
        write_out(as_json(chosen))
    elif json:
        write_out(details_json(kind, name))
    else:
        write_blocks(_details_blocks(details(kind, name)))


def _kind_blocks(kind: str, rows: Mapping[str, Entry]) -> list[Block]:
    """One line for each entry; of a defense also what it gives."""
    families = any("family" in row for row in rows.values())
    cells = [
        (
            TextCell(name),
            *([TextCell(row.get("family", ""), "chance")] if families else []),
            TextCell(row["description"]),
        )
        for name, row in rows.items()
    ]
    table = TextTable(("",) * len(cells[0]), tuple(cells), one_line=True)
    return [TextCell(kind, "title"), table, ""]


def _details_blocks(found: Details) -> list[Block]:
    blocks: list[Block] = [TextCell(found.name, "title"), ""]
    blocks += [f"  {line}".rstrip() for line in found.text.splitlines()]
    facts = tuple((TextCell(key, "chance"), TextCell(value)) for key, value in found.facts.items())
    if facts:
        blocks += ["", TextTable(("", ""), facts)]
    if found.options:
        heads = ("option", "type", "allowed", "default", "meaning")
        rows = tuple(
            tuple(TextCell(text) for text in (o.key, o.kind, o.allowed, o.default, o.description))
            for o in found.options
        )
        blocks += ["", TextTable(heads, rows)]
    return blocks
