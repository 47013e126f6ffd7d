"""Presets: complete configurations with known figures, as YAML files in this folder."""

from __future__ import annotations

import copy
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ....distill.plugins import look_up


def preset_names() -> list[str]:
    """The names of all presets."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """A preset's ``description``, ``figures`` (what was measured, by what) and ``config``.

    Errors: ``RequestError`` for an unknown name.
    """
    return copy.deepcopy(_read(name))


@cache
def _read(name: str) -> dict[str, Any]:
    """Read once: each cell of a sweep starts from its preset."""
    look_up(name, dict.fromkeys(preset_names()), "preset")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)
    return found
