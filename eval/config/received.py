"""What may be taken from the configuration in a record: values, and nothing that acts.

A run folder may come from another person. Its record is data, not a request: no class that it names
is imported, no path in it is followed, and its device and threads are not used here, unless its run
is resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from joblib import cpu_count
from pydantic import BaseModel

from ...distill.networks.registry import NetworkSpec
from ...distill.plugins import is_reference
from .schema import DataSection, RunSection, SetSection, VictimSection, find_attack, find_backend

_NAMES = {"attack", "backend", "network", "victim_network", "dataset"}
_PATHS = {"trigger_image"}
MACHINE = frozenset({"device", "threads", "speed", "precision", "deterministic"})
"""The keys of the machine."""
_SECTIONS: tuple[type[BaseModel], ...] = (
    DataSection,
    NetworkSpec,
    SetSection,
    VictimSection,
    RunSection,
)


@final
@dataclass(frozen=True)
class ReceivedKeys:
    """The keys of a record's configuration that are taken, and those that are not.

    refused: the classes, the data set at a path, and the trigger's image file, by key.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)


def received_keys(
    config: Mapping[str, Any], own: Mapping[str, Any], names: Collection[str] = _NAMES | _PATHS
) -> ReceivedKeys:
    """The keys of ``config``, from a record, that are values.

    own: the user's keys; what is the same there was named by the user, and is taken. The options of
    a refused class are left out with it. names: the keys that may name something that acts.
    """
    refused = {
        key: config[key]
        for key in config.keys() & names
        if _acts(key, config[key]) and _names(own.get(key)) != _names(config[key])
    }
    keys = {k: v for k, v in config.items() if k not in refused and k not in MACHINE}
    if refused.keys() & {"attack", "backend"}:
        known = _known_keys(keys)
        keys = {key: value for key, value in keys.items() if key in known}
    if "network" in refused:
        keys = {key: value for key, value in keys.items() if key not in NetworkSpec.model_fields}
    return ReceivedKeys(keys, refused)


def machine_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that is to be resumed says of its machine: another one would give other bits.

    More threads than this machine has cores are left out.
    """
    keys = {key: config[key] for key in MACHINE & config.keys()}
    if keys.get("threads", 0) > cpu_count():
        del keys["threads"]
    return keys


def _names(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _acts(key: str, value: object) -> bool:
    """Whether ``value`` names a class, or a path."""
    if key in _PATHS:
        return value is not None
    return any(isinstance(name, str) and is_reference(name) for name in _names(value))


def _known_keys(keys: Mapping[str, Any]) -> set[str]:
    """The keys of all sections, of the backend and of the attack; these two are no longer those of
    the record alone."""
    models = [*_SECTIONS]
    if keys.get("backend"):
        models.append(find_backend(keys["backend"]).Options)
    if keys.get("attack"):
        models.append(find_attack(keys["attack"]).Options)
    return {"attack"}.union(*(model.model_fields for model in models))
