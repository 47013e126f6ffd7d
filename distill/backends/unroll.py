"""Training a student by gradient descent, differentiably in its data and its learning rates.

The student takes T steps ``w ← w − rate_t · ∇ℓ(w; batch_t)`` from given weights. What is wanted is
the gradient of some function of the last weights with respect to the images and the rates:

- ``exact``: automatic differentiation through all steps. Every step's activations stay in memory.
- ``recompute``: the same gradient to rounding, by the chain rule step by step from the last to the
  first: with λ the gradient at the weights after step t, ``rate_t``'s gradient is −⟨∇ℓ, λ⟩, the
  images' is −rate_t · ∂⟨∇ℓ, λ⟩/∂images, and λ loses rate_t · H λ, H the Hessian of ℓ. Only the
  weights (one vector a step) are kept; activations of one step at a time. As in the published code
  of dataset distillation (Wang et al., 2018).
- ``tesla``: ``recompute`` without the Hessian term, which is what TESLA's code computes (Cui, Wang,
  Si, Hsieh, "Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory", ICML 2023). The
  paper calls it exact, but it treats a step's weights as if earlier images had not made them: an
  approximation that holds for few steps at small rates. Deviation from the code: there, the images'
  gradient comes out halved (the squared distance's factor 2 multiplies a tuple); here it is whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import weights as flat
from ..augment import Transform
from ..engine import PLAIN, Engine, StaticNetwork
from ..types import Batch

GradientName = Literal["exact", "recompute", "tesla"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StudentStep:
    """One step: ``rows`` ``int64 (n,)`` of the set, and the transform they pass through."""

    rows: Tensor
    transform: Transform | None = None

    def view(self, synthetic: Batch) -> Batch:
        """What the step sees of the set, attached to its images."""
        seen = synthetic.rows(self.rows)
        if self.transform is None:
            return seen
        return seen.replace(images=self.transform(seen.images))


def unroll(
    network: nn.Module,
    start: Tensor,
    synthetic: Batch,
    steps: Sequence[StudentStep],
    rates: Tensor,
    gradient: GradientName = "exact",
    engine: Engine = PLAIN,
) -> Tensor:
    """The student's weights ``(P,)`` after ``steps``, attached to the images and the rates.

    network: gives the architecture; its own weights are neither read nor changed. start: ``(P,)``.
    synthetic: pixel-space images that may require a gradient, and their labels. rates: ``(T,)``.
    engine: how the passes run; on a GPU's fast path ``exact`` is computed as ``recompute`` (on a
    CPU the repeated passes would cost more than they gain).
    """
    assert len(steps) == len(rates)
    repeats = gradient != "exact" or start.is_cuda
    static = engine.static(network) if repeats else None
    passes = _PlainPasses(network) if static is None else _FastPasses(static)
    if gradient == "exact" and static is None:
        now = start.detach().requires_grad_()
        for step, rate in zip(steps, rates, strict=True):
            now = now - rate * _slope(network, now, step.view(synthetic), create_graph=True)
        return now
    hessian = gradient != "tesla"
    images, labels = synthetic.images, synthetic.labels
    last: Tensor = _Recomputed.apply(images, rates, start, passes, labels, steps, hessian)
    return last


def value_and_slope(
    network: nn.Module, static: StaticNetwork | None, now: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The loss on ``batch`` and its gradient ``(P,)`` at the weights ``now``, a leaf.

    static: what stands in for ``network``; then the answers are valid until the next call.
    """
    if static is None:
        loss = flat.loss(network, now, batch)
        return loss, torch.autograd.grad(loss, now)[0]
    first = static.captured("slope", partial(_first, static))
    loss, slope = first(now.detach(), batch.images, batch.labels)
    return loss, slope


def _slope(network: nn.Module, now: Tensor, seen: Batch, *, create_graph: bool) -> Tensor:
    """The loss gradient of one step at the weights ``now``."""
    loss = flat.loss(network, now, seen)
    (slope,) = torch.autograd.grad(loss, now, create_graph=create_graph)
    return slope


