"""The registry of attacks: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from .badnets import BadNets
from .base import (
    Attack,
    AttackOptions,
    DataInfo,
    FixedTriggerAttack,
    PatchOptions,
    PoisoningAttack,
    PoisoningOptions,
    SetAttack,
    ThreatModel,
)
from .blended import Blended
from .case import TestCase, make_test_case
from .doorping import Doorping
from .goals import GOALS, Goal, goal_from
from .invisible import Invisible
from .naive import Naive, NaiveOptions
from .poisoned_set import PoisonedSet
from .relax_trigger import RelaxTrigger
from .sig import Sig
from .simple_trigger import SimpleTrigger
from .sneakdoor import SneakDoor
from .triggers import (
    TRIGGERS,
    AdditiveTrigger,
    BlendTrigger,
    GeneratorTrigger,
    PatchTrigger,
    Trigger,
    TriggerPicture,
    WarpTrigger,
    labels_of,
    trigger_from,
)
from .unrolled import Unrolled
from .wanet import WaNet

ATTACKS: Mapping[str, type[Attack]] = {
    "naive": Naive,
    "doorping": Doorping,
    "invisible": Invisible,
    "sneakdoor": SneakDoor,
    "unrolled": Unrolled,
    "badnets": BadNets,
    "blended": Blended,
    "sig": Sig,
    "wanet": WaNet,
    "simple-trigger": SimpleTrigger,
    "relax-trigger": RelaxTrigger,
    "poisoned-set": PoisonedSet,
}

__all__ = [
    "ATTACKS",
    "GOALS",
    "TRIGGERS",
    "AdditiveTrigger",
    "Attack",
    "AttackOptions",
    "BadNets",
    "BlendTrigger",
    "Blended",
    "DataInfo",
    "Doorping",
    "FixedTriggerAttack",
    "GeneratorTrigger",
    "Goal",
    "Invisible",
    "Naive",
    "NaiveOptions",
    "PatchOptions",
    "PatchTrigger",
    "PoisonedSet",
    "PoisoningAttack",
    "PoisoningOptions",
    "RelaxTrigger",
    "SetAttack",
    "Sig",
    "SimpleTrigger",
    "SneakDoor",
    "TestCase",
    "ThreatModel",
    "Trigger",
    "TriggerPicture",
    "Unrolled",
    "WaNet",
    "WarpTrigger",
    "goal_from",
    "labels_of",
    "make_test_case",
    "trigger_from",
]
