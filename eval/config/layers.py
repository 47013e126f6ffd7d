"""From presets, files and options to a configuration; the later ones win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from ...attacks import ATTACKS
from ...distill.files.safe import check_file
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

    Errors: ``RequestError`` naming the file where it is missing, too large, or no mapping, and
    where a mapping in it has a key twice.
    """
    check_file(path, _YAML_CAP)
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path}: expected a mapping of keys to values")
    return with_keys(found.items(), str(path))


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Errors: ``RequestError`` where a mapping has a key twice, which YAML's own loader allows.
    """
    return yaml.load(text, _UniqueKeysLoader)


class _UniqueKeysLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice in a mapping is an error."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """The node of one mapping, its keys compared before aliases and merges are resolved."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, ScalarNode)):
            line = key.start_mark.line + 1
            first = lines.get((key.tag, key.value))
            if first is not None:
                where = f"lines {first} and {line}" if first != line else f"line {line}"
                raise RequestError(f"the key {key.value} is there twice, on {where}")
            lines[key.tag, key.value] = line
        return node


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


def as_key(text: str) -> str:
    """A key as the configuration writes it, from an option's spelling too."""
    return text.strip().replace("-", "_")


def _value(text: str, setting: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"{setting}: the value is not YAML") from error
    except RequestError as error:
        raise RequestError(f"{setting}: {error}") from error
