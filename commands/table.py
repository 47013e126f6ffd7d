"""What can be given to the commands, without importing torch: options, and the catalogues' entries.

``table.json`` has it. ``table_maker`` makes it from the commands and the catalogues themselves
(``make table``); a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

TABLE: Final = Path(__file__).with_name("table.json")
KINDS: Final = (
    "presets",
    "datasets",
    "backends",
    "networks",
    "attacks",
    "defenses",
    "formats",
    "spaces",
)
"""The names of the catalogues."""

Entry = Mapping[str, str]
"""``description``; of a defense also ``family``."""


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return found


def entries(kind: str) -> dict[str, Entry]:
    """The entries of a catalogue by name, with those that installed packages add."""
    found: dict[str, Entry] = dict(_table()["catalogues"].get(kind, {}))
    for point in metadata.entry_points(group=f"distillsec.{kind}"):
        found.setdefault(point.name, {"description": f"of an installed package: {point.value}"})
    return found


def parameters(command: str) -> list[dict[str, Any]] | None:
    """The parameters of a command; ``None`` for one that the table does not have."""
    found: list[dict[str, Any]] | None = _table()["commands"].get(command)
    return found
