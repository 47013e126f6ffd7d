"""The registry of attacks: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Attack, AttackOptions, Scenery, TestCase, ThreatModel
from .doorping import Doorping
from .naive import Naive
from .triggers import PatchTrigger

ATTACKS: Mapping[str, type[Attack]] = {"naive": Naive, "doorping": Doorping}

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackOptions",
    "Doorping",
    "Naive",
    "PatchTrigger",
    "Scenery",
    "TestCase",
    "ThreatModel",
]
