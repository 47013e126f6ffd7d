"""What a defense is: seven families with one method each, and what a defender sees."""

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
    """All that a defender sees. It holds no attack, no seed of the run and no file path.

    distilled: the received set, with its training recipe. victim: one network trained on it, frozen
    and in evaluation mode. network: makes fresh networks of the victim's architecture. holdout: the
    declared budget of clean real images with their true labels, which may be empty; none of them is
    used in a measurement. entropy: the seed of the defender's own randomness, from which the run's
    seed cannot be computed.

    Errors: ``features`` raises ``RequestError`` if the victim is a user's network without
    ``embed``.
    """

    distilled: DistilledSet
    victim: nn.Module
    network: NetworkMaker
    holdout: Batch
    entropy: int = 0
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.distilled.classes)

    @cached_property
    def labels(self) -> Tensor:
        """The set's labels as class numbers, ``int64 (N,)``."""
        return hard_labels(self.distilled.batch.labels)

    def generator(self, name: str, *key: int | str) -> torch.Generator:
        """A fresh CPU generator for the defense ``name``, the only source of its randomness.

        key: distinguishes several streams of one defense (a class, the name of a step).
        """
        return Streams(self.entropy).generator("defense", name, *key)

    def seed(self, name: str, *key: int | str) -> int:
        """A seed below 2³¹ from ``generator(name, *key)``, for libraries that take an integer."""
        return int(torch.randint(2**31 - 1, (), generator=self.generator(name, *key)))

    def with_holdout(self, holdout: Batch) -> DefenderView:
        """The same view with other held-out images and an empty cache."""
        return replace(self, holdout=holdout, _cache={})

    def forget(self) -> None:
        """Empty the cache: features, logits, shared computations."""
        self._cache.clear()

    def with_images(self, images: Tensor) -> DistilledSet:
        """The set with other ``images`` and the same labels and recipe."""
        return replace(self.distilled, batch=self.distilled.batch.replace(images=images))

    def features(self, images: Tensor) -> Tensor:
        """The victim's penultimate activations ``(N, F)`` of ``images``; computed once, each caller
        gets a copy."""
        return self._outputs("features", images, lambda some: embed(self.victim, some))

    def logits(self, images: Tensor) -> Tensor:
        """The victim's logits ``(N, classes)`` of ``images``; computed once, each caller gets a
        copy."""
        return self._outputs("logits", images, self.victim)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of ``make``, cached under ``key``: for defenses that share a long computation.
        Different computations need different keys."""
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def trainable_victim(self) -> nn.Module:
        """A copy of the victim to change and train, in evaluation mode."""
        return copy.deepcopy(self.victim).requires_grad_(True)

    def _outputs(self, kind: str, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function(images)``, cached by the identity of ``images``; the cache also holds these,
        so that no later tensor can have the same identity."""
        key = (kind, id(images))
        return self.once(key, lambda: (images, in_pieces(function, images)))[1].clone()


