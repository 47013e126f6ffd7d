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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from .. import weights as flat
from ..augment import Transform
from ..types import Batch

GradientName = Literal["exact", "recompute", "tesla"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StudentStep:
    """One step: ``rows`` ``int64 (n,)`` of the set, and the transform they pass through."""

    rows: Tensor
    transform: Transform | None = None


def unroll(
    network: nn.Module,
    start: Tensor,
    synthetic: Batch,
    steps: Sequence[StudentStep],
    rates: Tensor,
    gradient: GradientName = "exact",
) -> Tensor:
    """The student's weights ``(P,)`` after ``steps``, attached to the images and the rates.

    network: gives the architecture; its own weights are neither read nor changed. start: ``(P,)``.
    synthetic: pixel-space images that may require a gradient, and their labels. rates: ``(T,)``.
    """
    assert len(steps) == len(rates)
    if gradient == "exact":
        now = start.detach().requires_grad_()
        for step, rate in zip(steps, rates, strict=True):
            now = now - rate * _slope(network, now, synthetic, step, create_graph=True)
        return now
    hessian = gradient == "recompute"
    images, labels = synthetic.images, synthetic.labels
    last: Tensor = _Recomputed.apply(images, rates, start, network, labels, steps, hessian)
    return last


def _slope(
    network: nn.Module, now: Tensor, synthetic: Batch, step: StudentStep, *, create_graph: bool
) -> Tensor:
    """The loss gradient of one step at the weights ``now``."""
    seen = synthetic.rows(step.rows)
    if step.transform is not None:
        seen = seen.replace(images=step.transform(seen.images))
    loss = flat.loss(network, now, seen)
    (slope,) = torch.autograd.grad(loss, now, create_graph=create_graph)
    return slope


class _Recomputed(torch.autograd.Function):
    """``unroll`` with one step's activations in memory; the backward pass repeats them."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        rates: Tensor,
        start: Tensor,
        network: nn.Module,
        labels: Tensor,
        steps: Sequence[StudentStep],
        hessian: bool,
    ) -> Tensor:
        synthetic = Batch(images=images.detach(), labels=labels)
        path = [start.detach()]
        with torch.enable_grad():
            for step, rate in zip(steps, rates.detach(), strict=True):
                now = path[-1].clone().requires_grad_()
                slope = _slope(network, now, synthetic, step, create_graph=False)
                path.append(path[-1] - rate * slope)
        ctx.work = (network, labels, steps, hessian)
        ctx.save_for_backward(images, rates, *path[:-1])
        return path[-1]

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
        images, rates, *path = ctx.saved_tensors
        network, labels, steps, hessian = ctx.work
        adjoint = adjoints[0]
        to_images, to_rates = torch.zeros_like(images), torch.zeros_like(rates)
        for t in reversed(range(len(steps))):
            now, seen = (tensor.detach().requires_grad_() for tensor in (path[t], images))
            with torch.enable_grad():
                synthetic = Batch(images=seen, labels=labels)
                product = _slope(network, now, synthetic, steps[t], create_graph=True) @ adjoint
            to_rates[t] = -product.detach()
            wanted = (seen, now) if hessian else (seen,)
            found = torch.autograd.grad(product, wanted)
            to_images -= rates[t] * found[0]
            if hessian:
                adjoint = adjoint - rates[t] * found[1]
        return to_images, to_rates, None, None, None, None, None
