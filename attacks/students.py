"""What attacks through the training of students share: the student, its loss, the patch."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill import weights as flat
from ..distill.augment import Augmentation, parse_strategy
from ..distill.backends.unroll import GradientName, StudentStep, unroll
from ..distill.core.hooks import Moment
from ..distill.networks.registry import batch_norm_layers
from ..distill.networks.variants import VariantName
from ..distill.types import Batch, Recipe, hard_labels
from .base import Attack, AttackOptions, DataInfo, PatchOptions
from .triggers import PatchTrigger


class StudentOptions(PatchOptions, AttackOptions):
    """Options of attacks through the training of students."""

    newer: ClassVar[tuple[str, ...]] = (*AttackOptions.newer, "student_networks", "weight_by")

    clean_weight: float = Field(
        1.0, ge=0, description="weight of clean images within the attacker's loss"
    )
    unroll_warmup: int = Field(
        100, ge=0, description="at most so many steps, a random number, before those unrolled"
    )
    unroll_steps: int = Field(10, ge=1, description="steps of a student that are unrolled")
    unroll_lr: float | None = Field(
        None,
        gt=0,
        description="rate of these steps, plain SGD (default: the recipe's / (1 - momentum))",
    )
    unroll_batch: int | None = Field(
        None, ge=1, description="synthetic images of a step (default: the recipe's)"
    )
    students: int = Field(1, ge=1, description="students, each from fresh weights, per update")
    student_networks: tuple[VariantName, ...] = Field(
        ("own",),
        min_length=1,
        description="architectures of the students, in turn: own, batch-norm, wide (twice as "
        "wide), mlp",
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
@dataclass(frozen=True, kw_only=True, eq=False)
class StudentPlan:
    """A student's steps of plain SGD, and the rate of each ``(steps,)``.

    The first ``warmup`` steps carry no gradient; the others are differentiated through.
    """

    steps: list[StudentStep]
    rates: Tensor
    warmup: int

    @classmethod
    def draw(
        cls,
        images: Tensor,
        recipe: Recipe,
        options: StudentOptions,
        rng: torch.Generator,
        least: int = 0,
    ) -> StudentPlan:
        """A student of ``images`` (N, C, H, W) that trains as the recipe's victims do.

        Where the recipe has steps (``dd``), it takes these, up to a random one. Otherwise each step
        is on random rows with the recipe's augmentation, after a random number of warm-up steps, at
        least ``least``.
        """
        if recipe.steps:
            return cls._of_recipe(recipe, options, rng, images.device)
        count = len(images)
        batch = min(options.unroll_batch or recipe.batch_size, count)
        views = Augmentation(parse_strategy(recipe.augment), recipe.preprocessing)
        warmup = least + int(torch.randint(options.unroll_warmup - least + 1, (), generator=rng))
        steps = []
        for _ in range(warmup + options.unroll_steps):
            rows = torch.randperm(count, generator=rng)[:batch].to(images.device)
            shape = (batch, *images.shape[1:])
            transform = views.draw(shape, rng, shared=False) if views.strategy else None
            steps.append(StudentStep(rows=rows, transform=transform))
        rate = options.unroll_lr or recipe.lr / (1 - recipe.momentum)
        return cls(
            steps=steps, rates=torch.full((len(steps),), rate, device=images.device), warmup=warmup
        )

    @classmethod
    def _of_recipe(
        cls, recipe: Recipe, options: StudentOptions, rng: torch.Generator, device: torch.device
    ) -> StudentPlan:
        unrolled = min(options.unroll_steps, len(recipe.steps))
        warmup = int(torch.randint(len(recipe.steps) - unrolled + 1, (), generator=rng))
        chosen = recipe.steps[: warmup + unrolled]
        return cls(
            steps=[StudentStep(rows=torch.tensor(step.rows, device=device)) for step in chosen],
            rates=torch.tensor([step.rate for step in chosen], device=device),
            warmup=warmup,
        )

    @torch.no_grad()
    def warmed(self, network: nn.Module, start: Tensor, synthetic: Batch) -> Tensor:
        """The weights ``(P,)`` after the warm-up from ``start``, detached."""
        steps, rates = self.steps[: self.warmup], self.rates[: self.warmup]
        return unroll(network, start, synthetic, steps, rates, "recompute")

    def trained(
        self, network: nn.Module, start: Tensor, synthetic: Batch, gradient: GradientName
    ) -> Tensor:
        """The weights ``(P,)`` after the unrolled steps from ``start``, attached to the images."""
        steps, rates = self.steps[self.warmup :], self.rates[self.warmup :]
        return unroll(network, start, synthetic, steps, rates, gradient)


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
        start = plan.warmed(network, first_weights(network, moment.recipe), synthetic)
        gradient = self._students.unroll_gradient
        return plan.trained(network, start, self._changeable(synthetic), gradient)

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


def first_weights(network: nn.Module, recipe: Recipe) -> Tensor:
    """Where victims of the recipe begin: its initial weights, where ``network`` has as many."""
    own = flat.laid_out(network)
    given = recipe.initial
    return own if given is None or given.shape != own.shape else given.to(own.device)


@torch.no_grad()
def as_tested(network: nn.Module, weights: Tensor, images: Tensor) -> nn.Module:
    """``network`` as it is tested after its training on ``images`` has led to ``weights`` ``(P,)``.

    Batch norm then keeps the statistics of ``images`` at these weights; those of victims, running
    means over their training, come close to them. A network without it is returned as it is.
    """
    if not batch_norm_layers(network):
        return network
    tested = copy.deepcopy(network)  # the backward pass still trains the other one
    for layer in batch_norm_layers(tested):
        layer.momentum = 1.0  # type: ignore[assignment]
    flat.logits(tested, weights, images)
    return tested.eval()


def opposite_of(images: Tensor) -> Tensor:
    """The pattern ``(C, H, W)`` that is white where ``images`` are dark on average, else black.

    A patch starts there, because one that starts at random may end as one that clean images have.
    """
    return (images.mean(dim=0) < 0.5).to(images.dtype)
