"""The registry of distillation backends: a new one is a class and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.backend import Backend
from .distribution_matching import DM
from .gradient_matching import DC, DSA
from .through_training import DD
from .trajectory_matching import MTT
from .whole_set import WholeSet

BACKENDS: Mapping[str, type[Backend]] = {
    "dc": DC,
    "dsa": DSA,
    "dm": DM,
    "mtt": MTT,
    "dd": DD,
    "whole": WholeSet,
}
