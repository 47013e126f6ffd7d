"""The registry of attacks: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import (
    Attack,
    AttackOptions,
    DataInfo,
    FixedTriggerAttack,
    PatchOptions,
    PoisoningAttack,
    PoisoningOptions,
    ThreatModel,
)
from .blended import Blended
from .case import TestCase, make_test_case
from .doorping import Doorping
from .goals import GOALS, Goal, goal_from
from .naive import Naive, NaiveOptions
from .triggers import (
    TRIGGERS,
    AdditiveTrigger,
    BlendTrigger,
    PatchTrigger,
    Trigger,
    TriggerPicture,
    labels_of,
    trigger_from,
)
from .unrolled import Unrolled

ATTACKS: Mapping[str, type[Attack]] = {
    "naive": Naive,
    "doorping": Doorping,
    "unrolled": Unrolled,
    "blended": Blended,
}

__all__ = [
    "ATTACKS",
    "GOALS",
    "TRIGGERS",
    "AdditiveTrigger",
    "Attack",
    "AttackOptions",
    "BlendTrigger",
    "Blended",
    "DataInfo",
    "Doorping",
    "FixedTriggerAttack",
    "Goal",
    "Naive",
    "NaiveOptions",
    "PatchOptions",
    "PatchTrigger",
    "PoisoningAttack",
    "PoisoningOptions",
    "TestCase",
    "ThreatModel",
    "Trigger",
    "TriggerPicture",
    "Unrolled",
    "goal_from",
    "labels_of",
    "make_test_case",
    "trigger_from",
]
