"""What a defense is: one of seven families, each with one method, and what a defender may see."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, final, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..distill.networks.makers import NetworkMaker, embed
from ..distill.randomness import Streams
from ..distill.training import in_pieces
from ..distill.types import Batch, DistilledSet, hard_labels

Budget = Literal["quick", "paper", "tuned"]
Family = Literal[
    "set scores",
    "sanitised set",
    "training",
    "input scores",
    "purified input",
    "inspection",
    "repair",
]
FAMILIES: tuple[Family, ...] = get_args(Family)
T = TypeVar("T")
Predictor = Callable[[Tensor], Tensor]
"""Images ``(N, C, H, W)`` in pixel space to class numbers ``int64 (N,)``."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DefenderView:
    """All that a defender sees: nothing of an attack, of the run's seeds, or of where files lie.

    distilled: the set as it was received, with the recipe by which networks train on it.
    victim: one network trained on it, frozen and in evaluation mode; ``RequestError`` from
    ``features`` where it is a user's without an ``embed``.
    network: fresh networks of the victim's architecture. holdout: the declared budget of clean
    real images with their true labels, none of them among those that anything is measured on; may
    be empty. entropy: the seed of the defender's own randomness; the run's seed does not follow
    from it.
    """

    distilled: DistilledSet
    victim: nn.Module
    network: NetworkMaker
    holdout: Batch
    entropy: int = 0
    _memory: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.distilled.classes)

    @cached_property
    def labels(self) -> Tensor:
        """The set's labels as class numbers, ``int64 (N,)``."""
        return hard_labels(self.distilled.batch.labels)

    def generator(self, name: str, *key: int | str) -> torch.Generator:
        """A fresh CPU generator for the defense ``name``: the only randomness a defense uses.

        key: distinguishes the defense's own streams (a class, a step's name).
        """
        return Streams(self.entropy).generator("defense", name, *key)

    def seed(self, name: str, *key: int | str) -> int:
        """A seed below 2³¹ from ``generator(name, *key)``, for libraries that take a number."""
        return int(torch.randint(2**31 - 1, (), generator=self.generator(name, *key)))

    def with_holdout(self, holdout: Batch) -> DefenderView:
        """The same view with other held-out images, and nothing remembered."""
        return replace(self, holdout=holdout, _memory={})

    def forget(self) -> None:
        """Drop what is remembered: features, logits, shared searches."""
        self._memory.clear()

    def with_images(self, images: Tensor) -> DistilledSet:
        """The set with ``images`` in place of its own, its labels and recipe kept."""
        return replace(self.distilled, batch=self.distilled.batch.replace(images=images))

    def features(self, images: Tensor) -> Tensor:
        """The victim's penultimate activations ``(N, F)`` of ``images``; computed once, a copy
        for each caller."""
        return self._answers("features", images, lambda some: embed(self.victim, some))

    def logits(self, images: Tensor) -> Tensor:
        """The victim's logits ``(N, classes)`` of ``images``; computed once, a copy for each
        caller."""
        return self._answers("logits", images, self.victim)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, remembered under ``key`` while the view lives: for defenses that
        share a long computation. Two things must not share a key."""
        if key not in self._memory:
            self._memory[key] = make()
        found: T = self._memory[key]
        return found

    def trainable_victim(self) -> nn.Module:
        """A copy of the victim that may be changed and trained, in evaluation mode."""
        return copy.deepcopy(self.victim).requires_grad_(True)

    def _answers(self, what: str, images: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
        """``answer`` to ``images``, remembered by the tensor's identity, which it keeps alive."""
        return self.once((what, id(images)), lambda: (images, in_pieces(answer, images)))[1].clone()


