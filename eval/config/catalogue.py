"""What can be chosen, for ``distillsec list``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ...attacks import ATTACKS
from ...defenses import DEFENSES
from ...distill.backends import BACKENDS
from ...distill.data.datasets import DATASETS
from ...distill.files.formats import FORMATS
from ...distill.files.spaces import SPACES
from ...distill.networks.architectures import NETWORKS
from .presets import load_preset, preset_names

# What a catalogue says of an entry beside its description, with its title.
_TITLES = {
    "family": "gives",
    "figures": "measured",
    "cost": "cost",
    "needs": "needs",
    "quick": "quick budget",
    "grid": "tuned budget",
    "tried": "tried before",
}

Rows = dict[str, dict[str, Any]]


def _first_sentence(thing: object) -> str:
    """The docstring's first paragraph, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _description(options: type[BaseModel], key: str) -> str:
    """An option's description; an option with only a new default has its parent class's."""
    texts = (base.model_fields[key].description for base in _lineage(options, key))
    return next((text for text in texts if text), "")


def _lineage(options: type[BaseModel], key: str) -> Iterator[type[BaseModel]]:
    for base in options.__mro__:
        if issubclass(base, BaseModel) and key in base.model_fields:
            yield base


def _with_options(registry: Mapping[str, Any]) -> Rows:
    return {
        name: {
            "description": _first_sentence(entry),
            "options": {
                key: {"default": field.default, "description": _description(entry.Options, key)}
                for key, field in entry.Options.model_fields.items()
            },
        }
        for name, entry in registry.items()
    }


def _presets() -> Rows:
    found = {name: load_preset(name) for name in preset_names()}
    return {
        name: {"description": preset["description"], "figures": preset.get("figures", "")}
        for name, preset in found.items()
    }


def _backends() -> Rows:
    rows = _with_options(BACKENDS)
    for name, backend in BACKENDS.items():
        rows[name] |= {"cost": backend.cost, "needs": backend.needs}
    return rows


def _defenses() -> Rows:
    rows = _with_options(DEFENSES)
    for name, defense in DEFENSES.items():
        rows[name] |= {"family": defense.family, "needs": defense.needs}
        rows[name]["quick"] = ", ".join(f"{k} {v}" for k, v in defense.quick.items())
        rows[name]["grid"] = f"one of {len(defense.grid)} settings" if defense.grid else ""
        rows[name]["tried"] = "by the author of Doorping" if defense.in_reference_code else ""
    return rows


CATALOGUES: Mapping[str, Callable[[], Rows]] = {
    "presets": _presets,
    "datasets": lambda: {n: {"description": e.description} for n, e in DATASETS.items()},
    "backends": _backends,
    "networks": lambda: {n: {"description": e.description} for n, e in NETWORKS.items()},
    "attacks": lambda: _with_options(ATTACKS),
    "defenses": _defenses,
    "formats": lambda: {n: {"description": e.description} for n, e in FORMATS.items()},
    "spaces": lambda: {n: {"description": e.description} for n, e in SPACES.items()},
}


def as_text(kind: str) -> str:
    """One catalogue for reading."""
    lines = [kind]
    rows = CATALOGUES[kind]()
    width = max(map(len, rows), default=0)
    for name, row in rows.items():
        lines.append(f"  {name:<{width}}  {row['description']}")
        for key, title in _TITLES.items():
            if row.get(key):
                lines.append(f"  {'':<{width}}  {title}: {row[key]}")
        for key, option in row.get("options", {}).items():
            default = "" if option["default"] is None else f" (default {option['default']})"
            lines.append(f"  {'':<{width}}    {key}: {option['description']}{default}")
    return "\n".join(lines) + "\n"


def as_json(kinds: Iterable[str]) -> str:
    """Some catalogues for programs, as one object."""
    return json.dumps({kind: CATALOGUES[kind]() for kind in kinds}, indent=2, default=str)
