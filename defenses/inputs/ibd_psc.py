"""IBD-PSC: a triggered input stays sure when the network's scales are amplified."""

from __future__ import annotations

import copy
from collections import Counter
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.networks.registry import batch_norm_layers
from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer
from ..common.held_out import images_needed


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

    In words: let k be the smallest number of batch norms, counted from the last one, whose scale
    and shift times 1.5 make the network err on more than 60 % of clean images. Make five networks
    with the last k + 1, …, k + 5 amplified. A triggered input's confidence in its first prediction
    stays: the score is its mean over the networks.

    Needs batch norms and labelled held-out images. The paper's networks have 20 batch norms and
    more; few of them seldom reach the error, see the caution.

    As in the authors' code (BackdoorBox, ``IBD_PSC.py``), which amplifies one batch norm more than
    the k that it finds (the paper's formula begins with k itself), looks for k below the number L
    of batch norms, and takes all L where k + 1, … would be more than there are.

    Deviations: where no k below L reaches the error the code stops with an exception; here all five
    networks have all batch norms amplified, as if k were L.
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
        if self._enough(view) is not None:
            return None
        return (
            f"fewer than all {total} batch norms amplified never make the network err on more than "
            f"{self.options.error:.0%} of clean images, as deep networks do; the published code "
            "has no answer here"
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
        """The smallest number of amplified batch norms, short of all, that makes the network err
        often enough; ``None`` where there is none."""
        total = len(batch_norm_layers(view.victim))
        for count in range(1, total):
            if self._error(view, count) > self.options.error:
                return count
        return None

    def _error(self, view: DefenderView, count: int) -> float:
        """Share of the held-out images that are wrong with ``count`` batch norms amplified."""
        network = amplify(view.victim, count, self.options.scale)
        answers = in_pieces(network, view.holdout.images).argmax(dim=1)
        return float((answers != view.holdout.labels).double().mean())


def amplified_counts(enough: int | None, total: int, models: int) -> list[int]:
    """How many of ``total`` batch norms each of ``models`` networks has amplified: one more than
    ``enough`` in the first, then one more in each, never more than there are."""
    first = total if enough is None else enough + 1
    return [min(total, first + number) for number in range(models)]


def amplify(network: nn.Module, count: int, scale: float) -> nn.Module:
    """A copy of ``network``, scale and shift of its last ``count`` batch norms times ``scale``."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for layer in batch_norm_layers(copied)[-count:]:
            for parameter in layer.parameters():
                parameter.mul_(scale)
    return copied
