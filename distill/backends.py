"""The registry of distillation backends: a new one is a class and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .backend import Backend
from .gradient_matching import DC, DSA

BACKENDS: Mapping[str, type[Backend]] = {"dc": DC, "dsa": DSA}
