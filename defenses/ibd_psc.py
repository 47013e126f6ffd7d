"""IBD-PSC: a triggered input stays sure when the network's scales are amplified."""

from __future__ import annotations

import copy
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.networks import batch_norm_layers
from ..distill.training import in_pieces
from .base import DefenderView, DefenseOptions, InputScorer
from .held_out import images_needed


@final
class IbdPscOptions(DefenseOptions):
    """The paper's."""

    models: int = Field(5, ge=1, description="amplified networks")
    scale: float = Field(1.5, gt=1, description="what scales and shifts are multiplied by")
    error: float = Field(0.6, gt=0, lt=1, description="clean error from which layers are enough")
    threshold: float = Field(0.9, gt=0, lt=1, description="confidence that is rejected")


@final
class IbdPsc(InputScorer):
    """IBD-PSC (Hou, Feng, Hua, Luo, Zhang, Li, "IBD-PSC: Input-level Backdoor Detection via
    Parameter-oriented Scaling Consistency", ICML 2024).

    In words: multiply scale and shift of the last k batch norms by 1.5, k the smallest number that
    makes the network err on 60 % of clean images; go on to k + 1, … for five networks. A triggered
    input's confidence in its first prediction stays: the score is its mean over the networks.

    Needs batch norms (five and more to be what the paper has) and labelled held-out images.

    Deviations: where all batch norms together don't reach the error, the five numbers are the
    highest there are (the official code has no answer there); where there are fewer than k + 4
    batch norms the networks are fewer. The official code amplifies one batch norm more than the k
    that it finds; here it is the paper's k.
    """

    name = "ibd-psc"
    Options = IbdPscOptions
    needs = "batch norms, held-out images"

    def __init__(self, options: IbdPscOptions) -> None:
        self.options: IbdPscOptions = options

    def objection(self, view: DefenderView) -> str | None:
        if not batch_norm_layers(view.victim):
            return "the network has no batch norm"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        total = len(batch_norm_layers(view.victim))
        errors = [self._error(view, count) for count in range(1, total + 1)]
        if max(errors) > self.options.error:
            return None
        return (
            f"all {total} batch norms amplified make the network err on {max(errors):.0%} of clean "
            f"images; it wants {self.options.error:.0%}, as deep networks do"
        )

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        predicted = view.logits(images).argmax(dim=1, keepdim=True)
        confidences = [
            in_pieces(network, images).double().softmax(dim=1).gather(1, predicted)[:, 0]
            for network in self._amplified(view)
        ]
        return torch.stack(confidences).mean(dim=0)

    def threshold(self, view: DefenderView) -> float:
        return self.options.threshold

    def _amplified(self, view: DefenderView) -> list[nn.Module]:
        options, total = self.options, len(batch_norm_layers(view.victim))
        first = max(1, total - options.models + 1)
        for count in range(1, total + 1):
            if self._error(view, count) > options.error:
                first = count
                break
        last = min(total, first + options.models - 1)
        return [amplify(view.victim, count, options.scale) for count in range(first, last + 1)]

    def _error(self, view: DefenderView, count: int) -> float:
        """Share of the held-out images that are wrong with ``count`` batch norms amplified."""
        network = amplify(view.victim, count, self.options.scale)
        answers = in_pieces(network, view.holdout.images).argmax(dim=1)
        return float((answers != view.holdout.labels).double().mean())


def amplify(network: nn.Module, count: int, scale: float) -> nn.Module:
    """A copy of ``network``, scale and shift of its last ``count`` batch norms times ``scale``."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for layer in batch_norm_layers(copied)[-count:]:
            for parameter in layer.parameters():
                parameter.mul_(scale)
    return copied
