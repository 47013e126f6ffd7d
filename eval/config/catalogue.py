"""What can be chosen, for ``distillsec list``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from pydantic import BaseModel

from ...attacks import ATTACKS, Attack
from ...defenses import DEFENSES, Defense
from ...distill.backends import BACKENDS
from ...distill.core.backend import Backend
from ...distill.data.datasets import DATASETS
from ...distill.files.formats import FORMATS
from ...distill.files.spaces import SPACES
from ...distill.networks.architectures import NETWORKS
from ...distill.networks.registry import NetworkSpec
from ...distill.plugins import installed_names, look_up, reference_to
from .option_help import OptionHelp, option_help
from .presets import load_preset, preset_names
from .schema import find_class

Rows = dict[str, dict[str, Any]]


@final
@dataclass(frozen=True, kw_only=True)
class Details:
    """One entry of a catalogue. text: what it is. facts: by title. options: those it takes."""

    name: str
    text: str
    facts: Mapping[str, str] = field(default_factory=dict)
    options: tuple[OptionHelp, ...] = ()


def _first_sentence(thing: object) -> str:
    """The docstring's first paragraph, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _class_rows(registry: Mapping[str, Any], kind: str) -> Rows:
    """Descriptions and options; of what an installed package adds only where it is from."""
    rows: Rows = {
        name: {
            "description": _first_sentence(entry),
            "options": {
                key: {
                    "default": entry.Options.model_fields[key].default,
                    "description": help.description,
                    "type": help.kind,
                    "allowed": help.allowed,
                }
                for key, help in option_help(entry.Options).items()
            },
        }
        for name, entry in registry.items()
    }
    for name, point in installed_names(kind).items():
        rows.setdefault(name, {"description": f"of an installed package: {point.value}"})
    return rows


def _presets() -> Rows:
    found = {name: load_preset(name) for name in preset_names()}
    return {
        name: {"description": preset["description"], "figures": preset.get("figures", "")}
        for name, preset in found.items()
    }


def _backends() -> Rows:
    rows = _class_rows(BACKENDS, "backends")
    for name, backend in BACKENDS.items():
        rows[name] |= {"cost": backend.cost, "needs": backend.needs}
    return rows


def _defenses() -> Rows:
    rows = _class_rows(DEFENSES, "defenses")
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
    "attacks": lambda: _class_rows(ATTACKS, "attacks"),
    "defenses": _defenses,
    "formats": lambda: {n: {"description": e.description} for n, e in FORMATS.items()},
    "spaces": lambda: {n: {"description": e.description} for n, e in SPACES.items()},
}


def as_json(kinds: Iterable[str]) -> str:
    """Some catalogues for programs, as one object."""
    return json.dumps({kind: CATALOGUES[kind]() for kind in kinds}, indent=2, default=str)


# One entry ---------------------------------------------------------------------------------------


def _preset_details(name: str) -> Details:
    preset = load_preset(name)
    keys = {**preset.get("config", {}), **preset.get("attack_config", {})}
    facts = {"measured": preset.get("figures", ""), **{k: str(v) for k, v in keys.items()}}
    return Details(name=name, text=preset["description"], facts=facts)


def _dataset_details(name: str) -> Details:
    entry = look_up(name, DATASETS, "data set")
    facts = {
        "images (C, H, W)": "as the files" if entry.image_shape is None else str(entry.image_shape),
        "classes": "as the files" if entry.classes is None else str(entry.classes),
        "mean, std": "measured on the training images"
        if entry.mean is None or entry.std is None
        else f"{entry.mean}, {entry.std}",
        "a flip keeps the label": "yes" if entry.flips else "no",
    }
    return Details(name=name, text=entry.description, facts=facts)


def _network_details(name: str) -> Details:
    entry = look_up(name, NETWORKS, "network")
    known = option_help(NetworkSpec)
    options = [
        OptionHelp(key, known[key].kind, known[key].allowed, str(value), known[key].description)
        for key, value in entry.published.items()
    ]
    facts = {"source": reference_to(entry.build)}
    return Details(name=name, text=entry.description, facts=facts, options=tuple(options))


def _plain_details(name: str, registry: Mapping[str, Any], what: str) -> Details:
    """Of an entry that has a description and no options."""
    return Details(name=name, text=look_up(name, registry, what).description)


def _class_details(found: Any, name: str, facts: Mapping[str, str]) -> Details:
    options: type[BaseModel] = found.Options
    return Details(
        name=name,
        text=inspect.getdoc(found) or "",
        facts={**{key: text for key, text in facts.items() if text}, "source": reference_to(found)},
        options=tuple(option_help(options).values()),
    )


def _attack_details(name: str) -> Details:
    found = find_class(name, ATTACKS, Attack, "attack")
    return _class_details(found, name, {"goals": ", ".join(found.goals)})


def _backend_details(name: str) -> Details:
    found = find_class(name, BACKENDS, Backend, "backend")
    return _class_details(found, name, {"cost": found.cost, "needs": found.needs})


def _defense_details(name: str) -> Details:
    found = find_class(name, DEFENSES, Defense, "defense")
    facts = {
        "gives": found.family,
        "needs": found.needs,
        "quick budget": ", ".join(f"{key} {value}" for key, value in found.quick.items()),
        "tuned budget": f"one of {len(found.grid)} settings" if found.grid else "",
        "tried before": "by the author of Doorping" if found.in_reference_code else "",
    }
    return _class_details(found, name, facts)


_DETAILS: Mapping[str, Callable[[str], Details]] = {
    "presets": _preset_details,
    "datasets": _dataset_details,
    "backends": _backend_details,
    "networks": _network_details,
    "attacks": _attack_details,
    "defenses": _defense_details,
    "formats": lambda name: _plain_details(name, FORMATS, "format"),
    "spaces": lambda name: _plain_details(name, SPACES, "space"),
}


def details(kind: str, name: str) -> Details:
    """All that is known of one entry. Errors: ``RequestError`` for an unknown name."""
    return _DETAILS[kind](name)


def details_json(kind: str, name: str) -> str:
    """The same for programs."""
    return json.dumps(asdict(details(kind, name)), indent=2, default=str)
