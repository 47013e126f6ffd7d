"""Completion of options and values in a shell, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from .table import entries, parameters

VARIABLE: Final = "_DISTILLSEC_COMPLETE"
"""The environment variable that click's shell scripts set."""
_PATH: Final = "path"
_OF_KIND: Final = "of kind"  # the names of the catalogue that another argument chose


def known_command(name: str) -> click.Command | None:
    """The command ``name`` with its options and values and nothing to run; ``None`` for a command
    that the table does not have."""
    found = parameters(name)
    return None if found is None else click.Command(name, params=[*map(_parameter, found)])


def _parameter(found: Mapping[str, Any]) -> click.Parameter:
    values = found["values"]

    def complete(
        context: click.Context, _: click.Parameter, start: str
    ) -> list[CompletionItem] | list[str]:
        if values == _PATH:
            return [CompletionItem(start, type="file")]
        kind = context.params.get("kind") if values == _OF_KIND else values
        known = kind if isinstance(kind, list) else _names(str(kind))
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


def _names(kind: str) -> list[str]:
    """The names of a catalogue; a path belongs to some of them, which is the user's to give."""
    return [name.removesuffix("PATH") for name in entries(kind)]
