"""FT-SAM: fine-tuning towards flat minima, which backdoored weights don't lie in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from .base import DefenderView, Repairer
from .held_out import images_needed, images_wanted
from .tuning import QUICK_TUNING, TuningOptions, tune

_NOTHING = 1e-12


@final
class FtSamOptions(TuningOptions):
    """The official code's for CIFAR-10."""

    rho: float = Field(2.0, gt=0, description="radius that is searched, relative to the weights")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")


@final
class FtSam(Repairer):
    """FT-SAM (Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning based Backdoor Defense with
    Sharpness-Aware Minimization", ICCV 2023).

    In words: fine-tune on clean images, each step with the gradient at the worst weights nearby
    (adaptive SAM: nearness is relative to each weight's size). Backdoor neurons have large weights,
    and those are moved most.

    Needs held-out images.

    Deviations: tuning is counted in steps, at the set's own learning rate; batch statistics are
    updated at both points of a step.
    """

    name = "ft-sam"
    Options = FtSamOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING

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
            def descent() -> None:
                optimiser.zero_grad()
                functional.cross_entropy(
                    network(images), labels, label_smoothing=options.smoothing
                ).backward()

            descent()
            moved = climb(list(network.parameters()), options.rho)
            descent()
            with torch.no_grad():
                for parameter, move in moved:
                    parameter.sub_(move)
            optimiser.step()

        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return tune(view.trainable_victim(), view.holdout, recipe, options, generator, step)


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
