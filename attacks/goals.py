"""Goals: which images an attack is about, and the label that each is to get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ..distill.plugins import look_up
from ..distill.types import RequestError

GoalName = Literal["all-to-one", "one-to-one", "all-to-all"]


@dataclass(frozen=True, kw_only=True)
class Goal(ABC):
    """What the attacker wants of images that carry the trigger."""

    name: ClassVar[GoalName]

    @classmethod
    @abstractmethod
    def choose(cls, classes: int, target: object, source: object) -> Self:
        """The goal for that many classes; ``RequestError`` where target or source do not suit."""

    @abstractmethod
    def targets(self, labels: Tensor) -> Tensor:
        """``int64 (N,)``: the labels wanted for triggered images whose true labels are given."""

    @abstractmethod
    def eligible(self, labels: Tensor) -> Tensor:
        """``bool (N,)``: which of them the goal is about; none has its target's label already."""

    @abstractmethod
    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """What records and trigger files say of it, as JSON values; ``classes`` are the names.

        Always target (``None`` for several) and target_class; where there is no goal, it is
        all-to-one.
        """


@final
@dataclass(frozen=True, kw_only=True)
class AllToOne(Goal):
    """Every image of another class is taken for the target class."""

    name: ClassVar[GoalName] = "all-to-one"
    target: int

    @classmethod
    def choose(cls, classes: int, target: object, source: object) -> Self:
        _refuse_source(cls.name, source)
        return cls(target=_class_number("target", target, classes))

    def targets(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        return labels != self.target

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"target": self.target, "target_class": classes[self.target]}


@final
@dataclass(frozen=True, kw_only=True)
class OneToOne(Goal):
    """Images of the source class are taken for the target class; the others do not matter."""

    name: ClassVar[GoalName] = "one-to-one"
    source: int
    target: int

    @classmethod
    def choose(cls, classes: int, target: object, source: object) -> Self:
        if source is None:
            raise RequestError(f"goal {cls.name} needs a source class, 0 to {classes - 1}")
        if source == target:
            raise RequestError(f"goal {cls.name}: source and target are both {target!r:.60}")
        return cls(
            source=_class_number("source", source, classes),
            target=_class_number("target", target, classes),
        )

    def targets(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        return labels == self.source

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        return {
            "goal": self.name,
            "source": self.source,
            "source_class": classes[self.source],
            "target": self.target,
            "target_class": classes[self.target],
        }


@final
@dataclass(frozen=True, kw_only=True)
class AllToAll(Goal):
    """Every image is taken for the class with the next number, the last for the first."""

    name: ClassVar[GoalName] = "all-to-all"
    classes: int

    @classmethod
    def choose(cls, classes: int, target: object, source: object) -> Self:
        """``target`` has no meaning here."""
        _refuse_source(cls.name, source)
        return cls(classes=classes)

    def targets(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.classes

    def eligible(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"goal": self.name, "target": None, "target_class": "the next class"}


GOALS: Mapping[str, type[Goal]] = {goal.name: goal for goal in (AllToOne, OneToOne, AllToAll)}


def goal_from(info: Mapping[str, Any], classes: int) -> Goal:
    """The goal that an attack's options or a trigger file's description say.

    info: ``goal`` (all-to-one where it is missing), ``target`` and ``source``.
    Errors: ``RequestError`` for a goal that there isn't, and for class numbers that do not suit it.
    """
    goal = look_up(f"{info.get('goal', AllToOne.name)!s:.60}", GOALS, "goal")
    return goal.choose(classes, info.get("target"), info.get("source"))


def _class_number(what: str, number: object, classes: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < classes:
        raise RequestError(
            f"{what} {number!r:.60} is no class: there are {classes}, numbered from 0 to "
            f"{classes - 1}"
        )
    return number


def _refuse_source(name: GoalName, source: object) -> None:
    if source is not None:
        raise RequestError(
            f"source {source!r:.60} is for goal {OneToOne.name} only, the goal is {name}"
        )
