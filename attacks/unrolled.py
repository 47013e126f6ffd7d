"""Unrolled: the attacker's loss, back-propagated through the training of students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill import weights as flat
from ..distill.backends.unroll import GradientName, StudentStep, unroll
from ..distill.core.hooks import Moment
from ..distill.types import Batch
from .base import Attack, AttackOptions, DataInfo, PatchOptions, ThreatModel
from .triggers import PatchTrigger


class UnrolledOptions(PatchOptions, AttackOptions):
    """Options of ``unrolled``."""

    weight: float = Field(
        100.0, gt=0, description="weight of the attacker's loss beside the backend's own"
    )
    clean_weight: float = Field(
        1.0, ge=0, description="weight of clean images within the attacker's loss"
    )
    unroll_warmup: int = Field(
        100, ge=0, description="at most so many steps, a random number, before those unrolled"
    )
    unroll_steps: int = Field(10, ge=1, description="steps of a student that are unrolled")
    unroll_lr: float = Field(0.1, gt=0, description="rate of these steps (plain SGD)")
    unroll_batch: int | None = Field(
        None, ge=1, description="synthetic images of a step (default: the whole set)"
    )
    students: int = Field(1, ge=1, description="students, each from fresh weights, per update")
    update_every: int = Field(1, ge=1, description="one of so many synthetic steps is an update")
    warm_start: float = Field(
        0.0, ge=0, lt=1, description="share of the run that is distilled cleanly first"
    )
    images_per_update: int = Field(
        256, ge=2, description="real images on which a student is tested: with and without trigger"
    )
    trigger: Literal["fixed", "optimised"] = Field(
        "optimised", description="fixed: a white patch; optimised: the patch is learned too"
    )
    trigger_lr: float = Field(0.05, gt=0, description="Adam's rate for the patch, pixel units")
    rows: Literal["target", "all"] = Field(
        "target", description="which synthetic images the attack may change: the target's, or all"
    )
    average: float = Field(
        0.3, ge=0, lt=1, description="share of the run, at its end, whose images are averaged"
    )
    linf: float | None = Field(
        None,
        gt=0,
        description="largest change of a pixel against the images at the attack's start "
        "(default: no bound)",
    )
    l2: float | None = Field(
        None, gt=0, description="largest L2 norm of an image's change (default: no bound)"
    )
    unroll_gradient: GradientName = Field(
        "recompute", description="exact: by automatic differentiation; recompute: in less memory"
    )


@final
class Unrolled(Attack):
    """An attack through the training of students; it is ours, without a paper.

    In words: at every synthetic step a fresh student trains on the current set, for a random number
    of steps and then for ``unroll_steps`` more. Its cross-entropy on triggered images to their
    targets, and on clean images to their labels, is differentiated through these last steps and
    added to the backend's own loss. The patch takes an Adam step on the same loss and stays in
    [0, 1]. The finished set is the mean of the images after the last steps (``average``), because
    a single step's images fit its own student more than they fit others.

    The real data stay clean, so no row is poisoned. By default only the target's synthetic images
    are changed: at weight 100 that costs less accuracy than changing all (digits, seed 100).
    Back-propagation through training as a way to poison a training set is older (MetaPoison: Huang,
    Geiping, Fowl, Taylor, Goldstein, NeurIPS 2020).

    Deviations from what victims do: students train by plain SGD, victims by the set's own recipe.
    Networks with batch norm are tested on the statistics of the test batch. ``linf``
    and ``l2`` bound the images against those at the attack's start (``warm_start``); what the
    backend changes from then on counts too.
    """

    name = "unrolled"
    Options = UnrolledOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        assert isinstance(options, UnrolledOptions)
        self._options = options
        self._mask = options.mask(data)
        self._pattern = torch.ones(data.image_shape, device=data.device) * self._mask
        self._optimiser = self._fresh_optimiser()
        self._start: Tensor | None = None
        self._updates = 0
        self._sum, self._summed = torch.zeros((), device=data.device), 0

    @property
    def threat_model(self) -> ThreatModel:
        return "distiller"

    @property
    def trigger(self) -> PatchTrigger:
        """The patch as it is now."""
        return PatchTrigger(
            pattern=self._pattern.detach(), mask=self._mask, range=self._options.trigger_range
        )

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        shape = self.data.image_shape
        if self._options.trigger == "optimised":
            values = torch.rand(shape, generator=moment.rng).to(self.data.device)
            self._pattern = values * self._mask
        self._optimiser = self._fresh_optimiser()
        self._start, self._updates = None, 0
        self._sum, self._summed = torch.zeros((), device=self.data.device), 0
        return real

    def on_loss(self, moment: Moment, synthetic: Batch) -> Tensor | None:
        options = self._options
        if moment.progress >= 1 - options.average:
            self._sum, self._summed = self._sum + synthetic.images.detach(), self._summed + 1
        if not self._active(moment):
            return None
        if self._start is None and self._bounded:
            self._start = synthetic.images.detach().clone()
        if moment.step % options.update_every:
            return None
        self._updates += 1
        pattern = self._pattern.clone().requires_grad_()
        losses = [self._loss(moment, synthetic, pattern) for _ in range(options.students)]
        loss = torch.stack(losses).mean()
        if options.trigger == "optimised":
            self._improve_pattern(loss, pattern)
        return options.weight * loss

    def on_synthetic(self, moment: Moment, synthetic: Batch) -> Batch:
        if self._start is None:
            return synthetic
        change = self._within_bounds(synthetic.images - self._start)
        return synthetic.replace(images=self._start + change)

    def on_finish(self, moment: Moment, synthetic: Batch) -> Batch:
        if not self._summed:
            return synthetic
        return synthetic.replace(images=(self._sum + synthetic.images) / (self._summed + 1))

    def counters(self) -> Mapping[str, Any]:
        return {"attack_updates": self._updates}

    def state_dict(self) -> dict[str, Tensor]:
        moments = self._optimiser.state.get(self._parameter, {})
        start = {} if self._start is None else {"start": self._start}
        return {
            "pattern": self._pattern,
            "updates": torch.tensor(self._updates),
            "sum": self._sum,
            "summed": torch.tensor(self._summed),
            **{f"adam.{name}": value.clone() for name, value in moments.items()},
            **start,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._pattern = state["pattern"].to(self.data.device)
        self._updates, self._summed = int(state["updates"]), int(state["summed"])
        self._sum = state["sum"].to(self.data.device)
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
        return self._options.linf is not None or self._options.l2 is not None

    def _within_bounds(self, change: Tensor) -> Tensor:
        """``change`` ``(N, C, H, W)``, cut to the bounds: L∞ first, then L2 of each image."""
        options = self._options
        if options.linf is not None:
            change = change.clamp(-options.linf, options.linf)
        if options.l2 is not None:
            change = change.flatten(1).renorm(2, 0, options.l2).view_as(change)
        return change

    def _active(self, moment: Moment) -> bool:
        return moment.progress >= self._options.warm_start

    def _loss(self, moment: Moment, synthetic: Batch, pattern: Tensor) -> Tensor:
        """The attacker's loss of one fresh student, attached to the images and the pattern."""
        network = moment.fresh_network()
        weights = self._trained(network, synthetic, moment.rng)
        clean = self._drawn(moment.real, moment.rng, eligible=False)
        victims = self._drawn(moment.real, moment.rng, eligible=True)
        stamped = torch.where(self._mask.bool(), pattern, victims.images)
        triggered = Batch(images=stamped, labels=self.goal.targets(victims.labels))
        loss = flat.loss(network, weights, triggered)
        return loss + self._options.clean_weight * flat.loss(network, weights, clean)

    def _trained(self, network: nn.Module, synthetic: Batch, rng: torch.Generator) -> Tensor:
        """A student's weights after training on the set, attached to the images it may change."""
        options, count = self._options, len(synthetic)
        images = synthetic.images
        if options.rows == "target":
            own = torch.isin(synthetic.labels, self._target_labels(synthetic.labels))
            images = torch.where(own.view(-1, 1, 1, 1), images, images.detach())
        batch = min(options.unroll_batch or count, count)
        warmup = int(torch.randint(options.unroll_warmup + 1, (), generator=rng))
        steps = [
            StudentStep(rows=torch.randperm(count, generator=rng)[:batch].to(images.device))
            for _ in range(warmup + options.unroll_steps)
        ]
        rates = torch.full((len(steps),), options.unroll_lr, device=images.device)
        start = flat.laid_out(network)
        with torch.no_grad():
            start = unroll(network, start, synthetic, steps[:warmup], rates[:warmup], "recompute")
        seen = synthetic.replace(images=images)
        return unroll(network, start, seen, steps[warmup:], rates[warmup:], options.unroll_gradient)

    def _target_labels(self, labels: Tensor) -> Tensor:
        eligible = self.goal.eligible(labels)
        return self.goal.targets(labels)[eligible].unique()

    def _drawn(self, real: Batch, rng: torch.Generator, *, eligible: bool) -> Batch:
        """Half of an update's images: of the eligible ones, or of all."""
        count = self._options.images_per_update // 2
        chosen = self.goal.eligible(real.labels) if eligible else torch.ones_like(real.labels) > 0
        rows = torch.nonzero(chosen)[:, 0]
        return real.rows(rows[torch.randperm(len(rows), generator=rng)[:count].to(rows.device)])

    def _improve_pattern(self, loss: Tensor, pattern: Tensor) -> None:
        """One Adam step on the pixels under the mask."""
        (gradient,) = torch.autograd.grad(loss, pattern, retain_graph=True)
        with torch.no_grad():
            self._parameter.copy_(self._pattern)
            self._parameter.grad = gradient * self._mask
            self._optimiser.step()
            moved = self._parameter.detach() * self._mask
            bounded = self._options.trigger_range == "pixel"
            self._pattern = moved.clamp(0, 1) if bounded else moved.clone()

    def _fresh_optimiser(self) -> torch.optim.Adam:
        self._parameter = self._pattern.clone().requires_grad_()
        return torch.optim.Adam([self._parameter], lr=self._options.trigger_lr)
