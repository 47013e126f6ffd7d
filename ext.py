"""What a plug-in needs: the base classes of attacks, triggers, backends and defenses, and values.

A plug-in is a class in any module. It is used as ``package.module:Class``, as an object in Python
(``distillsec.run_attack(attack=MyAttack)``), or by a name of its own, which the package that has it
declares in its ``pyproject.toml``::

    [project.entry-points."distillsec.attacks"]
    mine = "mypackage.mine:MyAttack"

The groups are ``distillsec.attacks``, ``distillsec.backends`` and ``distillsec.defenses``.
"""

from distillsec.attacks import (
    AdditiveTrigger,
    Attack,
    AttackOptions,
    BlendTrigger,
    DataInfo,
    FixedTriggerAttack,
    GeneratorTrigger,
    Goal,
    PatchOptions,
    PatchTrigger,
    PoisoningAttack,
    PoisoningOptions,
    SetAttack,
    TestCase,
    ThreatModel,
    Trigger,
    TriggerPicture,
    WarpTrigger,
)
from distillsec.defenses.base import (
    DefenderView,
    Defense,
    DefenseOptions,
    InputScorer,
    Inspection,
    Inspector,
    Predictor,
    Purifier,
    Repairer,
    Sanitiser,
    SetScorer,
    SetScores,
    Trainer,
)
from distillsec.distill.core.backend import Backend, BackendOptions
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.run import Observer, Run
from distillsec.distill.core.task import Task
from distillsec.distill.networks.makers import NetworkMaker, embed
from distillsec.distill.types import (
    Batch,
    Distillate,
    DistilledSet,
    Recipe,
    RequestError,
    RunError,
    hard_labels,
)

__all__ = [
    "AdditiveTrigger",
    "Attack",
    "AttackOptions",
    "Backend",
    "BackendOptions",
    "Batch",
    "BlendTrigger",
    "DataInfo",
    "DefenderView",
    "Defense",
    "DefenseOptions",
    "Distillate",
    "DistilledSet",
    "FixedTriggerAttack",
    "GeneratorTrigger",
    "Goal",
    "Hook",
    "InputScorer",
    "Inspection",
    "Inspector",
    "Moment",
    "NetworkMaker",
    "Observer",
    "PatchOptions",
    "PatchTrigger",
    "PoisoningAttack",
    "PoisoningOptions",
    "Predictor",
    "Purifier",
    "Recipe",
    "Repairer",
    "RequestError",
    "Run",
    "RunError",
    "Sanitiser",
    "SetAttack",
    "SetScorer",
    "SetScores",
    "Task",
    "TestCase",
    "ThreatModel",
    "Trainer",
    "Trigger",
    "TriggerPicture",
    "WarpTrigger",
    "embed",
    "hard_labels",
]
