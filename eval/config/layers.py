"""From presets, files and options to a configuration; the later ones win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from ...attacks import ATTACKS
from ...distill.files.safe import fault, read_bytes
from ...distill.networks.registry import NetworkSpec
from ...distill.plugins import is_reference
from ...distill.types import RequestError
from .plain_yaml import YAML_CAP, parse_yaml
from .presets import load_preset
from .schema import Config, configure, find_attack


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
    trigger's size, where the trigger has none) are left out, and so are the parameters of its
    network where the user's own class is chosen.
    """
    if not isinstance(preset, (str, NoneType)):
        raise RequestError(f"preset is {preset!r:.60}, expected a name")
    found = load_preset(preset) if preset is not None else {}
    keys: dict[str, Any] = {}
    if file is not None:
        keys.update(read_yaml(file))
    keys.update(key_values(settings))
    keys.update({key: value for key, value in (options or {}).items() if value is not None})
    own = found.get("config", {})
    for key in ("attack", "backend"):
        if not isinstance(keys.get(key), (str, NoneType)):
            raise RequestError(f"{key} is {keys[key]!r:.60}, expected a name")
    if is_reference(str(keys.get("network"))):
        own = {key: value for key, value in own.items() if key not in NetworkSpec.model_fields}
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

    Errors: ``RequestError`` naming the file where it is missing, no regular file, larger than 256
    KiB, not YAML as ``parse_yaml`` reads it, or no mapping.
    """
    try:
        found = parse_yaml(read_bytes(path, YAML_CAP).decode())
    except ValueError as error:
        raise fault(path, f"not YAML: {error}") from error
    if not isinstance(found, dict):
        raise fault(path, "expected a mapping of keys to values")
    return with_keys(found.items(), str(path))


def with_keys(pairs: Iterable[tuple[Any, Any]], owner: str) -> dict[str, Any]:
    """``pairs`` by their keys as the configuration writes them.

    Errors: ``RequestError`` naming the ``owner`` where a key is there twice, in two spellings too.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        key = as_key(str(name))
        if key in found:
            raise RequestError(f"{owner}: the key {key} is given twice")
        found[key] = value
    return found


def key_values(settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` settings as keys; values are YAML."""
    found = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RequestError(f"--set needs key=value, got {setting!r}")
        found.append((key, _value(text, f"--set {setting}")))
    return with_keys(found, "--set")


def by_owner(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``name.key=value`` settings as options by name."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        owner, dot, key = place.rpartition(".")
        if not (equals and dot and owner and key):
            raise RequestError(f"--option needs NAME.KEY=VALUE, got {setting!r}")
        found.setdefault(owner, []).append((key, _value(text, f"--option {setting}")))
    return {owner: with_keys(pairs, f"--option {owner}") for owner, pairs in found.items()}


def for_clean(keys: Mapping[str, Any]) -> Config:
    """The configuration of a clean distillation: ``keys`` without the attack and its options."""
    if not keys.get("attack"):
        return configure(**{k: v for k, v in keys.items() if k != "attack"})
    return configure(**keys).without_attack()


def without_attack(keys: Mapping[str, Any]) -> dict[str, Any]:
    """``keys`` without the attack, its options, and whether it has a clean twin."""
    own = {"attack", "control"}
    if keys.get("attack"):
        own |= find_attack(keys["attack"]).Options.model_fields.keys()
    return {key: value for key, value in keys.items() if key not in own}


def as_key(text: str) -> str:
    """A key as the configuration writes it, from an option's spelling too."""
    return text.strip().replace("-", "_")


def _value(text: str, setting: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise RequestError(f"{setting}: the value is not YAML: {error}") from error
