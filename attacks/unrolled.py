"""Unrolled: the attacker's loss, back-propagated through the training of students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..distill.core.hooks import Moment
from ..distill.types import Batch
from .base import AttackOptions, DataInfo, PoisoningAttack, PoisoningOptions, ThreatModel
from .student_options import StudentOptions
from .students import StudentAttack


class UnrolledOptions(StudentOptions, PoisoningOptions):
    """Options of ``unrolled``."""

    newer: ClassVar[tuple[str, ...]] = (*StudentOptions.newer, "weight_by")

    poison_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="rows that are poisoned too, as a share of the training set's size; 0: none",
    )

    weight: float = Field(
        100.0, gt=0, description="weight of the attacker's loss beside the backend's own"
    )
    weight_by: Literal["loss", "gradient"] = Field(
        "loss",
        description="loss: the weight multiplies the attacker's loss; gradient: it is the RMS of "
        "the attacker's gradient on the images that it changes, beside the backend's own there",
    )
    update_every: int = Field(1, ge=1, description="one of so many synthetic steps is an update")
    warm_start: float = Field(
        0.0, ge=0, lt=1, description="share of the run that is distilled cleanly first"
    )
    average: float = Field(
        0.3, ge=0, lt=1, description="share of the run, at its end, whose images are averaged"
    )

    @model_validator(mode="after")
    def _a_share_needs_poisoned_rows(self) -> Self:
        if self.target_share is not None and not self.poison_rate:
            raise ValueError("target_share needs poisoned rows: a poison_rate above 0")
        return self


@final
class Unrolled(StudentAttack, PoisoningAttack):
    """An attack through the training of students; it is ours, without a paper.

    In words: at every synthetic step a fresh student trains on the current set, for a random number
    of steps and then for ``unroll_steps`` more. Its cross-entropy on triggered images to their
    targets, and on clean images to their labels, is differentiated through these last steps and
    added to the backend's own loss. The patch starts white where images are dark on average, else
    black, takes an Adam step on the same loss and stays in [0, 1]. The finished set is the mean of
    the images of the last steps (``average``), because a single step's images fit its own student
    more than they fit others.

    By default the real data stay clean, and only the target's synthetic images are changed: at
    weight 100 that costs less accuracy than changing all (digits, ``dc``, seed 100). With a
    ``poison_rate``, rows are relabelled too, and carry the present patch at every draw, as in
    Doorping: the backend's own loss then works for the attack.
    Back-propagation through training as a way to poison a training set is older (MetaPoison: Huang,
    Geiping, Fowl, Taylor, Goldstein, NeurIPS 2020).

    Students train as the set's recipe says: with its augmentation, and by its steps and rates where
    it has any (``dd``). Deviations from what victims do: plain SGD at the recipe's rate divided by
    1 − momentum, no weight decay, and shorter trainings. Students with batch norm are tested on
    the statistics of the set, which victims' running means come close to. ``student_networks``
    gives them other architectures in turn; ``weight_by`` ``gradient`` is for gradients of different
    sizes, of backends or of students. ``linf`` and ``l2`` bound the images against those at the
    attack's start (``warm_start``); what the backend changes from then on counts too.
    """

    name = "unrolled"
    Options = UnrolledOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        assert isinstance(options, UnrolledOptions)
        self._options = options
        self._sum: Tensor = torch.zeros((), device=data.device)
        self._summed = 0

    @property
    def threat_model(self) -> ThreatModel:
        return "distiller"

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        self._sum, self._summed = torch.zeros((), device=self.data.device), 0
        self.poisoned = torch.zeros(len(real), dtype=torch.bool, device=self.data.device)
        real = super().on_start(moment, real)
        return self.poison(moment, real) if self._options.poison_rate else real

    def on_draw(self, moment: Moment, clean: Batch) -> Batch:
        return self.stamp_drawn(clean) if self._options.poison_rate else clean

    def on_loss(self, moment: Moment, synthetic: Batch) -> Tensor | None:
        options = self._options
        if moment.progress >= 1 - options.average:
            self._sum, self._summed = self._sum + synthetic.images.detach(), self._summed + 1
        if moment.progress < options.warm_start:
            return None
        if self._start is None and self._bounded:
            self._start = synthetic.images.detach().clone()
        if moment.step % options.update_every:
            return None
        loss = self._update(moment, synthetic)
        if options.weight_by == "loss":
            return options.weight * loss
        return with_gradient(loss, synthetic.images, options.weight)

    def counters(self) -> Mapping[str, Any]:
        return {**PoisoningAttack.counters(self), **StudentAttack.counters(self)}

    def on_finish(self, moment: Moment, synthetic: Batch) -> Batch:
        if not self._summed:
            return synthetic
        return synthetic.replace(images=(self._sum + synthetic.images) / (self._summed + 1))

    def state_dict(self) -> dict[str, Tensor]:
        kept = {"sum": self._sum, "summed": torch.tensor(self._summed)}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._sum, self._summed = state["sum"].to(self.data.device), int(state["summed"])


def with_gradient(loss: Tensor, images: Tensor, ratio: float) -> Tensor:
    """The value of ``loss``, its gradient at ``images`` scaled to ``ratio`` × the backend's own.

    images: ``(N, C, H, W)``, a leaf whose ``grad`` is that of the backend's loss. Both norms are
    over the images that ``loss`` depends on. Where the backend has no gradient, none is scaled.
    """
    (slope,) = torch.autograd.grad(loss, images)
    reached = slope.flatten(1).abs().sum(1) > 0
    given = None if images.grad is None else images.grad[reached].norm()
    if given is not None and given > 0:
        slope = slope * (ratio * given / slope.norm())
    return loss.detach() + ((images - images.detach()) * slope).sum()
