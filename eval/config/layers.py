"""From presets, files and options to a configuration; the later ones win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...attacks import ATTACKS
from ...distill.types import RequestError
from .presets import load_preset
from .schema import Config, configure, find_attack

_YAML_CAP = 1 << 20


def gather(
    *,
    preset: str | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Flat keys from a preset, then a YAML file, then ``key=value`` settings, then options.

    A clean preset may have keys for attacked runs, under ``attack_config``: they win over the
    preset's others only. Keys of a preset that only other attacks than the chosen one have (a
    trigger's size, where the trigger has none) are left out.
    """
    found = load_preset(preset) if preset is not None else {}
    keys: dict[str, Any] = {}
    if file is not None:
        keys.update(read_yaml(file))
    keys.update(key_values(settings))
    keys.update({key: value for key, value in (options or {}).items() if value is not None})
    own = found.get("config", {})
    attack = {**own, **keys}.get("attack")
    if own and attack:
        own = _without_foreign_options({**own, **found.get("attack_config", {})}, attack)
    return {**own, **keys}


def _without_foreign_options(keys: Mapping[str, Any], attack: str) -> dict[str, Any]:
    """``keys`` without the options that other attacks have and ``attack`` does not have."""
    others = {key for each in ATTACKS.values() for key in each.Options.model_fields}
    foreign = others - find_attack(attack).Options.model_fields.keys()
    return {key: value for key, value in keys.items() if key not in foreign}


def read_yaml(path: Path) -> dict[str, Any]:
    """A flat mapping from a YAML file.

    Errors: ``RequestError`` naming the file where it is missing, too large, or no mapping.
    """
    try:
        if path.stat().st_size > _YAML_CAP:
            raise RequestError(
                f"{path}: larger than {_YAML_CAP} bytes, too large for a configuration"
            )
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path}: expected a mapping of keys to values")
    return {as_key(str(key)): value for key, value in found.items()}


def key_values(settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` settings as keys; values are YAML."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RequestError(f"--set needs key=value, got {setting!r}")
        found[as_key(key)] = _value(text, setting)
    return found


def by_owner(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``name.key=value`` settings as options by name."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        owner, dot, key = place.rpartition(".")
        if not (equals and dot and owner and key):
            raise RequestError(f"--option needs NAME.KEY=VALUE, got {setting!r}")
        found.setdefault(owner, {})[as_key(key)] = _value(text, setting)
    return found


def for_clean(keys: Mapping[str, Any]) -> Config:
    """The configuration of a clean distillation: ``keys`` without the attack and its options."""
    if not keys.get("attack"):
        return configure(**{k: v for k, v in keys.items() if k != "attack"})
    return configure(**keys).without_attack()


def as_key(text: str) -> str:
    """A key as the configuration writes it, from an option's spelling too."""
    return text.strip().replace("-", "_")


def _value(text: str, setting: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"--set {setting}: the value is not YAML") from error
