"""STRIP: a triggered input keeps its answer whatever is laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from scipy.stats import norm
from torch import Tensor, nn

from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer
from ..common.held_out import images_needed


@final
class StripOptions(DefenseOptions):
    """The paper's."""

    copies: int = Field(100, ge=1, description="held-out images laid over an input")
    image_weight: float = Field(1.0, gt=0, le=1, description="weight of the input in the overlay")
    overlay_weight: float = Field(1.0, gt=0, le=1, description="weight of the held-out image")
    false_rejection: float = Field(
        0.01, gt=0, lt=0.5, description="share of clean inputs that the threshold gives up"
    )


@final
class Strip(InputScorer):
    """STRIP (Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on
    Deep Neural Networks", ACSAC 2019).

    In words: lay 100 held-out images over the input, one at a time, and take the mean entropy of
    the victim's predictions; a trigger rules over whatever lies on it, so a low entropy is
    suspicious. The threshold is the 1 % quantile of a normal distribution fitted to the entropies
    of clean images.

    Needs held-out images; they are the overlays, and set the threshold. The score is minus the
    entropy, in bits.

    Deviations: the overlays are drawn once and serve all inputs, so that a score does not depend on
    what else is scored. Overlays are sums, as in the official code, which are not cut to [0, 1].
    (The Adversarial Robustness Toolbox takes means, and its entropy runs over the overlays where
    the paper's runs over the classes.)
    """

    name = "strip"
    Options = StripOptions
    needs = "held-out images (100 in the paper)"
    quick: ClassVar[Mapping[str, Any]] = {"copies": 20}

    def __init__(self, options: StripOptions) -> None:
        self.options: StripOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        count = len(view.holdout)
        return None if count >= 50 else f"{count} held-out images set the 1 % quantile"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        options, held = self.options, view.holdout.images
        rows = torch.randint(len(held), (options.copies,), generator=view.generator(self.name))
        weights = (options.image_weight, options.overlay_weight)
        return -mean_entropy(view.victim, images, held[rows.to(held.device)], weights)

    def threshold(self, view: DefenderView) -> float:
        entropies = -self.score_inputs(view, view.holdout.images).double().cpu().numpy()
        mean, deviation = norm.fit(entropies)
        return -float(norm.ppf(self.options.false_rejection, mean, max(deviation, 1e-12)))


def mean_entropy(
    network: nn.Module, images: Tensor, overlays: Tensor, weights: tuple[float, float]
) -> Tensor:
    """Mean entropy in bits, ``(N,)``, of ``network``'s predictions for ``images`` (N, C, H, W)
    under each of ``overlays`` (M, C, H, W), both weighted."""
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for overlay in overlays:
        mixed = weights[0] * images + weights[1] * overlay
        total += entropy(in_pieces(network, mixed))
    return total / len(overlays)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in bits, ``(N,)``, of the softmax of ``logits`` (N, classes)."""
    logs = logits.double().log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
