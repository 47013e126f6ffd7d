"""The registry of triggers by kind: a new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from ...distill.plugins import look_up
from ...distill.types import RequestError
from .additive import AdditiveTrigger, Norm
from .base import Region, Trigger, TriggerPicture, TriggerRange, labels_of
from .blend import BlendTrigger
from .generator import GeneratorTrigger
from .patch import PatchTrigger, Position, patch_mask
from .warp import WarpTrigger, identity_grid

TRIGGERS: Mapping[str, type[Trigger]] = {
    "patch": PatchTrigger,
    "blend": BlendTrigger,
    "additive": AdditiveTrigger,
    "warp": WarpTrigger,
    "generator": GeneratorTrigger,
}


def trigger_from(info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trigger:
    """The trigger in a file: ``info`` has its kind and range, as ``Trigger.describe`` gives them.

    Errors: ``RequestError`` for a kind or range that there isn't, and as ``Trigger.from_tensors``.
    """
    ranges = get_args(TriggerRange)
    if info["range"] not in ranges:
        raise RequestError(f"the trigger's range is {info['range']!r:.60}, expected {ranges}")
    kind = look_up(str(info["kind"]), TRIGGERS, "kind of trigger")
    return kind.from_tensors(tensors, info["range"])


__all__ = [
    "TRIGGERS",
    "AdditiveTrigger",
    "BlendTrigger",
    "GeneratorTrigger",
    "Norm",
    "PatchTrigger",
    "Position",
    "Region",
    "Trigger",
    "TriggerPicture",
    "TriggerRange",
    "WarpTrigger",
    "identity_grid",
    "labels_of",
    "patch_mask",
    "trigger_from",
]
