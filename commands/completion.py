"""Completion of options and values in a shell, without importing torch.

``completion.json`` has every command's options and the names they take. ``completion_table`` makes
it from the commands themselves; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

VARIABLE: Final = "_DISTILLSEC_COMPLETE"
"""The environment variable that click's shell scripts set."""
TABLE: Final = Path(__file__).with_name("completion.json")
_PATH: Final = "path"
_OF_KIND: Final = "of kind"  # the names of the catalogue that another argument chose


def known_command(name: str) -> click.Command | None:
    """The command ``name`` with its options and values and nothing to run; ``None`` for a command
    that the table does not have."""
    table = json.loads(TABLE.read_text("utf-8"))
    parameters = table["commands"].get(name)
    if parameters is None:
        return None
    return click.Command(name, params=[_parameter(each, table["names"]) for each in parameters])


def _parameter(found: Mapping[str, Any], names: Mapping[str, list[str]]) -> click.Parameter:
    values = found["values"]

    def complete(
        context: click.Context, _: click.Parameter, start: str
    ) -> list[CompletionItem] | list[str]:
        if values == _PATH:
            return [CompletionItem(start, type="file")]
        kind = context.params.get("kind") if values == _OF_KIND else values
        known = kind if isinstance(kind, list) else _named(str(kind), names)
        return [value for value in (*found["also"], *known) if value.startswith(start)]

    if found["argument"]:
        return click.Argument(
            [found["name"]], nargs=found["nargs"], required=False, shell_complete=complete
        )
    return click.Option(
        [found["name"], *found["flags"]],
        is_flag=found["switch"],
        multiple=found["multiple"],
        shell_complete=complete,
    )


def _named(kind: str, names: Mapping[str, list[str]]) -> list[str]:
    """The names of a catalogue, with those that installed packages add."""
    installed = [point.name for point in metadata.entry_points(group=f"distillsec.{kind}")]
    return [*names.get(kind, []), *installed]
