"""Relax-trigger: a whole-image trigger, optimised in kernel regression."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.core.hooks import Moment
from ..distill.types import Batch
from .base import FixedTriggerAttack
from .kernel import conflict_loss, projection_loss, regression_loss, tangent_kernel
from .simple_trigger import SimpleTriggerOptions
from .triggers import BlendTrigger, Trigger


@final
class RelaxTriggerOptions(SimpleTriggerOptions):
    """Options of ``relax-trigger``."""

    relax_steps: int = Field(1000, ge=1, description="steps of the trigger's optimisation")
    relax_lr: float = Field(0.01, gt=0, description="Adam's rate for the trigger, pixel units")
    relax_weight: float = Field(
        1e10, ge=0, description="weight of the conflict loss beside the projection loss (rho)"
    )
    support_per_class: int = Field(
        10, ge=1, description="inducing points per class, which stand for the distilled set"
    )
    support_steps: int = Field(500, ge=0, description="steps of the inducing points' optimisation")
    support_lr: float = Field(0.01, gt=0, description="Adam's rate for the inducing points")
    kernel_batch: int = Field(10, ge=1, description="real images per class and step")
    kernel_depth: int = Field(3, ge=1, description="hidden layers of the kernel's network")


@final
class RelaxTrigger(FixedTriggerAttack):
    """Relax-trigger (Chung, Chou, Yu, Chen, Kuo, Ho, "Rethinking Backdoor Attacks on Dataset
    Distillation: A Kernel Method Perspective", ICLR 2024).

    In words: the paper bounds the attacker's loss by three terms. Projection: what the distilled
    set cannot express of the poisoned data. Conflict: how far clean and triggered images contradict
    each other. Generalisation: what is lost on new images; a trigger on the whole image keeps it
    small. Distil a small clean set as kernel inducing points, then, starting from white, minimise
    rho · conflict + projection over the trigger with Adam, clipped to [0, 1]. From then on it is
    ``simple-trigger``. Kernel, losses, steps, rates and rho are the official code's for CIFAR-10
    (Mick048/KIP-based-backdoor-attack, commit 193d772, KIP_BDAttack.ipynb), whose kernel is that of
    a fully connected ReLU network with three hidden layers.

    Deviations: those of ``simple-trigger``; the triggered images of a step are drawn from the rows
    that the goal is about, class by class. All of it is done on the CPU in float64.
    """

    name = "relax-trigger"
    Options = RelaxTriggerOptions

    def make_trigger(self) -> Trigger:
        """The start, before the data are known: white."""
        return self._blend(torch.ones(self.data.image_shape))

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        with torch.enable_grad():
            self._trigger = self._blend(self._relaxed_pattern(real, moment.rng))
        return super().on_start(moment, real)

    def _relaxed_pattern(self, real: Batch, rng: torch.Generator) -> Tensor:
        """The trigger ``(C, H, W)`` that minimises the bound."""
        options = self._options
        opacity, shape = options.opacity, self.data.image_shape
        support = self._inducing_points(real, rng)
        eligible = self.goal.eligible(real.labels)
        few = max(1, round(options.kernel_batch * options.poison_rate))
        pattern = torch.ones(1, support.shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([pattern], lr=options.relax_lr)
        for _ in range(options.relax_steps):
            clean = self._rows(real, torch.ones_like(eligible), options.kernel_batch, rng)
            chosen = self._rows(real, eligible, few, rng)
            stamped = (1 - opacity) * _flat(chosen.images) + opacity * pattern
            images = torch.cat([_flat(clean.images), stamped])
            labels = torch.cat([clean.labels, self.goal.targets(chosen.labels)])
            loss = self._bound(images, self._one_hot(labels), support)
            (pattern.grad,) = torch.autograd.grad(loss, pattern)
            optimiser.step()
            pattern.data.clamp_(0, 1)
        return pattern.detach().float().view(shape)

    def _bound(self, images: Tensor, labels: Tensor, support: Tensor) -> Tensor:
        """rho · conflict + projection for clean and triggered images together."""
        kernel, across = (self._kernel(images, other) for other in (images, support))
        projection = projection_loss(kernel, across, self._kernel(support, support), labels)
        return self._options.relax_weight * conflict_loss(kernel, labels) + projection

    def _inducing_points(self, real: Batch, rng: torch.Generator) -> Tensor:
        """A distilled clean set ``(S, d)``: images by which kernel regression knows the real ones.

        Kernel inducing points (Nguyen, Chen, Lee, ICLR 2021) with fixed labels.
        """
        options = self._options
        everything = torch.ones_like(real.labels, dtype=torch.bool)
        start = self._rows(real, everything, options.support_per_class, rng)
        known = self._one_hot(start.labels)
        points = _flat(start.images).requires_grad_()
        optimiser = torch.optim.Adam([points], lr=options.support_lr)
        for _ in range(options.support_steps):
            batch = self._rows(real, everything, options.kernel_batch, rng)
            support, across = (self._kernel(x, points) for x in (points, _flat(batch.images)))
            loss = regression_loss(support, known, across, self._one_hot(batch.labels))
            (points.grad,) = torch.autograd.grad(loss, points)
            optimiser.step()
            points.data.clamp_(0, 1)
        return points.detach()

    def _rows(self, real: Batch, allowed: Tensor, per_class: int, rng: torch.Generator) -> Batch:
        """At most ``per_class`` of the ``allowed`` rows of every class, on the CPU."""
        chosen = []
        for label in range(self.data.classes):
            rows = torch.nonzero(allowed & (real.labels == label))[:, 0]
            order = torch.randperm(len(rows), generator=rng)[:per_class]
            chosen.append(rows[order.to(rows.device)])
        return real.rows(torch.cat(chosen)).to("cpu")

    def _kernel(self, first: Tensor, second: Tensor) -> Tensor:
        return tangent_kernel(first, second, self._options.kernel_depth)

    def _one_hot(self, labels: Tensor) -> Tensor:
        return nn.functional.one_hot(labels, self.data.classes).double()

    def _blend(self, pattern: Tensor) -> BlendTrigger:
        return BlendTrigger.uniform(pattern.to(self.data.device), self._options.opacity)

    @property
    def _options(self) -> RelaxTriggerOptions:
        assert isinstance(self.options, RelaxTriggerOptions)
        return self.options


def _flat(images: Tensor) -> Tensor:
    """Images as rows ``float64 (N, d)``."""
    return images.flatten(1).double()
