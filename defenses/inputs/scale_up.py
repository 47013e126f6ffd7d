"""The defense ``scale-up``."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer


@final
class ScaleUpOptions(DefenseOptions):
    """The paper's."""

    multipliers: tuple[int, ...] = Field(
        (3, 5, 7, 9, 11), min_length=1, description="factors of the pixels"
    )
    threshold: float = Field(0.5, description="consistency above which an input is rejected")
    limited: bool = Field(
        False, description="data-limited variant: consistency normalised on held-out images"
    )


@final
class ScaleUp(InputScorer):
    """SCALE-UP: the prediction for a triggered input stays when its pixels are multiplied (Guo, Li,
    Chen, Guo, Sun, Liu, "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via
    Analyzing Scaled Prediction Consistency", ICLR 2023).

    In words: multiply an input's pixels by 3, 5, 7, 9 and 11, clip them at 1, and count how often
    the prediction stays the same. For triggered inputs it mostly does.

    Needs only the model's answers. The data-limited variant (``limited``) needs held-out images, on
    which it normalises the consistency of each predicted class.

    The multipliers, the threshold and the clipping are those of the authors' BackdoorBox
    (``SCALE_UP.py``); their other repository (JunfengGo/SCALE-UP) uses all of 1 to 11.

    Deviations: in the data-limited variant a class without held-out images gets the mean and
    standard deviation of all classes, and a deviation of 0 counts as 1. BackdoorBox normalises by
    those of all held-out images, compared with their true labels, which does not change the order;
    here it is by predicted class, as the paper says.
    """

    name = "scale-up"
    Options = ScaleUpOptions
    options: ScaleUpOptions
    needs = "only the model (held-out images if limited)"

    def not_applicable_because(self, view: DefenderView) -> str | None:
        if self.options.limited and not len(view.holdout):
            return "the data-limited variant needs held-out images, there are none"
        return None

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        predicted = view.logits(images).argmax(dim=1)
        scores = consistency(view.victim, images, predicted, self.options.multipliers)
        if not self.options.limited:
            return scores
        known = view.logits(view.holdout.images).argmax(dim=1)
        usual = consistency(view.victim, view.holdout.images, known, self.options.multipliers)
        mean, deviation = _by_class(usual, known, view.classes)
        return (scores - mean[predicted]) / deviation[predicted]

    def threshold(self, view: DefenderView) -> float:
        return self.options.threshold


def consistency(
    network: nn.Module, images: Tensor, predicted: Tensor, multipliers: tuple[int, ...]
) -> Tensor:
    """Share of ``multipliers`` under which ``network`` still predicts ``predicted``, ``(N,)``."""
    kept = [
        in_pieces(network, (images * factor).clamp(0, 1)).argmax(dim=1) == predicted
        for factor in multipliers
    ]
    return torch.stack(kept).double().mean(dim=0)


def _by_class(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (ddof 1) of ``values`` by class, each ``(classes,)``."""
    mean, deviation = values.new_zeros(classes), values.new_ones(classes)
    for label in range(classes):
        own = values[labels == label]
        own = values if len(own) < 2 else own
        mean[label] = own.mean()
        spread = own.std(correction=1 if len(own) > 1 else 0)
        deviation[label] = torch.where(spread > 0, spread, 1.0)
    return mean, deviation
