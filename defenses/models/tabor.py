"""TABOR: Neural Cleanse with a better idea of what a trigger looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from ...distill.training import predict
from ...distill.types import Batch
from ..base import DefenderView, Inspection, Inspector
from ..common.by_class import anomaly_index, classes_needed
from ..common.held_out import known_images, rows_in_their_place
from ..common.trigger_inversion import Draft, InversionOptions, Patches, invert_triggers, stamped
from .neural_cleanse import cautions, flagged_by_chance

_LEAST = 1e-3  # keeps logarithms finite


@final
class TaborOptions(InversionOptions):
    """The search's are Neural Cleanse's; the weights are those of the public codes.

    They are for patterns in [0, 1] and sums over the image. ``cost`` multiplies all of them: at 1
    they are what the codes have.
    """

    cost: float = Field(1.0, gt=0, description="first common factor of the weights")
    size: float = Field(1e-6, ge=0, description="weight of the mask's size")
    outside: float = Field(1e-5, ge=0, description="weight of the pattern outside the mask")
    scattered: float = Field(1e-7, ge=0, description="weight of the mask's roughness")
    scattered_outside: float = Field(1e-8, ge=0, description="weight of roughness outside the mask")
    blocking: float = Field(0.0, ge=0, description="weight of images that the mask spoils")
    overlaying: float = Field(1e-2, ge=0, description="weight of a pattern that fails alone")
    threshold: float = Field(2.0, gt=0, description="anomaly index from which a class is flagged")


@final
class Tabor(Inspector):
    """TABOR (Guo, Wang, Xing, Du, Song, "TABOR: A Highly Accurate Approach to Inspecting and
    Restoring Trojan Backdoors in AI Systems", 2019; ICDM 2020).

    In words: Neural Cleanse's search with four more penalties: patches that are large or leave
    something outside their mask, that are scattered, that hide what images show (blocking), that
    don't work alone (overlaying). A class is judged by size, smoothness and how well its patch
    works, in logarithms, and the MAD index over the classes.

    Needs a hundred held-out images; with none it searches on the received rows. Needs three
    classes: of two, the index is always 0.67.

    The authors published no code. The weights are those of two public codes, UsmannK/TABOR and
    ain-soph/trojanzoo, which name the same six; blocking counts nothing with them. The first
    applies them to patterns of 0 to 255, the second to patterns in [0, 1], as here.

    Deviations: all weights move together, from 0 on, by Neural Cleanse's rules (the paper's
    appendix moves each, the first code none). The paper's score has a term from an explanation
    method; here it is the probability of the class that the patch reaches alone. In the score the
    mask counts as it is, not as pixels on and off.
    """

    name = "tabor"
    Options = TaborOptions
    needs = "held-out images (100), or else the received rows"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 60, "images": 100, "batch": 50}

    def __init__(self, options: TaborOptions) -> None:
        self.options: TaborOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return classes_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return cautions(
            rows_in_their_place(view), flagged_by_chance(view.classes, self.options.threshold)
        )

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
    """The penalties of each patch, weighted, ``(A,)``; elastic nets are L1 plus L2 squared."""
    masks, outside = draft.masks, (1 - draft.masks) * draft.patterns
    total = options.size * _elastic(masks) + options.outside * _elastic(outside)
    total = total + options.scattered * variation(masks)
    total = total + options.scattered_outside * variation(outside)
    if options.blocking:
        bare = (1 - masks[:, None]) * draft.images
        blocked, _ = draft.losses(bare, draft.labels.expand(len(masks), -1))
        total = total + options.blocking * blocked
    if options.overlaying:
        alone, _ = draft.losses((masks * draft.patterns)[:, None], draft.numbers[:, None])
        total = total + options.overlaying * alone
    return total


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
