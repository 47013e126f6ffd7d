"""I-BAU: unlearn the worst universal perturbation, seen through how it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from .base import DefenderView, DefenseOptions, Repairer
from .held_out import images_needed, images_wanted
from .tuning import drawn, follow


@final
class IBauOptions(DefenseOptions):
    """The official code's, but for the share, the radius, and the perturbation's steps."""

    rounds: int = Field(5, ge=1, description="times that a perturbation is found and unlearned")
    steps: int = Field(50, ge=1, description="steps of the weights in a round")
    climbs: int = Field(50, ge=1, description="steps that find a perturbation")
    iterations: int = Field(5, ge=1, description="fixed-point iterations of the hypergradient")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    batch: int = Field(100, ge=2, description="images in a mini-batch")
    climb: float = Field(10.0, gt=0, description="length of a step of the perturbation")
    map_step: float = Field(0.01, gt=0, description="length of the fixed point map's step")
    penalty: float = Field(1e-3, ge=0, description="weight of the perturbation's squared norm")
    radius: float = Field(0.4, gt=0, description="largest perturbation: root mean square, pixels")
    share: float = Field(0.05, gt=0, le=1, description="share of a mini-batch that carries it")


@final
class IBau(Repairer):
    """I-BAU (Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit
    Hypergradient", ICLR 2022).

    In words: find one perturbation that changes the predictions of all clean images; take a step
    of the weights down the loss of the perturbed images, with the gradient that knows how the
    perturbation itself answers to the weights (implicit differentiation by a fixed-point
    iteration); five rounds.

    Needs held-out images.

    Deviations: one image in twenty carries the perturbation (all of them in the paper, one in a
    hundred in the code); the radius is given per pixel, so that it means the same for images of
    other sizes, and is kept to (the paper's L2 radius of 10 for CIFAR-10 is 0.18, and too small for
    a patch that covers a seventh of the image; the code leaves it out).
    """

    name = "i-bau"
    Options = IBauOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {"batch": 64}

    def __init__(self, options: IBauOptions) -> None:
        self.options: IBauOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "unlearned on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, network = self.options, view.trainable_victim()
        images, labels = view.holdout.images, view.holdout.labels
        generator = view.generator(self.name)
        optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
        parameters = list(network.parameters())
        for _ in range(options.rounds):
            push = find_push(network, images, options, generator)
            for rows in drawn(len(images), options.batch, options.steps, generator):
                shown, true = images[rows], labels[rows]
                gradients = hypergradient(
                    partial(_unlearned, network, shown, true, options.share),
                    partial(_worst, network, shown, true, options.penalty),
                    push,
                    parameters,
                    options.map_step,
                    options.iterations,
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimiser.step()
        return network.requires_grad_(False)


def _unlearned(
    network: nn.Module, images: Tensor, labels: Tensor, share: float, push: Tensor
) -> Tensor:
    """The outer loss: the first ``share`` of the images carry the perturbation."""
    count = max(1, round(share * len(images)))
    carried = (torch.arange(len(images), device=images.device) < count).view(-1, 1, 1, 1)
    return functional.cross_entropy(network(images + carried * push), labels)


def _worst(
    network: nn.Module, images: Tensor, labels: Tensor, penalty: float, push: Tensor
) -> Tensor:
    """The inner loss, which the perturbation minimises."""
    return penalty * push.square().sum() - functional.cross_entropy(network(images + push), labels)


def find_push(
    network: nn.Module, images: Tensor, options: IBauOptions, generator: torch.Generator
) -> Tensor:
    """One perturbation ``(1, C, H, W)`` that moves the predictions of ``images``, within the
    radius."""
    push = torch.zeros_like(images[:1]).requires_grad_()
    optimiser = torch.optim.SGD([push], lr=options.climb)
    most = options.radius * math.sqrt(push.numel())
    for rows in drawn(len(images), options.batch, options.climbs, generator):
        with torch.no_grad():
            told = network(images[rows]).argmax(dim=1)
        loss = functional.cross_entropy(network(images[rows] + push), told)
        follow(optimiser, options.penalty * push.square().sum() - loss)
        with torch.no_grad():
            push *= min(1.0, most / (float(push.norm()) + 1e-12))
    return push.detach()


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