class _Passes(ABC):
    """One step's passes through the student: its slope, and how a later gradient comes back."""

    @abstractmethod
    def slope(self, now: Tensor, seen: Batch) -> Tensor:
        """The loss gradient ``(P,)`` on ``seen`` at the weights ``now``."""

    @abstractmethod
    def product(self, now: Tensor, seen: Batch, adjoint: Tensor, hessian: bool) -> _Product:
        """The slope · ``adjoint`` with its gradients; that at the weights with ``hessian`` only."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Product:
    """A product of the slope with a vector: its value and its gradients."""

    value: Tensor
    to_images: Tensor
    to_weights: Tensor | None


@final
class _PlainPasses(_Passes):
    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def slope(self, now: Tensor, seen: Batch) -> Tensor:
        return _slope(self._network, now.clone().requires_grad_(), seen, create_graph=False)

    def product(self, now: Tensor, seen: Batch, adjoint: Tensor, hessian: bool) -> _Product:
        weights, images = now.detach().requires_grad_(), seen.images.detach().requires_grad_()
        slope = _slope(self._network, weights, seen.replace(images=images), create_graph=True)
        value = slope @ adjoint
        wanted = (images, weights) if hessian else (images,)
        to_images, *to_weights = torch.autograd.grad(value, wanted)
        return _Product(
            value=value.detach(),
            to_images=to_images,
            to_weights=to_weights[0] if hessian else None,
        )


@final
class _FastPasses(_Passes):
    """Captured passes of a static network, into which the weights are written."""

    def __init__(self, static: StaticNetwork) -> None:
        self._static = static

    def slope(self, now: Tensor, seen: Batch) -> Tensor:
        first = self._static.captured("slope", partial(_first, self._static))
        return first(now, seen.images, seen.labels)[1]

    def product(self, now: Tensor, seen: Batch, adjoint: Tensor, hessian: bool) -> _Product:
        captured = self._static.captured("product", partial(_second, self._static))
        value, to_images, to_weights = captured(now, seen.images, seen.labels, adjoint)
        return _Product(
            value=value, to_images=to_images, to_weights=to_weights if hessian else None
        )


def _first(
    static: StaticNetwork, now: Tensor, images: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """The loss, and its gradient ``(P,)`` at the weights ``now``."""
    flat.write(static.module, now)
    loss = functional.cross_entropy(static.first_order(images), labels)
    slopes = torch.autograd.grad(loss, static.weights)
    return loss.detach(), flat.joined(slopes)


def _second(
    static: StaticNetwork, now: Tensor, images: Tensor, labels: Tensor, adjoint: Tensor
) -> tuple[Tensor, ...]:
    """The gradient's product with ``adjoint``, and its own gradients at images and weights."""
    flat.write(static.module, now)
    seen = images.detach().requires_grad_()
    if static.sees_batches or seen.is_cuda:  # along a direction was measured on CPUs only
        loss = functional.cross_entropy(static.module(seen), labels)
        slopes = torch.autograd.grad(loss, static.weights, create_graph=True)
        value = flat.joined(slopes) @ adjoint
    else:
        pieces = adjoint.split([weight.numel() for weight in static.weights])
        shaped = [piece.view_as(w) for piece, w in zip(pieces, static.weights, strict=True)]
        value = static.along(seen, labels, shaped)
    to_images, *to_weights = torch.autograd.grad(value, (seen, *static.weights))
    return value.detach(), to_images, flat.joined(to_weights)


class _Recomputed(torch.autograd.Function):
    """``unroll`` with one step's activations in memory; the backward pass repeats them."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        rates: Tensor,
        start: Tensor,
        passes: _Passes,
        labels: Tensor,
        steps: Sequence[StudentStep],
        hessian: bool,
    ) -> Tensor:
        synthetic = Batch(images=images.detach(), labels=labels)
        path = [start.detach()]
        with torch.enable_grad():
            for step, rate in zip(steps, rates.detach(), strict=True):
                slope = passes.slope(path[-1], step.view(synthetic))
                path.append(path[-1] - rate * slope)
        ctx.work = (passes, labels, steps, hessian)
        ctx.save_for_backward(images, rates, *path[:-1])
        return path[-1]

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
        images, rates, *path = ctx.saved_tensors
        passes, labels, steps, hessian = ctx.work
        adjoint = adjoints[0]
        to_images, to_rates = torch.zeros_like(images), torch.zeros_like(rates)
        for t in reversed(range(len(steps))):
            leaf = images.detach().requires_grad_()
            with torch.enable_grad():
                seen = steps[t].view(Batch(images=leaf, labels=labels))
                product = passes.product(path[t], seen, adjoint, hessian)
            to_rates[t] = -product.value
            (found,) = torch.autograd.grad(seen.images, leaf, product.to_images)
            to_images -= rates[t] * found
            if hessian:
                adjoint = adjoint - rates[t] * product.to_weights
        return to_images, to_rates, None, None, None, None, None
