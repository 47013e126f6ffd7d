"""The defense ``ibd-psc``."""

from __future__ import annotations

import copy
from collections import Counter
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.batch_norm import batch_norm_layers
from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer
from ..common.held_out import images_needed


@final
class IbdPscOptions(DefenseOptions):
    """The paper's."""

    models: int = Field(5, ge=1, description="number of amplified networks")
    scale: float = Field(1.5, gt=1, description="factor of the batch norms' scales and shifts")
    error: float = Field(
        0.6, gt=0, lt=1, description="error on clean images that enough amplified layers exceed"
    )
    threshold: float = Field(0.9, gt=0, lt=1, description="confidence that is rejected")


@final
class IbdPsc(InputScorer):
    """IBD-PSC: the confidence on a triggered input stays high when batch norms are amplified (Hou,
    Feng, Hua, Luo, Zhang, Li, "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented
    Scaling Consistency", ICML 2024).

    In words: amplify the last k batch norms (scale and shift times 1.5), with the smallest k for
    which the network errs on more than 60 % of clean images. Make five networks with the last
    k + 1, …, k + 5 amplified. The confidence in the first prediction stays high for triggered
    inputs: the score is its mean over the networks.

    Needs batch norms and labelled held-out images. The paper's networks have 20 batch norms or
    more; with few of them the error is seldom reached, and a caution says so.

    As in the authors' code (BackdoorBox, ``IBD_PSC.py``): it amplifies one batch norm more than the
    k that it finds (the paper's formula begins with k itself), searches k below the number L of
    batch norms, and amplifies all L where k + 1, … would exceed it.

    Deviations: if no k below L reaches the error, the code stops with an exception; here all five
    networks have all batch norms amplified, as if k were L.
    """

    name = "ibd-psc"
    Options = IbdPscOptions
    options: IbdPscOptions
    needs = "batch norms, held-out images"

    def not_applicable_because(self, view: DefenderView) -> str | None:
        if not batch_norm_layers(view.victim):
            return "the network has no batch norm"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        if self._enough(view) is not None:
            return None
        total = len(batch_norm_layers(view.victim))
        return (
            f"no number of amplified batch norms below all {total} makes the network err on more "
            f"than {self.options.error:.0%} of clean images; the published code stops here"
        )

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        predicted = view.logits(images).argmax(dim=1, keepdim=True)
        total = len(batch_norm_layers(view.victim))
        total_confidence = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        counts = amplified_counts(self._enough(view), total, self.options.models)
        for count, times in sorted(Counter(counts).items()):
            network = amplify(view.victim, count, self.options.scale)
            confidence = in_pieces(network, images).double().softmax(dim=1).gather(1, predicted)
            total_confidence += times * confidence[:, 0]
        return total_confidence / len(counts)

    def threshold(self, view: DefenderView) -> float:
        return self.options.threshold

    def _enough(self, view: DefenderView) -> int | None:
        """The smallest number of amplified batch norms, below all, with a large enough error;
        ``None`` if there is none."""
        for count in range(1, len(batch_norm_layers(view.victim))):
            network = amplify(view.victim, count, self.options.scale)
            answers = in_pieces(network, view.holdout.images).argmax(dim=1)
            error = float((answers != view.holdout.labels).double().mean())
            if error > self.options.error:
                return count
        return None


def amplified_counts(enough: int | None, total: int, models: int) -> list[int]:
    """The number of batch norms amplified in each of ``models`` networks: ``enough`` + 1 in the
    first, one more in each further one, at most ``total``."""
    first = total if enough is None else enough + 1
    return [min(total, first + number) for number in range(models)]


def amplify(network: nn.Module, count: int, scale: float) -> nn.Module:
    """A copy of ``network``; scale and shift of its last ``count`` batch norms times ``scale``."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for layer in batch_norm_layers(copied)[-count:]:
            for parameter in layer.parameters():
                parameter.mul_(scale)
    return copied
