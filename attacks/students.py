"""What attacks through the training of students share: the loss, the patch, the bounds."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distill import weights as flat
from ..distill.core.hooks import Moment
from ..distill.types import Batch, hard_labels
from .base import Attack, AttackOptions, DataInfo
from .student_options import StudentOptions
from .student_training import StudentPlan, as_tested, first_weights
from .triggers import PatchTrigger


class StudentAttack(Attack, ABC):
    """Shared by attacks that back-propagate the attacker's loss through students' training.

    An update trains students on the current set, takes the mean of their losses and, where the
    patch is optimised, one Adam step of the patch. ``_start``: the images around which ``linf``
    and ``l2`` bound the set.
    """

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        assert isinstance(options, StudentOptions)
        self._students = options
        self._mask = options.mask(data)
        self._pattern = torch.ones(data.image_shape, device=data.device) * self._mask
        self._optimiser = self._fresh_optimiser()
        self._start: Tensor | None = None
        self._updates = 0

    @property
    def trigger(self) -> PatchTrigger:
        """The patch as it is now."""
        return PatchTrigger(
            pattern=self._pattern.detach(), mask=self._mask, range=self._students.trigger_range
        )

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        if self._students.trigger == "optimised":
            self._pattern = opposite_of(real.images) * self._mask
        self._optimiser = self._fresh_optimiser()
        self._start, self._updates = None, 0
        return real

    def on_synthetic(self, moment: Moment, synthetic: Batch) -> Batch:
        if self._start is None or not self._bounded:
            return synthetic
        change = self._within_bounds(synthetic.images - self._start)
        return synthetic.replace(images=self._start + change)

    def counters(self) -> Mapping[str, Any]:
        return {"attack_updates": self._updates}

    def state_dict(self) -> dict[str, Tensor]:
        moments = self._optimiser.state.get(self._parameter, {})
        start = {} if self._start is None else {"start": self._start}
        return {
            "pattern": self._pattern,
            "updates": torch.tensor(self._updates),
            **{f"adam.{name}": value.clone() for name, value in moments.items()},
            **start,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._pattern = state["pattern"].to(self.data.device)
        self._updates = int(state["updates"])
        self._start = state["start"].to(self.data.device) if "start" in state else None
        self._optimiser = self._fresh_optimiser()
        moments = {
            name.removeprefix("adam."): value.clone()
            for name, value in state.items()
            if name.startswith("adam.")
        }
        if moments:
            self._optimiser.state[self._parameter] = moments

    @property
    def _bounded(self) -> bool:
        return self._students.linf is not None or self._students.l2 is not None

    def _within_bounds(self, change: Tensor) -> Tensor:
        """``change`` ``(N, C, H, W)``, cut to the bounds: L∞ first, then L2 of each image."""
        options = self._students
        if options.linf is not None:
            change = change.clamp(-options.linf, options.linf)
        if options.l2 is not None:
            change = change.flatten(1).renorm(2, 0, options.l2).view_as(change)
        return change

    def _update(self, moment: Moment, synthetic: Batch) -> Tensor:
        """The mean loss of an update's students; the patch takes its step."""
        self._updates += 1
        pattern = self._pattern.clone().requires_grad_()
        losses = [
            self._loss(moment, synthetic, pattern, network) for network in self._networks(moment)
        ]
        loss = torch.stack(losses).mean()
        if self._students.trigger == "optimised":
            self._improve_pattern(loss, pattern)
        return loss

    def _networks(self, moment: Moment) -> Iterator[nn.Module]:
        """The untrained students of an update, their architectures in turn over all updates."""
        names, count = self._students.student_networks, self._students.students
        for number in range((self._updates - 1) * count, self._updates * count):
            name = names[number % len(names)]
            yield moment.fresh_network() if name == "own" else moment.fresh_network(name)

    def _loss(
        self, moment: Moment, synthetic: Batch, pattern: Tensor, network: nn.Module
    ) -> Tensor:
        """The attacker's loss of one fresh student, attached to the images and the pattern."""
        weights = self._trained(network, synthetic, moment)
        tested = as_tested(network, weights, synthetic.images)
        return self._attackers_loss(tested, weights, moment, pattern)

    def _trained(self, network: nn.Module, synthetic: Batch, moment: Moment) -> Tensor:
        """A student's weights after training on the set, attached to the images it may change."""
        plan = StudentPlan.draw(synthetic.images, moment.recipe, self._students, moment.rng)
        first, engine = first_weights(network, moment.recipe), moment.engine
        start = plan.warmed(network, first, synthetic, engine)
        gradient = self._students.unroll_gradient
        return plan.trained(network, start, self._changeable(synthetic), gradient, engine)

    def _attackers_loss(
        self, network: nn.Module, weights: Tensor, moment: Moment, pattern: Tensor
    ) -> Tensor:
        """Cross-entropy of triggered images to their targets and of clean ones to their labels."""
        clean = self._drawn(moment, eligible=False)
        victims = self._drawn(moment, eligible=True)
        stamped = torch.where(self._mask.bool(), pattern, victims.images)
        triggered = Batch(images=stamped, labels=self.goal.targets(victims.labels))
        loss = flat.loss(network, weights, triggered)
        return loss + self._students.clean_weight * flat.loss(network, weights, clean)

    def _changeable(self, synthetic: Batch) -> Batch:
        """The set, its images detached but for those that the attack may change."""
        if self._students.rows == "all":
            return synthetic
        images = synthetic.images
        own = self._owned(synthetic.labels).view(-1, 1, 1, 1)
        return synthetic.replace(images=torch.where(own, images, images.detach()))

    def _owned(self, labels: Tensor) -> Tensor:
        """``bool (N,)``: the rows with these labels, hard or soft, that the attack may change."""
        hard = hard_labels(labels)
        if self._students.rows == "all":
            return torch.ones_like(hard, dtype=torch.bool)
        return torch.isin(hard, self.goal.targets(hard)[self.goal.eligible(hard)].unique())

    def _drawn(self, moment: Moment, *, eligible: bool) -> Batch:
        """Half of an update's images: of the eligible ones, or of all."""
        real, count = moment.real, self._students.images_per_update // 2
        chosen = self.goal.eligible(real.labels) if eligible else torch.ones_like(real.labels) > 0
        rows = torch.nonzero(chosen)[:, 0]
        order = torch.randperm(len(rows), generator=moment.rng)[:count]
        return real.rows(rows[order.to(rows.device)])

    def _improve_pattern(self, loss: Tensor, pattern: Tensor) -> None:
        """One Adam step on the pixels under the mask."""
        (gradient,) = torch.autograd.grad(loss, pattern, retain_graph=True)
        with torch.no_grad():
            self._parameter.copy_(self._pattern)
            self._parameter.grad = gradient * self._mask
            self._optimiser.step()
            moved = self._parameter.detach() * self._mask
            bounded = self._students.trigger_range == "pixel"
            self._pattern = moved.clamp(0, 1) if bounded else moved.clone()

    def _fresh_optimiser(self) -> torch.optim.Adam:
        self._parameter = self._pattern.clone().requires_grad_()
        return torch.optim.Adam([self._parameter], lr=self._students.trigger_lr)


def opposite_of(images: Tensor) -> Tensor:
    """The pattern ``(C, H, W)`` that is white where ``images`` are dark on average, else black.

    A patch starts there, because one that starts at random may end as one that clean images have.
    """
    return (images.mean(dim=0) < 0.5).to(images.dtype)
