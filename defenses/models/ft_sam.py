"""FT-SAM: fine-tuning towards flat minima, which backdoored weights don't lie in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ..base import DefenderView, Repairer
from ..common.held_out import images_needed, images_wanted
from ..common.tuning import QUICK_TUNING, TuningOptions, tune

_NOTHING = 1e-12


@final
class FtSamOptions(TuningOptions):
    """The authors' for CIFAR-10 (BackdoorBench, defense/ft-sam.py, config/defense/ft-sam).

    100 epochs of 10 mini-batches of 256, at 0.01. Its cosine has a half wave of 100 (PyTorch's
    ``T_max``) and moves with every mini-batch, not every epoch: the rate goes down to 0 and back
    up five times in 1,000 steps.
    """

    hold: int = Field(1, ge=1, description="steps at one rate")
    halves: int = Field(10, ge=1, description="half waves of the cosine: down, up, down …")
    rho: float = Field(2.0, gt=0, description="radius that is searched, relative to the weights")
    smoothing: float = Field(
        0.1, ge=0, lt=1, description="label smoothing: the share of all other classes together"
    )


@final
class FtSam(Repairer):
    """FT-SAM (Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning based Backdoor Defense with
    Sharpness-Aware Minimization", ICCV 2023).

    In words: fine-tune on clean images, each step with the gradient at the worst weights nearby
    (adaptive SAM: nearness is relative to each weight's size). Backdoor neurons have large weights,
    and those are moved most. Running batch statistics see the first pass of a step alone.

    Needs held-out images.

    Deviations: epochs are counted in steps, so that fewer held-out images are seen more often;
    mini-batches are drawn from all held-out images (the code's are of equal numbers per class);
    crops shift by an eighth of an image of any size (always 4 pixels there). The radius is
    2 for all data sets (the configurations of GTSRB and Tiny ImageNet say 8, without smoothing, but
    the code's own defaults override them).
    """

    name = "ft-sam"
    Options = FtSamOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.001},
        {"rho": 0.5},
        {},
        {"rho": 4.0},
        {"lr": 0.03},
        {"rho": 8.0, "smoothing": 0.0},
    )

    def __init__(self, options: FtSamOptions) -> None:
        self.options: FtSamOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        options = self.options

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            sharpness_aware_step(network, optimiser, images, labels, options.rho, options.smoothing)

        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return tune(view.trainable_victim(), view.holdout, recipe, options, generator, step)


def sharpness_aware_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    rho: float,
    smoothing: float,
) -> None:
    """A step of ``optimiser`` from the present weights by the gradient at the worst ones nearby."""

    def slope() -> None:
        optimiser.zero_grad()
        smoothed_cross_entropy(network(images), labels, smoothing).backward()

    slope()
    moved = climb(list(network.parameters()), rho)
    with frozen_statistics(network):
        slope()
    with torch.no_grad():
        for parameter, move in moved:
            parameter.sub_(move)
    optimiser.step()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean divergence from targets with 1 − ``smoothing`` on the label and the rest shared by all
    other classes (PyTorch's own label smoothing gives the label a part of that rest, too).

    The targets' entropy is left out: it is a constant.
    """
    chances = logits.log_softmax(dim=1)
    own = functional.nll_loss(chances, labels)
    others = -(chances.sum(dim=1).mean() + own) / max(1, logits.shape[1] - 1)
    return (1 - smoothing) * own + smoothing * others


@contextlib.contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Running batch statistics stay as they are; mini-batches are normalised by their own."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def climb(parameters: list[nn.Parameter], rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Move the parameters in place to the worst point nearby; returns each with its move.

    ASAM (Kwon et al., ICML 2021): ε = ρ w² g / ‖|w| g‖, over all parameters together.
    """
    known = [(w, w.grad) for w in parameters if w.grad is not None]
    total = torch.stack([(w.abs() * g).square().sum() for w, g in known]).sum().sqrt()
    moves = [(w, rho * w.square() * g / (total + _NOTHING)) for w, g in known]
    for parameter, move in moves:
        parameter.add_(move)
    return moves
