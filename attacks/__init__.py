"""The registry of attacks: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Attack, AttackOptions, CommonOptions, Scenery, TestCase, ThreatModel
from .blended import Blended
from .doorping import Doorping
from .naive import Naive
from .triggers import KINDS, PatchTrigger, trigger_from

ATTACKS: Mapping[str, type[Attack]] = {"naive": Naive, "doorping": Doorping, "blended": Blended}

__all__ = [
    "ATTACKS",
    "KINDS",
    "Attack",
    "AttackOptions",
    "Blended",
    "CommonOptions",
    "Doorping",
    "Naive",
    "PatchTrigger",
    "Scenery",
    "TestCase",
    "ThreatModel",
    "trigger_from",
]
