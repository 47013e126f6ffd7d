"""Doorping: the trigger is optimised again during the distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from ..distill.core.hooks import Moment
from ..distill.types import Batch, RequestError
from .base import (
    AttackOptions,
    DataInfo,
    PatchOptions,
    PoisoningAttack,
    PoisoningOptions,
    ThreatModel,
)
from .search import OBJECTIVES, Carriers, ObjectiveName, SearchOptions
from .triggers import PatchTrigger


class DoorpingOptions(PatchOptions, PoisoningOptions):
    """Options of ``doorping``; the search's are the reference code's where it has them."""

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


@final
class Doorping(PoisoningAttack):
    """Doorping (Liu et al., "Backdoor Attacks Against Dataset Distillation", NDSS 2023).

    In words: poisoned rows carry a patch that starts as random pixels; whenever the distilling
    network has moved, the patch is optimised against it (``objective``), and from the next draw
    on the poisoned rows carry the new one.

    Deviations from the reference code: updates happen at every IPC (there, never at IPC 1);
    clean pixels are kept and every drawn batch is stamped afresh; values stay in [0, 1] unless
    ``trigger_range`` is ``unbounded``; an update that changed nothing is counted; poisoned rows
    are drawn from the rows that the goal is about; ``moves_with`` is ours, for backends that train
    experts first (benchmarks/results/mtt-doorping). ``neuron-reference`` keeps the reference's
    update itself.
    """

    name = "doorping"
    Options = DoorpingOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        assert isinstance(options, DoorpingOptions)
        self._options = options
        self._objective = OBJECTIVES[options.objective]
        self._mask = options.mask(data)
        shape = (-1, 1, 1)
        self._mean = torch.tensor(data.mean, device=data.device).view(shape)
        self._std = torch.tensor(data.std, device=data.device).view(shape)
        self._pattern = torch.zeros(data.image_shape, device=data.device)
        self._moves = self._updates = self._idle_updates = 0
        self._experts_seen = False

    @property
    def threat_model(self) -> ThreatModel:
        return "distiller"

    @property
    def trigger(self) -> PatchTrigger:
        """The patch as it is now."""
        return PatchTrigger(
            pattern=self._pattern, mask=self._mask, range=self._options.trigger_range
        )

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        self._pattern = self._random_patch(moment.rng)
        self._moves = self._updates = self._idle_updates = 0
        self._experts_seen = False
        return self.poison(moment, real)

    def on_draw(self, moment: Moment, clean: Batch) -> Batch:
        assert clean.index is not None
        self._experts_seen |= moment.phase == "expert"
        carries = self.poisoned[clean.index].view(-1, 1, 1, 1)
        return clean.replace(
            images=torch.where(carries, self.trigger.stamp(clean.images), clean.images)
        )

    def on_network(self, moment: Moment) -> None:
        if not self._follows(moment):
            return
        self._moves += 1
        every = self._options.update_every or self._objective.update_every
        freeze = self._options.freeze_at
        frozen = moment.progress >= (self._objective.freeze_at if freeze is None else freeze)
        if frozen or self._moves % every:
            return
        found = self._objective.search(moment, self._carriers(moment), self._search_options())
        self._updates += 1
        self._idle_updates += bool(torch.equal(found, self._pattern))
        self._pattern = found

    def _follows(self, moment: Moment) -> bool:
        """Whether the trigger moves with this network; without experts it does with every one.

        A trigger that moves against students is not learned by the set, unless new experts are
        trained on it.
        """
        with_ = self._options.moves_with
        if moment.phase == "expert":
            return with_ != "students"
        return with_ != "experts" or not self._experts_seen

    def counters(self) -> Mapping[str, Any]:
        return {
            **super().counters(),
            "trigger_updates": self._updates,
            "idle_trigger_updates": self._idle_updates,
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "pattern": self._pattern,
            "counts": torch.tensor(
                [self._moves, self._updates, self._idle_updates, self._experts_seen]
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

    def _random_patch(self, rng: torch.Generator) -> Tensor:
        """Uniform 8-bit pixels from 1 to 255 under the mask, as the reference starts."""
        values = torch.randint(1, 256, self.data.image_shape, generator=rng) / 255
        return values.to(self.data.device) * self._mask

    def _carriers(self, moment: Moment) -> Carriers:
        """The patch, and clean images to stamp it on with the labels that they are to get."""
        real = moment.real
        eligible = torch.nonzero(self.goal.eligible(real.labels))[:, 0]
        order = torch.randperm(len(eligible), generator=moment.rng)[: self._options.carriers]
        rows = eligible[order.to(eligible.device)]
        return Carriers(
            images=real.images[rows],
            targets=self.goal.targets(real.labels[rows]),
            pattern=self._pattern,
            mask=self._mask,
            mean=self._mean,
            std=self._std,
            bounded=self._options.trigger_range == "pixel",
        )

    def _search_options(self) -> SearchOptions:
        options = self._options
        return SearchOptions(
            alpha=options.alpha,
            neurons=options.neurons,
            lr=options.trigger_lr,
            steps=options.trigger_steps or self._objective.steps,
            students=options.students,
        )
