"""The defense ``i-bau``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.types import Batch
from ..base import DefenderView, DefenseOptions, Repairer
from ..common.held_out import few_images_caution, images_needed

_ROUNDING = 1e-9


@final
class IBauOptions(DefenseOptions):
    """The authors' code (defense.py, the radius from their notebooks): 5,000 clean images in
    mini-batches of 100, so that an epoch has 50 steps."""

    rounds: int = Field(5, ge=1, description="how often a perturbation is found and unlearned")
    steps: int = Field(50, ge=1, description="steps of the weights in a round")
    climbs: int = Field(50, ge=1, description="steps of the search for a perturbation")
    iterations: int = Field(5, ge=1, description="fixed-point iterations of the hypergradient")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    batch: int = Field(100, ge=2, description="images in a mini-batch")
    climb: float = Field(10.0, gt=0, description="SGD's learning rate for the perturbation")
    map_step: float = Field(0.1, gt=0, description="step length of the fixed-point map")
    penalty: float = Field(1e-3, ge=0, description="weight of the perturbation's squared norm")
    radius: float | None = Field(
        10.0, gt=0, description="largest L2 norm of the perturbation, pixel units; none: no limit"
    )
    share: float = Field(0.01, gt=0, le=1, description="share of a mini-batch that is perturbed")


@final
class IBau(Repairer):
    """I-BAU: unlearn the worst universal perturbation, with an implicit hypergradient (Zeng, Chen,
    Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR
    2022).

    In words: find one perturbation that changes the predictions of all clean images; then train the
    weights on images of which a few are perturbed. The gradient includes how the perturbation
    depends on the weights (implicit differentiation by a fixed-point iteration). Five rounds. Batch
    statistics do not change.

    Needs held-out images.

    Deviations: epochs are counted in steps, so that fewer held-out images are used more often. At
    least one image of a mini-batch is perturbed (the code rounds down, to none below 100 images).
    As in the code, one image in a hundred is perturbed (all of them in the paper's formula). The
    norm of the perturbation is limited to 10 after its last step, as in the authors' notebooks and
    the paper's formula; their script has no limit, nor has BackdoorBench, which also differs in
    other settings (Adam with amsgrad at 1e-4, mini-batches of 256, normalised images).
    """

    name = "i-bau"
    Options = IBauOptions
    options: IBauOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {"batch": 64}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 1e-4},
        {},
        {"share": 0.05},
        {"share": 0.2},
        {"share": 1.0},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "unlearned on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, network = self.options, view.trainable_victim()
        generator = view.generator(self.name)
        order = torch.randperm(len(view.holdout), generator=generator).split(options.batch)
        batches = [view.holdout.rows(rows.to(view.holdout.labels.device)) for rows in order]
        optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
        parameters = list(network.parameters())
        for _ in range(options.rounds):
            change = find_perturbation(network, [batch.images for batch in batches], options)
            for batch in itertools.islice(itertools.cycle(batches), options.steps):
                chosen = perturbed_images(len(batch), options.share, generator).to(change.device)
                gradients = hypergradient(
                    partial(outer_loss, network, batch, chosen),
                    partial(inner_loss, network, batches[0], options.penalty),
                    change,
                    parameters,
                    options.map_step,
                    options.iterations,
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimiser.step()
        return network.requires_grad_(False)


def perturbed_images(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of ``count`` images to perturb, ``bool (count,)``: ``share`` of them, rounded down, at
    least one."""
    chosen = torch.zeros(count, dtype=torch.bool)
    most = max(1, int(share * count + _ROUNDING))
    chosen[torch.randperm(count, generator=generator)[:most]] = True
    return chosen


def outer_loss(network: nn.Module, batch: Batch, chosen: Tensor, change: Tensor) -> Tensor:
    """The loss that the weights minimise, with the ``chosen`` images, ``bool (N,)``, perturbed."""
    perturbed = batch.images + chosen.view(-1, 1, 1, 1) * change
    return functional.cross_entropy(network(perturbed), batch.labels)


def inner_loss(network: nn.Module, batch: Batch, penalty: float, change: Tensor) -> Tensor:
    """The loss that the perturbation minimises."""
    loss = functional.cross_entropy(network(batch.images + change), batch.labels)
    return penalty * change.square().sum() - loss


def find_perturbation(
    network: nn.Module, batches: Sequence[Tensor], options: IBauOptions
) -> Tensor:
    """One perturbation ``(1, C, H, W)`` that changes the predictions of all images in ``batches``.

    It starts at 0 and takes a step on each mini-batch; its norm is limited to the radius, if there
    is one, at the end.
    """
    change = torch.zeros_like(batches[0][:1])
    for images in itertools.islice(itertools.cycle(batches), options.climbs):
        with torch.no_grad():
            labels = network(images).argmax(dim=1)
        point = change.requires_grad_()
        loss = inner_loss(network, Batch(images=images, labels=labels), options.penalty, point)
        (gradient,) = torch.autograd.grad(loss, point)
        change = (point - options.climb * gradient).detach()
    if options.radius is not None:
        change = change * min(1.0, options.radius / max(float(change.norm()), _ROUNDING))
    return change


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    solution: Tensor,
    parameters: Sequence[Tensor],
    step: float,
    iterations: int,
) -> list[Tensor]:
    """d outer(δ(θ)) / dθ, where δ(θ) minimises ``inner``, by fixed-point iterations.

    outer, inner: losses of δ that also depend on ``parameters``. solution: δ at the current
    parameters. With Φ(δ, θ) = δ − ``step`` · ∂inner/∂δ, whose fixed point is δ(θ):
    v ← ∂outer/∂δ + (∂Φ/∂δ)ᵀ v, from 0, ``iterations`` times; then
    ∂outer/∂θ + (∂Φ/∂θ)ᵀ v (Grazzi et al., ICML 2020).
    """
    point = solution.detach().requires_grad_()
    loss = outer(point)
    own, *direct = torch.autograd.grad(loss, [point, *parameters], allow_unused=True)
    (slope,) = torch.autograd.grad(inner(point), point, create_graph=True)
    mapped = point - step * slope
    vector = torch.zeros_like(point)
    for _ in range(iterations):
        (turned,) = torch.autograd.grad(mapped, point, grad_outputs=vector, retain_graph=True)
        vector = turned + own
    implicit = torch.autograd.grad(mapped, parameters, grad_outputs=vector, allow_unused=True)
    found = []
    for parameter, first, second in zip(parameters, direct, implicit, strict=True):
        total = torch.zeros_like(parameter)
        for part in (first, second):
            if part is not None:
                total = total + part
        found.append(total)
    return found
