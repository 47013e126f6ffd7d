"""The registry of defenses: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import DefenderView, Defense

DEFENSES: Mapping[str, type[Defense]] = {}

__all__ = ["DEFENSES", "DefenderView", "Defense"]
