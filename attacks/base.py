"""What every attack has: a goal, a trigger, poisoned rows, and a test case for the ASR."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import Tensor, nn

from ..distill.core.hooks import Hook, Moment
from ..distill.devices import moved
from ..distill.randomness import Streams
from ..distill.types import Batch, Distillate, RequestError
from .case import TestCase, make_test_case
from .goals import Goal, GoalName, goal_from
from .triggers import Position, Trigger, TriggerRange, patch_mask

ThreatModel = Literal["data owner", "distiller", "interceptor"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DataInfo:
    """What an attacker knows of the data: shapes, class count, normalisation, device.

    image_shape: (C, H, W). mean, std: per-channel, pixel units.
    """

    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device


class AttackOptions(BaseModel):
    """The options every attack has: its goal."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    newer: ClassVar[tuple[str, ...]] = ("goal", "source", "trigger_image")
    """Options that came later: at their defaults they are left out of configurations."""

    target: int = Field(0, ge=0, description="class number that triggered images are sent to")
    goal: GoalName = Field(
        "all-to-one",
        description="all-to-one: every other class to the target; one-to-one: the source class to "
        "the target; all-to-all: every class to the next one",
    )
    source: int | None = Field(
        None, ge=0, description="goal one-to-one: class number whose images are sent to the target"
    )

    @model_serializer(mode="wrap")
    def _without_newer_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Configurations from before an option keep their hash, and with it their runs and clean
        twins."""
        fields, values = type(self).model_fields, dict[str, Any](dump(self))
        newer = (name for name in self.newer if name in fields)
        unset = {name for name in newer if getattr(self, name) == fields[name].default}
        return {name: value for name, value in values.items() if name not in unset}


class PoisoningOptions(AttackOptions):
    """The options of attacks that poison rows of the training set."""

    poison_rate: float = Field(
        0.01, gt=0, le=1, description="poisoned rows, as a share of the training set's size"
    )
    target_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the target class's real batch drawn from poisoned rows "
        "(default: as they come); makes the attacker a distiller",
    )


class ClassicOptions(PoisoningOptions):
    """As ``PoisoningOptions``, at the poison rate at which the classic attacks are compared."""

    poison_rate: float = Field(
        0.1, gt=0, le=1, description="poisoned rows, as a share of the training set's size"
    )


class PatchOptions(BaseModel):
    """The options of attacks whose trigger is a square patch."""

    trigger_size: int = Field(2, ge=1, description="side of the square patch in pixels")
    trigger_position: Position = Field("bottom-right", description="where the patch sits")
    trigger_margin: int = Field(1, ge=0, description="pixels between the patch and the border")
    trigger_range: TriggerRange = Field(
        "pixel",
        description="pixel: values in [0, 1]; unbounded: any value (reproduces the paper only)",
    )

    def mask(self, data: DataInfo) -> Tensor:
        """The patch's mask ``(1, H, W)``; ``RequestError`` where it does not fit the images."""
        place = (self.trigger_size, self.trigger_position, self.trigger_margin)
        return patch_mask(data.image_shape[1:], *place).to(data.device)


class Attack(Hook, ABC):
    """A hook with a goal and a trigger that can be measured. ``Options`` holds its own options.

    goals: those that make sense for it.
    """

    Options: ClassVar[type[AttackOptions]]
    goals: ClassVar[tuple[GoalName, ...]] = get_args(GoalName)

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        """An attack on ``data`` with ``options`` (of its ``Options``).

        Errors: ``RequestError`` for a goal that does not suit the classes or the attack.
        """
        if options.goal not in self.goals:
            raise RequestError(
                f"{self.name} has no goal {options.goal}; it has {', '.join(self.goals)}"
            )
        self.options = options
        self.data = data
        self.goal: Goal = goal_from(dict(options), data.classes)

    @property
    @abstractmethod
    def threat_model(self) -> ThreatModel:
        """Who the attacker has to be."""

    @property
    @abstractmethod
    def trigger(self) -> Trigger:
        """The trigger as it is now."""

    def test_case(self, images: Tensor, labels: Tensor) -> TestCase:
        """The attack's test on ``images`` (pixel space) with true ``labels``."""
        return make_test_case(self.trigger, self.goal, images, labels)

    @property
    def poisoned_rows(self) -> Tensor | None:
        """``bool (rows,)``: the training rows it has poisoned; ``None`` where it can't say."""
        return None

    def counters(self) -> Mapping[str, Any]:
        """What the record says of how the attack went: counts by name."""
        return {}


class SetAttack(Attack, ABC):
    """Shared by attacks of an interceptor, who has a finished set and no raw data.

    ``receive`` gets the set. Then a distillation of its own begins: it starts from the received
    images, ``moment.real`` are the stand-ins, and nothing but the attack's ``on_*`` methods changes
    the set. ``on_loss`` must return a loss at every step.
    """

    @property
    def threat_model(self) -> ThreatModel:
        return "interceptor"

    @property
    @abstractmethod
    def steps(self) -> int:
        """The steps in which the set is changed."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """Adam's rate for the images, in normalised units."""

    @abstractmethod
    def receive(
        self, received: Distillate, network: Callable[[int], nn.Module], streams: Streams
    ) -> Batch:
        """Take the set; returns images with hard labels that stand in for the real ones.

        network: a fresh network of the victims' architecture, by seed. streams: the run's. The same
        arguments give the same answer: a resumed run calls it again.
        """


