"""I-BAU: unlearn the worst universal perturbation, seen through how it answers."""

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
from ..common.held_out import images_needed, images_wanted

_ROUNDING = 1e-9


@final
class IBauOptions(DefenseOptions):
    """The authors' code's (defense.py, the radius from their notebooks): 5,000 clean images in
    mini-batches of 100, so that one pass is 50 steps."""

    rounds: int = Field(5, ge=1, description="times that a perturbation is found and unlearned")
    steps: int = Field(50, ge=1, description="steps of the weights in a round")
    climbs: int = Field(50, ge=1, description="steps that find a perturbation")
    iterations: int = Field(5, ge=1, description="fixed-point iterations of the hypergradient")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    batch: int = Field(100, ge=2, description="images in a mini-batch")
    climb: float = Field(10.0, gt=0, description="SGD's learning rate for the perturbation")
    map_step: float = Field(0.1, gt=0, description="length of the fixed point map's step")
    penalty: float = Field(1e-3, ge=0, description="weight of the perturbation's squared norm")
    radius: float | None = Field(
        10.0, gt=0, description="largest L2 norm of the perturbation, pixels; none: no limit"
    )
    share: float = Field(0.01, gt=0, le=1, description="share of a mini-batch that carries it")


@final
class IBau(Repairer):
    """I-BAU (Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit
    Hypergradient", ICLR 2022).

    In words: find one perturbation that changes the predictions of all clean images; take a step
    of the weights down the loss of images of which a few carry it, with the gradient that knows how
    the perturbation itself answers to the weights (implicit differentiation by a fixed-point
    iteration); five rounds. Batch statistics stay as they are.

    Needs held-out images.

    Deviations: passes are counted in steps, so that fewer held-out images are seen more often; at
    least one image of a mini-batch carries the perturbation (the code rounds down, to none where
    there are fewer than 100). As in the code, one image of a hundred carries it (all of them in the
    paper's formula). The perturbation's norm is limited to 10 as in the authors' notebooks, after
    the paper's formula, once its steps are taken; their script leaves the limit out, and so does
    BackdoorBench, which differs in more (Adam with amsgrad at 1e-4, mini-batches of 256, normalised
    images).
    """

    name = "i-bau"
    Options = IBauOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {"batch": 64}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 1e-4},
        {},
        {"share": 0.05},
        {"share": 0.2},
        {"share": 1.0},
    )

    def __init__(self, options: IBauOptions) -> None:
        self.options: IBauOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "unlearned on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, network = self.options, view.trainable_victim()
        generator = view.generator(self.name)
        order = torch.randperm(len(view.holdout), generator=generator).split(options.batch)
        pieces = [view.holdout.rows(rows.to(view.holdout.labels.device)) for rows in order]
        optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
        parameters = list(network.parameters())
        for _ in range(options.rounds):
            push = find_push(network, [piece.images for piece in pieces], options)
            for piece in itertools.islice(itertools.cycle(pieces), options.steps):
                carriers = chosen(len(piece), options.share, generator).to(push.device)
                gradients = hypergradient(
                    partial(unlearned, network, piece, carriers),
                    partial(worst, network, pieces[0], options.penalty),
                    push,
                    parameters,
                    options.map_step,
                    options.iterations,
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimiser.step()
        return network.requires_grad_(False)


def chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of ``count`` images carry the perturbation: ``share`` of them, rounded down, but one at
    least; ``bool (count,)``."""
    carriers = torch.zeros(count, dtype=torch.bool)
    most = max(1, int(share * count + _ROUNDING))
    carriers[torch.randperm(count, generator=generator)[:most]] = True
    return carriers


def unlearned(network: nn.Module, batch: Batch, carriers: Tensor, push: Tensor) -> Tensor:
    """The outer loss: the ``carriers`` among the images, ``bool (N,)``, carry the perturbation."""
    shown = batch.images + carriers.view(-1, 1, 1, 1) * push
    return functional.cross_entropy(network(shown), batch.labels)


def worst(network: nn.Module, batch: Batch, penalty: float, push: Tensor) -> Tensor:
    """The inner loss, which the perturbation minimises."""
    loss = functional.cross_entropy(network(batch.images + push), batch.labels)
    return penalty * push.square().sum() - loss


def find_push(network: nn.Module, pieces: Sequence[Tensor], options: IBauOptions) -> Tensor:
    """One perturbation ``(1, C, H, W)`` that moves the predictions of the images in ``pieces``.

    From zero, a step for each piece; cut down to the radius, where there is one, at the end.
    """
    push = torch.zeros_like(pieces[0][:1])
    for images in itertools.islice(itertools.cycle(pieces), options.climbs):
        with torch.no_grad():
            labels = network(images).argmax(dim=1)
        point = push.requires_grad_()
        loss = worst(network, Batch(images=images, labels=labels), options.penalty, point)
        (slope,) = torch.autograd.grad(loss, point)
        push = (point - options.climb * slope).detach()
    if options.radius is not None:
        push = push * min(1.0, options.radius / max(float(push.norm()), _ROUNDING))
    return push


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    solution: Tensor,
    parameters: Sequence[Tensor],
    step: float,
    iterations: int,
) -> list[Tensor]:
    """d outer(δ(θ)) / dθ, where δ(θ) minimises ``inner``, by fixed-point iterations.

    outer, inner: losses of δ that depend on ``parameters`` too. solution: δ at the present
    parameters. With Φ(δ, θ) = δ − ``step`` · ∂inner/∂δ, whose fixed point δ(θ) is:
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
