"""Makes the table of what can be given to the commands: options, and the catalogues' entries.

``make table`` writes it anew, after a change of a command or of a catalogue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
from pydantic import BaseModel

from ..attacks import ATTACKS
from ..defenses import GROUPS
from ..distill.backends import BACKENDS
from ..distill.networks.registry import NetworkSpec
from ..eval.config.catalogue import CATALOGUES
from ..eval.config.option_help import choices
from ..eval.config.schema import RunSection

_KINDS: Final = {
    "preset": "presets",
    "dataset": "datasets",
    "backend": "backends",
    "network": "networks",
    "victim_network": "networks",
    "attack": "attacks",
    "defense": "defenses",
}
_SHOWN: Final = ("description", "family")
_WITH_PLUGINS: Final = ("attacks", "backends", "defenses")  # packages add entries to these
_ALSO: Final = {"defense": list(GROUPS)}  # words beside the names of the catalogue
_DEVICES: Final = ["auto", "cpu", "cuda", "mps"]


def make_table(commands: Mapping[str, click.Command]) -> dict[str, Any]:
    """The content of ``table.json`` for these commands."""
    return {
        "catalogues": {
            kind: {
                name: {key: row[key] for key in _SHOWN if key in row}
                for name, row in rows().items()
                if "options" in row or kind not in _WITH_PLUGINS
            }
            for kind, rows in CATALOGUES.items()
        },
        "commands": {
            name: [_parameter(each) for each in command.params]
            for name, command in commands.items()
        },
    }


def _parameter(each: click.Parameter) -> dict[str, Any]:
    flags = ["/".join([*each.opts, *each.secondary_opts])] if each.secondary_opts else each.opts
    return {
        "name": each.name,
        "argument": isinstance(each, click.Argument),
        "nargs": each.nargs,
        "flags": list(flags),
        "switch": isinstance(each, click.Option) and each.is_flag,
        "multiple": each.multiple,
        "values": _values(each),
        "also": _ALSO.get(str(each.name), []),
    }


def _values(each: click.Parameter) -> str | list[str]:
    """What may be given: a catalogue's name, a list of values, ``path``, or nothing known."""
    if isinstance(each.type, click.Choice):
        return [str(choice) for choice in each.type.choices]
    if isinstance(each.type, click.Path):
        return "path"
    if each.name == "device":
        return _DEVICES
    if isinstance(each, click.Argument):
        return "of kind"
    known: dict[str, str | list[str]] = {**_choices(), **_KINDS}
    return known.get(str(each.name), [])


def _choices() -> dict[str, list[str]]:
    """The keys of the configuration that take one of a few words."""
    found: dict[str, list[str]] = {}
    for options in _models():
        for key, field in options.model_fields.items():
            words = [str(word) for word in choices(field.annotation)]
            found[key] = list(dict.fromkeys([*found.get(key, []), *words]))
    return {key: words for key, words in found.items() if words}


def _models() -> Iterator[type[BaseModel]]:
    yield from (NetworkSpec, RunSection)
    yield from (backend.Options for backend in BACKENDS.values())
    yield from (attack.Options for attack in ATTACKS.values())


def write_table(commands: Mapping[str, click.Command], path: Path) -> None:
    """Write the table of ``commands`` to ``path``."""
    text = json.dumps(make_table(commands), separators=(",", ":"))
    path.write_text(text + "\n", "utf-8")