class DefenseOptions(BaseModel):
    """Base of a defense's own options; their defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Defense(ABC):
    """What every defense has; the families below say what it does.

    Options: its own options. quick: those that the quick budget changes, so that the same
    algorithm does less work. grid: what the tuned budget chooses from, the options that it changes
    from the gentlest setting to the strongest; empty where there is nothing to choose. needs: what
    it wants, for people.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    Options: ClassVar[type[DefenseOptions]]
    quick: ClassVar[Mapping[str, Any]] = {}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ()
    needs: ClassVar[str] = "nothing but the set"

    options: DefenseOptions

    @abstractmethod
    def __init__(self, options: DefenseOptions) -> None:
        """A defense with ``options`` (of its ``Options``), which it keeps under that name."""

    def objection(self, view: DefenderView) -> str | None:
        """Why it does not apply to ``view`` at all, in one line; ``None`` where it does."""
        return None

    def caution(self, view: DefenderView) -> str | None:
        """Why its answer means little here (too few rows, say), in one line; ``None``: it does."""
        return None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SetScores:
    """What a defense says of a set; larger is more suspicious throughout.

    rows: ``float (N,)``, finite. flagged: ``bool (N,)``, the rows it would remove at the paper's
    threshold. statistic: one number for the set. alarm: whether the paper would call the set
    poisoned; ``None`` where it removes a fixed share and has no alarm. suspect: the most anomalous
    class, alarm or not; ``None`` where there is no single one.
    """

    rows: Tensor
    flagged: Tensor
    statistic: float
    alarm: bool | None
    suspect: int | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """What a defense says of a model.

    statistic: one number for the model, larger is more suspicious. alarm: whether the paper would
    call it backdoored; ``None`` where the method names a class and raises no alarm. anomaly:
    ``float (classes,)``, larger is more suspicious; ``None`` where the defense knows no classes.
    """

    statistic: float
    alarm: bool | None
    anomaly: Tensor | None = None

    @property
    def suspect(self) -> int | None:
        """The class with the largest anomaly; ``None`` where several share it, as where nothing was
        found for any class."""
        return None if self.anomaly is None else single_largest(self.anomaly)


def single_largest(values: Tensor) -> int | None:
    """The place of the largest of ``values`` (N,); ``None`` where several are as large."""
    largest = values == values.max()
    return int(values.argmax()) if int(largest.sum()) == 1 else None


class SetScorer(Defense, ABC):
    """The set: which rows are suspicious, and is the set?

    names_class: whether its scores point at a class (``SetScores.suspect``).
    """

    family = "set scores"
    names_class: ClassVar[bool] = False

    @abstractmethod
    def score_set(self, view: DefenderView) -> SetScores:
        """Scores of the set's rows, and of the set."""


class Sanitiser(Defense, ABC):
    """The set: a cleaner one to train on."""

    family = "sanitised set"

    @abstractmethod
    def sanitise(self, view: DefenderView) -> DistilledSet:
        """The set with its images changed or some rows gone; the given one stays as it is."""


class Trainer(Defense, ABC):
    """The training: another way to train on the set as it is."""

    family = "training"

    @abstractmethod
    def train(self, view: DefenderView) -> nn.Module:
        """A trained model (pixels to logits), in evaluation mode."""

    def figures(self, view: DefenderView) -> Mapping[str, float]:
        """What else it can say of such a training in numbers (a privacy budget)."""
        return {}


class InputScorer(Defense, ABC):
    """An input: does it carry a trigger?"""

    family = "input scores"

    @abstractmethod
    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        """``float (N,)``, finite, larger is more suspicious, for ``images`` ``(N, C, H, W)``.

        An image's score doesn't depend on the others it comes with.
        """

    @abstractmethod
    def threshold(self, view: DefenderView) -> float | None:
        """The score above which the paper rejects an input; ``None`` where it names none."""


class Purifier(Defense, ABC):
    """An input: answered in a way that takes the trigger's power."""

    family = "purified input"

    @abstractmethod
    def purify(self, view: DefenderView) -> Predictor:
        """The victim's predictions behind the defense."""


class Inspector(Defense, ABC):
    """The model: is it backdoored, and for which class?"""

    family = "inspection"

    @abstractmethod
    def inspect(self, view: DefenderView) -> Inspection:
        """The verdict, and each class's anomaly."""


class Repairer(Defense, ABC):
    """The model: the same with its backdoor taken out."""

    family = "repair"

    @abstractmethod
    def repair(self, view: DefenderView) -> nn.Module:
        """A repaired copy of the victim (pixels to logits), in evaluation mode."""
