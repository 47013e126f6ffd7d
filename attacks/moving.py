"""What attacks share whose trigger is optimised again during the distillation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..distill.core.hooks import Moment
from ..distill.devices import moved
from ..distill.types import Batch, RequestError
from .base import AttackOptions, DataInfo, PoisoningAttack, PoisoningOptions, ThreatModel
from .search import OBJECTIVES, Carriers, ObjectiveName, SearchOptions, SearchSpace
from .triggers import Trigger


class MovingTriggerOptions(PoisoningOptions):
    """Options of the search; they are the reference code's where it has them."""

    objective: ObjectiveName = Field("neuron", description="what the trigger is optimised for")
    alpha: float = Field(10.0, gt=0, description="neuron objectives: activation to reach, × start")
    neurons: int = Field(1, ge=1, description="neuron objectives: how many neurons to drive")
    trigger_lr: float = Field(0.08, gt=0, description="Adam's rate, in normalised units")
    trigger_steps: int | None = Field(
        None, ge=1, description="Adam steps per update (default: the objective's own)"
    )
    carriers: int = Field(64, ge=1, description="clean eligible images that carry the trigger")
    students: int = Field(2, ge=1, description="student objective: networks per update")
    moves_with: Literal["experts", "students", "both"] = Field(
        "experts",
        description="where experts are trained first (mtt): whether the trigger moves with them, "
        "against the students that match them, or with both",
    )
    update_every: int | None = Field(
        None,
        ge=1,
        description="the trigger is updated after every so many moves of the network "
        "(default: the objective's own)",
    )
    freeze_at: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the run after which the trigger no longer changes "
        "(default: the objective's own)",
    )


class MovingTriggerAttack(PoisoningAttack, ABC):
    """Shared by attacks of a distiller whose trigger moves with the distilling network.

    Clean pixels are kept: every drawn batch is stamped afresh with the present trigger. A subclass
    says how the trigger starts, what a pattern makes of an image, and where the search may look.
    """

    Options: ClassVar[type[MovingTriggerOptions]]
    options: MovingTriggerOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        self._objective = OBJECTIVES[self.options.objective]
        shape = (-1, 1, 1)
        self._mean = torch.tensor(data.mean, device=data.device).view(shape)
        self._std = torch.tensor(data.std, device=data.device).view(shape)
        self._pattern = torch.zeros(data.image_shape, device=data.device)
        self._moves = self._updates = 0
        self._idle_updates: int | Tensor = 0  # counted on the device
        self._experts_seen = False
        self._eligible: Tensor | None = None

    @abstractmethod
    def first_pattern(self, rng: torch.Generator) -> Tensor:
        """The pattern ``(C, H, W)``, pixel units, with which a run starts."""

    @abstractmethod
    def trigger_of(self, pattern: Tensor) -> Trigger:
        """The trigger with this pattern; its stamp is differentiable in the pattern."""

    @abstractmethod
    def search_space(self) -> SearchSpace:
        """Where a search may move the pattern."""

    @property
    def threat_model(self) -> ThreatModel:
        return "distiller"

    @property
    def trigger(self) -> Trigger:
        """The trigger as it is now."""
        return self.trigger_of(self._pattern)

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        self._pattern = self.first_pattern(moment.rng)
        self._moves = self._updates = 0
        self._idle_updates = 0
        self._experts_seen = False
        self._eligible = None
        return self.poison(moment, real)

    def on_draw(self, moment: Moment, clean: Batch) -> Batch:
        self._experts_seen |= moment.phase == "expert"
        return self.stamp_drawn(clean)

    def on_network(self, moment: Moment) -> None:
        if not self._follows(moment):
            return
        self._moves += 1
        every = self.options.update_every or self._objective.update_every
        freeze = self.options.freeze_at
        frozen = moment.progress >= (self._objective.freeze_at if freeze is None else freeze)
        if frozen or self._moves % every:
            return
        found = self._objective.search(moment, self._carriers(moment), self._search_options())
        self._updates += 1
        self._idle_updates = self._idle_updates + (found == self._pattern).all()
        self._pattern = found

    def _follows(self, moment: Moment) -> bool:
        """Whether the trigger moves with this network; without experts it does with every one.

        A trigger that moves against students is not learned by the set, unless new experts are
        trained on it.
        """
        with_ = self.options.moves_with
        if moment.phase == "expert":
            return with_ != "students"
        return with_ != "experts" or not self._experts_seen

    def counters(self) -> Mapping[str, Any]:
        return {
            **super().counters(),
            "trigger_updates": self._updates,
            "idle_trigger_updates": int(self._idle_updates),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "pattern": self._pattern,
            "counts": torch.tensor(
                [self._moves, self._updates, int(self._idle_updates), self._experts_seen]
            ),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pattern = state["pattern"]
        if pattern.shape != self.data.image_shape or not pattern.isfinite().all():
            raise RequestError(f"a pattern {tuple(pattern.shape)} that fits no image")
        self._pattern = pattern.to(self.data.device)
        counts = [int(count) for count in state["counts"]]
        self._moves, self._updates, self._idle_updates, seen = counts
        self._experts_seen = bool(seen)

    def _carriers(self, moment: Moment) -> Carriers:
        """The pattern, and clean images to stamp it on with the labels that they are to get."""
        real = moment.real
        if self._eligible is None:
            self._eligible = torch.nonzero(self.goal.eligible(real.labels))[:, 0]
        eligible = self._eligible
        order = torch.randperm(len(eligible), generator=moment.rng)[: self.options.carriers]
        rows = eligible[moved(order, eligible.device)]
        return Carriers(
            images=real.images[rows],
            targets=self.goal.targets(real.labels[rows]),
            pattern=self._pattern,
            space=self.search_space(),
            stamp=lambda pattern, images: self.trigger_of(pattern).stamp(images),
            owner=id(self),
        )

    def _search_options(self) -> SearchOptions:
        options = self.options
        return SearchOptions(
            alpha=options.alpha,
            neurons=options.neurons,
            lr=options.trigger_lr,
            steps=options.trigger_steps or self._objective.steps,
            students=options.students,
        )