class DefenseOptions(BaseModel):
    """Base of a defense's own options. Their defaults are the published settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Defense(ABC):
    """What every defense has; the families below say what it does.

    Options: the class of its options; ``options: MyOptions`` repeats it for the type checker.
    quick: the options that the quick budget changes, so that the same algorithm does less work.
    grid: the settings that the tuned budget chooses from, as changed options, from the gentlest to
    the strongest; empty if there is nothing to choose. needs: what the defense needs, in words.
    in_reference_code: whether the published detection code of Doorping's author has it.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    Options: ClassVar[type[DefenseOptions]] = DefenseOptions
    quick: ClassVar[Mapping[str, Any]] = {}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ()
    needs: ClassVar[str] = "only the set"
    in_reference_code: ClassVar[bool] = False

    options: DefenseOptions

    def __init__(self, options: DefenseOptions | None = None) -> None:
        """A defense with ``options`` (of its ``Options``), by default the published ones."""
        self.options = self.Options() if options is None else options

    def not_applicable_because(self, view: DefenderView) -> str | None:
        """Why the defense cannot be applied to ``view``, in one line; ``None`` if it can."""
        return None

    def caution(self, view: DefenderView) -> str | None:
        """Why its result means little on ``view`` (too few rows, for example), in one line;
        ``None`` if nothing limits it."""
        return None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SetScores:
    """The scores of a set and its rows. Larger is more suspicious.

    rows: ``float (N,)``, finite. flagged: ``bool (N,)``, the rows that the defense would remove at
    the paper's threshold. statistic: one number for the set. alarm: whether the paper's rule calls
    the set poisoned; ``None`` if the method removes a fixed share and has no such rule. suspect:
    the most anomalous class, with or without an alarm; ``None`` if several are equally anomalous.
    """

    rows: Tensor
    flagged: Tensor
    statistic: float
    alarm: bool | None
    suspect: int | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """The result of inspecting a model. Larger is more suspicious.

    statistic: one number for the model. alarm: whether the paper's rule calls the model backdoored;
    ``None`` if the method names a class but has no such rule. anomaly: ``float (classes,)``;
    ``None`` if the method does not score classes.
    """

    statistic: float
    alarm: bool | None
    anomaly: Tensor | None = None

    @property
    def suspect(self) -> int | None:
        """The class with the largest anomaly; ``None`` if several share it, for example because
        nothing was found for any class."""
        return None if self.anomaly is None else single_largest(self.anomaly)


def single_largest(values: Tensor) -> int | None:
    """The index of the largest of ``values`` (N,); ``None`` if several are equally large."""
    largest = values == values.max()
    return int(values.argmax()) if int(largest.sum()) == 1 else None


class SetScorer(Defense, ABC):
    """Scores the rows of a set, and the set.

    names_class: whether the scores point at a class (``SetScores.suspect``).
    """

    family = "set scores"
    names_class: ClassVar[bool] = False

    @abstractmethod
    def score_set(self, view: DefenderView) -> SetScores:
        """The scores of ``view.distilled``."""


class Sanitiser(Defense, ABC):
    """Makes a cleaner set to train on."""

    family = "sanitised set"

    @abstractmethod
    def sanitise(self, view: DefenderView) -> DistilledSet:
        """A new set with changed images or fewer rows; ``view.distilled`` stays unchanged."""


class Trainer(Defense, ABC):
    """Trains a model on the received set in another way."""

    family = "training"

    @abstractmethod
    def train(self, view: DefenderView) -> nn.Module:
        """A trained model (pixels to logits), in evaluation mode."""

    def figures(self, view: DefenderView) -> Mapping[str, float]:
        """Further numbers about such a training (a privacy budget), by name."""
        return {}


class InputScorer(Defense, ABC):
    """Scores inputs by how likely they carry a trigger."""

    family = "input scores"

    @abstractmethod
    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        """``float (N,)``, finite, larger is more suspicious, for ``images`` ``(N, C, H, W)``.

        The score of an image does not depend on the other images.
        """

    @abstractmethod
    def threshold(self, view: DefenderView) -> float | None:
        """The score above which the paper rejects an input; ``None`` if it names none."""


class Purifier(Defense, ABC):
    """Cleans an input before it is classified."""

    family = "purified input"

    @abstractmethod
    def purify(self, view: DefenderView) -> Predictor:
        """The victim's predictions on cleaned inputs."""


class Inspector(Defense, ABC):
    """Inspects a model: is it backdoored, and for which class?"""

    family = "inspection"

    @abstractmethod
    def inspect(self, view: DefenderView) -> Inspection:
        """The verdict on ``view.victim``, and the anomaly of each class."""


class Repairer(Defense, ABC):
    """Removes the backdoor from a model."""

    family = "repair"

    @abstractmethod
    def repair(self, view: DefenderView) -> nn.Module:
        """A repaired copy of the victim (pixels to logits), in evaluation mode."""
