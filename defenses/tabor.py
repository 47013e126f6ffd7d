"""TABOR: Neural Cleanse with a better idea of what a trigger looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from ..distill.training import predict
from ..distill.types import Batch
from .base import DefenderView, Inspection, Inspector
from .by_class import anomaly_index
from .held_out import known_images, rows_in_their_place
from .trigger_inversion import Draft, InversionOptions, Patches, invert_triggers, stamped

_LEAST = 1e-3  # keeps logarithms finite


@final
class TaborOptions(InversionOptions):
    """The search's are Neural Cleanse's; the weights stand in relation to the mask's size."""

    outside: float = Field(1.0, ge=0, description="weight of what the pattern has outside the mask")
    scattered: float = Field(0.1, ge=0, description="weight of roughness, of mask and pattern")
    blocking: float = Field(1.0, ge=0, description="weight of images that the mask spoils")
    overlaying: float = Field(1.0, ge=0, description="weight of a pattern that fails alone")
    threshold: float = Field(2.0, gt=0, description="anomaly index from which a class is flagged")


@final
class Tabor(Inspector):
    """TABOR (Guo, Wang, Xing, Du, Song, "TABOR: A Highly Accurate Approach to Inspecting and
    Restoring Trojan Backdoors in AI Systems", 2019; ICDM 2020).

    In words: Neural Cleanse's search with four more penalties: patches that are large or leave
    something outside their mask, that are scattered, that hide what images show (blocking), that
    don't work alone (overlaying). A class is judged by size, smoothness and how well its patch
    works, in logarithms, and the MAD index over the classes.

    Needs a hundred held-out images; with none it searches on the received rows.

    Deviations: the published weights are for patterns of 0 to 255 and one size of image; here they
    are relative to the mask's size, and the weight of all together moves as Neural Cleanse's does
    (the paper's appendix moves each). The paper's score has a term from an explanation method;
    here it is the probability of the class that the patch reaches alone.
    """

    name = "tabor"
    Options = TaborOptions
    needs = "held-out images (100), or else the received rows"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 60, "images": 100, "batch": 50}

    def __init__(self, options: TaborOptions) -> None:
        self.options: TaborOptions = options

    def caution(self, view: DefenderView) -> str | None:
        return rows_in_their_place(view)

    def inspect(self, view: DefenderView) -> Inspection:
        known = known_images(view)
        patches = invert_triggers(
            view.victim,
            known,
            view.classes,
            self.options,
            view.generator(self.name),
            lambda draft: penalties(draft, self.options),
        )
        anomaly = anomaly_index(-doubts(view, known, patches))
        highest = float(anomaly.max())
        return Inspection(
            statistic=highest, alarm=highest > self.options.threshold, anomaly=anomaly
        )


def penalties(draft: Draft, options: TaborOptions) -> Tensor:
    """The four penalties of each patch, weighted, ``(A,)``; elastic nets are L1 plus L2 squared."""
    masks, outside = draft.masks, (1 - draft.masks) * draft.patterns
    size = _elastic(masks) + options.outside * _elastic(outside)
    rough = options.scattered * (variation(masks) + variation(outside))
    bare = (1 - masks[:, None]) * draft.images
    blocked, _ = draft.losses(bare, draft.labels.expand(len(masks), -1))
    alone, _ = draft.losses((masks * draft.patterns)[:, None], draft.numbers[:, None])
    return size + rough + options.blocking * blocked + options.overlaying * alone


def variation(values: Tensor) -> Tensor:
    """Sum of squared differences between neighbours, ``(A,)``, of ``(A, C, H, W)``."""
    down, across = values.diff(dim=2), values.diff(dim=3)
    return down.square().flatten(1).sum(dim=1) + across.square().flatten(1).sum(dim=1)


@torch.no_grad()
def doubts(view: DefenderView, known: Batch, patches: Patches) -> Tensor:
    """How unlike a trigger each class's patch is, ``(K,)``: larger is more innocent."""
    side = known.images.shape[-1]
    found = []
    for number in range(view.classes):
        mask, pattern = patches.masks[number], patches.patterns[number]
        others = known.rows(torch.nonzero(known.labels != number)[:, 0])
        hidden = (1 - mask) * others.images
        sent = predict(view.victim, stamped(others.images, mask, pattern)) == number
        kept = predict(view.victim, hidden) == others.labels
        alone = view.victim((mask * pattern)[None]).softmax(dim=1)[0, number]
        works = [sent.double().mean(), kept.double().mean(), alone.double()]
        terms = [mask.sum() / side**2, variation(mask[None])[0] / (side * (side - 1))]
        logs = [term.double().clamp(min=_LEAST).log() for term in terms]
        found.append(sum(logs) - sum(part.clamp(min=_LEAST).log() for part in works))
    return torch.stack([torch.as_tensor(value) for value in found])


def _elastic(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    return flat.abs().sum(dim=1) + flat.square().sum(dim=1)
