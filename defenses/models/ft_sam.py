"""The defense ``ft-sam``."""

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
from ..common.held_out import few_images_caution, images_needed
from ..common.sgd import QUICK_FINE_TUNING, FineTuningOptions, fine_tune

_EPSILON = 1e-12


@final
class FtSamOptions(FineTuningOptions):
    """The authors' for CIFAR-10 (BackdoorBench, defense/ft-sam.py, config/defense/ft-sam).

    100 epochs of 10 mini-batches of 256, at 0.01. The cosine has a half period of 100 (PyTorch's
    ``T_max``) and advances with every mini-batch, not every epoch: the rate falls to 0 and rises
    again five times in 1,000 steps.
    """

    hold: int = Field(1, ge=1, description="steps at one rate")
    halves: int = Field(10, ge=1, description="half periods of the cosine: down, up, down …")
    rho: float = Field(2.0, gt=0, description="radius of the search, relative to the weights")
    smoothing: float = Field(
        0.1, ge=0, lt=1, description="label smoothing: the share of all other classes together"
    )


@final
class FtSam(Repairer):
    """FT-SAM: fine-tuning towards flat minima, away from backdoored weights (Zhu, Wei, Shen, Fan,
    Wu, "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization", ICCV
    2023).

    In words: fine-tune on clean images, each step with the gradient at the worst weights nearby
    (adaptive SAM: distance is relative to the size of each weight). Backdoor neurons have large
    weights, which change most. Only the first pass of a step updates running batch statistics.

    Needs held-out images.

    Deviations: epochs are counted in steps, so that fewer held-out images are used more often;
    mini-batches are drawn from all held-out images (those of the code have equal numbers per
    class); crops shift by an eighth of an image of any size (always 4 pixels there). The radius is
    2 for all data sets (the configurations of GTSRB and Tiny ImageNet say 8, without smoothing, but
    the code's own defaults override them).
    """

    name = "ft-sam"
    Options = FtSamOptions
    options: FtSamOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_FINE_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.001},
        {"rho": 0.5},
        {},
        {"rho": 4.0},
        {"lr": 0.03},
        {"rho": 8.0, "smoothing": 0.0},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        options = self.options

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            sharpness_aware_step(network, optimiser, images, labels, options.rho, options.smoothing)

        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return fine_tune(view.trainable_victim(), view.holdout, recipe, options, generator, step)


def sharpness_aware_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    rho: float,
    smoothing: float,
) -> None:
    """A step of ``optimiser`` from the current weights with the gradient at the worst ones nearby.

    rho: the radius of the search. smoothing: of the labels.
    """

    def compute_gradient() -> None:
        optimiser.zero_grad()
        smoothed_cross_entropy(network(images), labels, smoothing).backward()

    compute_gradient()
    moved = ascend(list(network.parameters()), rho)
    with frozen_statistics(network):
        compute_gradient()
    with torch.no_grad():
        for parameter, move in moved:
            parameter.sub_(move)
    optimiser.step()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean divergence from targets with 1 − ``smoothing`` on the label and the rest on all other
    classes (PyTorch's own label smoothing adds a part of that rest to the label).

    The entropy of the targets, a constant, is left out.
    """
    logs = logits.log_softmax(dim=1)
    own = functional.nll_loss(logs, labels)
    others = -(logs.sum(dim=1).mean() + own) / max(1, logits.shape[1] - 1)
    return (1 - smoothing) * own + smoothing * others


@contextlib.contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Running batch statistics are not updated; mini-batches are normalised by their own."""
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
def ascend(parameters: list[nn.Parameter], rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Move the parameters in place to the worst point nearby; returns each with its change.

    ASAM (Kwon et al., ICML 2021): ε = ρ w² g / ‖|w| g‖, over all parameters together.
    """
    known = [(w, w.grad) for w in parameters if w.grad is not None]
    total = torch.stack([(w.abs() * g).square().sum() for w, g in known]).sum().sqrt()
    moves = [(w, rho * w.square() * g / (total + _EPSILON)) for w, g in known]
    for parameter, move in moves:
        parameter.add_(move)
    return moves