class PoisoningAttack(Attack, ABC):
    """Shared by attacks that stamp a trigger on some rows of the training set.

    Unless a subclass says otherwise, the rows are those that the goal is about, and get new labels.
    """

    Options: ClassVar[type[PoisoningOptions]]
    options: PoisoningOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        self.poisoned = torch.zeros(0, dtype=torch.bool, device=data.device)
        self._poisoned_of: dict[int, Tensor] = {}

    def poison(self, moment: Moment, real: Batch) -> Batch:
        """Choose the poisoned rows and relabel them; the pixels stay.

        ``poison_rate`` × the training set's size, drawn without repetition from the candidates
        (the reference code draws from all rows).
        """
        rate = self.options.poison_rate
        candidates, are = self.candidates(real.labels)
        eligible = torch.nonzero(candidates)[:, 0]
        count = max(1, round(rate * len(real)))
        if count > len(eligible):
            raise RequestError(
                f"poison rate {rate} asks for {count} rows, but only {len(eligible)} of "
                f"{len(real)} are {are}: at most {len(eligible) / len(real):.3f} is possible"
            )
        order = torch.randperm(len(eligible), generator=moment.rng)[:count].to(eligible.device)
        self.poisoned = torch.zeros(len(real), dtype=torch.bool, device=real.labels.device)
        self.poisoned[eligible[order]] = True
        labels = torch.where(self.poisoned, self.poisoned_labels(real.labels), real.labels)
        self._poisoned_of = {
            label: torch.nonzero(self.poisoned & (labels == label))[:, 0]
            for label in labels[self.poisoned].unique().tolist()
        }
        self._check_share(real.labels)
        return real.replace(labels=labels)

    def candidates(self, labels: Tensor) -> tuple[Tensor, str]:
        """``bool (rows,)``: the rows that may be poisoned, and what they are, in words."""
        return self.goal.eligible(labels), f"eligible for goal {self.goal.name}"

    def poisoned_labels(self, labels: Tensor) -> Tensor:
        """``int64 (rows,)``: the labels that rows with these true ``labels`` get if poisoned."""
        return self.goal.targets(labels)

    def stamp_drawn(self, drawn: Batch) -> Batch:
        """A drawn batch, its poisoned rows with the trigger as it is now."""
        assert drawn.index is not None
        carries = self.poisoned[drawn.index].view(-1, 1, 1, 1)
        stamped = self.trigger.stamp(drawn.images)
        return drawn.replace(images=torch.where(carries, stamped, drawn.images))

    def on_sample(self, moment: Moment, label: int, rows: Tensor) -> Tensor:
        """With ``target_share``, that share of a target class's batch is poisoned rows."""
        share = self.options.target_share
        if share is None or label not in self._poisoned_of:
            return rows
        count = round(share * len(rows))
        clean = torch.nonzero((moment.real.labels == label) & ~self.poisoned)[:, 0]
        picked = (
            _pick(self._poisoned_of[label], count, moment),
            _pick(clean, len(rows) - count, moment),
        )
        return torch.cat(picked)

    def _check_share(self, labels: Tensor) -> None:
        """Refuse a ``target_share`` for a class whose own rows are all poisoned."""
        if self.options.target_share is None:
            return
        bare = self._poisoned_of.keys() - set(labels[~self.poisoned].unique().tolist())
        if bare:
            raise RequestError(
                f"target share {self.options.target_share} needs rows of class {min(bare)} that "
                "are not poisoned, and there are none: lower the poison rate"
            )

    @property
    def poisoned_rows(self) -> Tensor:
        return self.poisoned

    def counters(self) -> Mapping[str, Any]:
        return {"poisoned_rows": int(self.poisoned.sum())}


class FixedTriggerAttack(PoisoningAttack, ABC):
    """Shared by attacks of a data owner whose trigger does not change: one method makes it.

    The poisoned rows are stamped once, before the distillation. With ``target_share`` the attacker
    chooses the real batches too, and has to be the distiller.
    """

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        self._trigger = self.make_trigger()

    @abstractmethod
    def make_trigger(self) -> Trigger:
        """The trigger, made from ``options`` for images like those of ``data``."""

    @property
    def threat_model(self) -> ThreatModel:
        return "data owner" if self.options.target_share is None else "distiller"

    @property
    def trigger(self) -> Trigger:
        return self._trigger

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        poisoned = self.poison(moment, real)
        images = real.images.clone()
        images[self.poisoned] = self.trigger.stamp(real.images[self.poisoned])
        return poisoned.replace(images=images)


def _pick(rows: Tensor, count: int, moment: Moment) -> Tensor:
    """``count`` of ``rows`` at random, repeated only where there are too few."""
    if len(rows) >= count:
        chosen = torch.randperm(len(rows), generator=moment.rng)[:count]
    else:
        chosen = torch.randint(len(rows), (count,), generator=moment.rng)
    return rows[moved(chosen, rows.device)]
