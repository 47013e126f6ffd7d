"""The defense ``tabor``."""

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
from ..common.held_out import known_images, known_images_caution
from ..common.trigger_inversion import (
    Candidates,
    InversionOptions,
    Patches,
    invert_triggers,
    stamped,
)
from .neural_cleanse import flagged_by_chance, joined

_LEAST = 1e-3  # keeps logarithms finite


@final
class TaborOptions(InversionOptions):
    """The search is Neural Cleanse's; the weights are those of the public codes.

    They are for patterns in [0, 1] and sums over the image. ``cost`` multiplies all of them; at 1
    they are those of the codes.
    """

    cost: float = Field(1.0, gt=0, description="first common factor of the weights")
    size: float = Field(1e-6, ge=0, description="weight of the mask's size")
    outside: float = Field(1e-5, ge=0, description="weight of the pattern outside the mask")
    scattered: float = Field(1e-7, ge=0, description="weight of the mask's roughness")
    scattered_outside: float = Field(1e-8, ge=0, description="weight of roughness outside the mask")
    blocking: float = Field(0.0, ge=0, description="weight of the loss with masked pixels black")
    overlaying: float = Field(1e-2, ge=0, description="weight of the loss on the patch alone")
    threshold: float = Field(2.0, gt=0, description="anomaly index above which a class is flagged")


@final
class Tabor(Inspector):
    """TABOR: Neural Cleanse with penalties for patches that are unlike a trigger (Guo, Wang, Xing,
    Du, Song, "TABOR: A Highly Accurate Approach to Inspecting and Restoring Trojan Backdoors in AI
    Systems", 2019; ICDM 2020).

    In words: Neural Cleanse's search with four more penalties, for patches that are large or have a
    pattern outside their mask, that are scattered, that hide what images show (blocking), or that
    do not work without an image (overlaying). The score of a class combines the logarithms of the
    size, smoothness and success of its patch; its anomaly is the MAD index over the classes.

    Needs a hundred held-out images; without any it uses the received rows. Needs three classes: for
    two the index is always 0.67.

    The authors published no code. The weights are those of two public codes, UsmannK/TABOR and
    ain-soph/trojanzoo, which have the same six; that of blocking is 0. The first applies them to
    patterns of 0 to 255, the second to patterns in [0, 1], as here.

    Deviations: all weights change together, from 0 on, by Neural Cleanse's rules (the paper's
    appendix changes each, the first code none). The paper's score has a term from an explanation
    method; here it is the probability of the class for the patch without an image. The score uses
    the mask's values, not pixels that are on or off.
    """

    name = "tabor"
    Options = TaborOptions
    options: TaborOptions
    needs = "100 held-out images (without any: the received rows)"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 60, "images": 100, "batch": 50}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return classes_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return joined(
            known_images_caution(view), flagged_by_chance(view.classes, self.options.threshold)
        )

    def inspect(self, view: DefenderView) -> Inspection:
        known = known_images(view)
        patches = invert_triggers(
            view.victim,
            known,
            view.classes,
            self.options,
            view.generator(self.name),
            lambda candidates: penalties(candidates, self.options),
        )
        anomaly = anomaly_index(-innocence(view, known, patches))
        highest = float(anomaly.max())
        return Inspection(
            statistic=highest, alarm=highest > self.options.threshold, anomaly=anomaly
        )


def penalties(candidates: Candidates, options: TaborOptions) -> Tensor:
    """The weighted penalties of each patch, ``(A,)``; an elastic net is L1 plus squared L2 norm."""
    masks = candidates.masks
    outside = (1 - masks) * candidates.patterns
    total = options.size * _elastic(masks) + options.outside * _elastic(outside)
    total = total + options.scattered * variation(masks)
    total = total + options.scattered_outside * variation(outside)
    if options.blocking:
        bare = (1 - masks[:, None]) * candidates.images
        blocked, _ = candidates.losses(bare, candidates.labels.expand(len(masks), -1))
        total = total + options.blocking * blocked
    if options.overlaying:
        patches = (masks * candidates.patterns)[:, None]
        alone, _ = candidates.losses(patches, candidates.numbers[:, None])
        total = total + options.overlaying * alone
    return total


def variation(values: Tensor) -> Tensor:
    """The sum of squared differences between neighbouring pixels of ``(A, C, H, W)``: ``(A,)``."""
    down, across = values.diff(dim=2), values.diff(dim=3)
    return down.square().flatten(1).sum(dim=1) + across.square().flatten(1).sum(dim=1)


@torch.no_grad()
def innocence(view: DefenderView, known: Batch, patches: Patches) -> Tensor:
    """How unlike a trigger the patch of each class is, ``(K,)``."""
    side = known.images.shape[-1]
    found = []
    for number in range(view.classes):
        mask, pattern = patches.masks[number], patches.patterns[number]
        others = known.rows(torch.nonzero(known.labels != number)[:, 0])
        hidden = (1 - mask) * others.images
        success = predict(view.victim, stamped(others.images, mask, pattern)) == number
        kept = predict(view.victim, hidden) == others.labels
        alone = view.victim((mask * pattern)[None]).softmax(dim=1)[0, number]
        effects = [success.double().mean(), kept.double().mean(), alone.double()]
        sizes = [mask.sum() / side**2, variation(mask[None])[0] / (side * (side - 1))]
        logs = [size.double().clamp(min=_LEAST).log() for size in sizes]
        found.append(sum(logs) - sum(effect.clamp(min=_LEAST).log() for effect in effects))
    return torch.stack([torch.as_tensor(value) for value in found])


def _elastic(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    return flat.abs().sum(dim=1) + flat.square().sum(dim=1)
