"""The defense ``strip``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer
from ..common.held_out import images_needed


@final
class StripOptions(DefenseOptions):
    """The paper's."""

    copies: int = Field(100, ge=1, description="held-out images added to an input, one at a time")
    image_weight: float = Field(1.0, gt=0, le=1, description="weight of the input in the sum")
    overlay_weight: float = Field(1.0, gt=0, le=1, description="weight of the held-out image")
    false_rejection: float = Field(
        0.01, gt=0, lt=0.5, description="share of clean inputs that the threshold rejects"
    )


@final
class Strip(InputScorer):
    """STRIP: the prediction for a triggered input stays the same when images are added to it (Gao,
    Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural
    Networks", ACSAC 2019).

    In words: add 100 held-out images to the input, one at a time, and compute the mean entropy of
    the victim's predictions. A trigger determines the prediction for any added image, so a
    low entropy is suspicious. The threshold is the 1 % quantile of a normal distribution fitted to
    the entropies of clean images.

    Needs held-out images: they are added to inputs, and set the threshold. The score is the
    negative entropy, in bits.

    Deviations: the added images are drawn once for all inputs, so that a score does not depend on
    the other inputs. Sums are not clipped to [0, 1], as in the official code. (The Adversarial
    Robustness Toolbox takes means, and its entropy is over the added images; the paper's is over
    the classes.)
    """

    name = "strip"
    Options = StripOptions
    options: StripOptions
    needs = "held-out images (100 in the paper)"
    in_reference_code = True
    quick: ClassVar[Mapping[str, Any]] = {"copies": 20}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        count = len(view.holdout)
        return None if count >= 50 else f"the 1 % quantile is that of {count} held-out images"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        options, held = self.options, view.holdout.images
        rows = torch.randint(len(held), (options.copies,), generator=view.generator(self.name))
        weights = (options.image_weight, options.overlay_weight)
        return -mean_entropy(view.victim, images, held[rows.to(held.device)], weights)

    def threshold(self, view: DefenderView) -> float:
        from scipy.stats import norm

        entropies = -self.score_inputs(view, view.holdout.images).double().cpu().numpy()
        mean, deviation = norm.fit(entropies)
        return -float(norm.ppf(self.options.false_rejection, mean, max(deviation, 1e-12)))


def mean_entropy(
    network: nn.Module, images: Tensor, overlays: Tensor, weights: tuple[float, float]
) -> Tensor:
    """Mean entropy in bits, ``(N,)``, of the predictions of ``network`` for ``images``
    (N, C, H, W) plus each of ``overlays`` (M, C, H, W), both weighted."""
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for overlay in overlays:
        mixed = weights[0] * images + weights[1] * overlay
        total += entropy(in_pieces(network, mixed))
    return total / len(overlays)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in bits, ``(N,)``, of the softmax of ``logits`` (N, classes)."""
    logs = logits.double().log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
