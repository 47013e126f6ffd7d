"""Choose in which space a received set is, and whether it is packed, on stated evidence."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor
from tqdm import tqdm

from ...distill.data.registry import ImageSet
from ...distill.files.packing import FACTORS, likeness, unpack, unpack_labels
from ...distill.files.spaces import (
    SPACES,
    PixelEvidence,
    certain_space,
    pixel_evidence,
    smoothness,
)
from ...distill.preprocessing import MAX_DIMENSIONS, Preprocessing
from ...distill.types import Batch, RequestError, hard_labels
from .small_victims import VICTIMS, SmallVictims

# The accuracy that a reading loses for statistics that are not the data's. Distilled images may be
# noisy and full of contrast, but their mean stays.
_SHIFT_COST: Final = 1.5  # for each deviation of the data between the means
_SPREAD_COST: Final = 0.15  # for each factor of 2 between the deviations
_SMOOTHNESS_COST: Final = 0.5  # for the difference of the correlations of neighbouring pixels
_CLEAR: Final = 0.1
"""How far the best reading must be ahead to be called clear."""
_LIKER: Final = 0.1
"""How much more a set must resemble packed means than plain ones to be tried as packed."""


@final
class DataSpaces:
    """The spaces of one data set: what networks do with pixels first in each, and pixels."""

    def __init__(self, data: ImageSet) -> None:
        self.plain = Preprocessing(data.mean, data.std)
        self._data = data
        self._whitened: Preprocessing | None = None

    def preprocessing(self, name: str) -> Preprocessing:
        """What networks do with pixels first if a set is in space ``name``.

        Errors: ``RequestError`` for "zca" and images too large for it.
        """
        if not SPACES[name].whitened:
            return self.plain
        if self._whitened is None:  # seconds for colour images: the matrix is made once
            data = self._data if self._data.zca is not None else self._data.whitened()
            self._whitened = data.preprocessing
        return self._whitened

    def pixels(self, name: str, values: Tensor) -> Tensor:
        """Stored ``values`` of space ``name`` in pixel space; errors as ``preprocessing``."""
        return SPACES[name].to_pixels(values.float(), self.preprocessing(name)).contiguous()

    def names(self) -> list[str]:
        """Those of ``SPACES`` that images of this size can be in."""
        small = math.prod(self._data.image_shape) <= MAX_DIMENSIONS
        return [name for name, space in SPACES.items() if small or not space.whitened]


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen space, or factor, with its reasons.

    accuracies: of the small victims by reading; empty if nothing had to be tried. evidence: of the
    pixels by space. notes: what was decided and why, a sentence each.
    """

    chosen: str
    notes: tuple[str, ...]
    accuracies: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, PixelEvidence] = field(default_factory=dict)


def choose_space(
    batch: Batch,
    spaces: DataSpaces,
    victims: SmallVictims,
    factor: int = 1,
    *,
    bars: bool = False,
) -> Choice:
    """The space of a set whose images are values as stored; ``factor``: by which it is packed.

    Some values are possible in one space only. Of several spaces the one counts in which the
    victims label clean images best, less a cost for pixels whose mean, deviation and smoothness are
    not the data's. Without clean images mean and deviation decide alone.
    Errors: ``RequestError`` for values that are possible in no space.
    """
    certain = certain_space(batch.images)
    if certain is not None:
        name, why = certain
        return Choice(chosen=name, notes=(f"{_read_as(name)}: {why}",))
    read = {
        name: unpacked(batch.replace(images=spaces.pixels(name, batch.images)), factor)
        for name in spaces.names()
    }
    evidence = {
        name: pixel_evidence(name, batch.images.float(), each.images, spaces.plain)
        for name, each in read.items()
    }
    possible = [name for name, seen in evidence.items() if not seen.impossible]
    if not possible:
        found = "; ".join(f"{name}: {seen.impossible}" for name, seen in evidence.items())
        raise RequestError(f"its values fit no known space ({found})")
    began, accuracies = time.monotonic(), dict[str, float]()
    if len(possible) > 1 and len(victims.clean):
        for name in tqdm(possible, desc="trying readings", unit="", disable=not bars):
            accuracies[name] = victims.accuracy(read[name], spaces.preprocessing(name))
    seconds = time.monotonic() - began
    smooth = smoothness(victims.clean.images) if len(victims.clean) else None
    scores = {name: accuracies.get(name, 0.0) - _cost(evidence[name], smooth) for name in possible}
    first, *others = sorted(scores, key=lambda name: -scores[name])
    notes = [f"{_read_as(first)}: {_why(evidence[first], accuracies, len(victims.clean), seconds)}"]
    if others and scores[first] - scores[others[0]] < _CLEAR:
        notes.append(f"{others[0]} is nearly as likely as {first}: --space NAME decides")
    return Choice(chosen=first, notes=tuple(notes), accuracies=accuracies, evidence=evidence)


def given_space(name: str) -> Choice:
    """The space that the user names. Errors: ``RequestError`` if there is none of that name."""
    if name not in SPACES:
        raise RequestError(f"unknown space {name!r}: there are auto, {', '.join(SPACES)}")
    return Choice(chosen=name, notes=(f"{_read_as(name)}, as given",))


def likely_factor(batch: Batch, clean: Batch, classes: int) -> int:
    """By which factor a set seems to be packed, from the mean image of each class; 1: it is not.

    batch: values as stored. clean: real images, with all ``classes``; without, 1 is the answer.
    """
    height, width = batch.images.shape[2:]
    counts = clean.labels.bincount(minlength=classes)
    if height != width or not counts.all():
        return 1
    means = torch.stack(
        [clean.images[clean.labels == label].mean(dim=0) for label in range(classes)]
    )
    labels = hard_labels(batch.labels)
    found = {
        factor: likeness(batch.images.float(), labels, means, factor) for factor in (1, *FACTORS)
    }
    best = max(found, key=lambda factor: found[factor])
    return best if found[best] > found[1] + _LIKER else 1


def choose_factor(
    batch: Batch, preprocessing: Preprocessing, victims: SmallVictims, factor: int
) -> Choice:
    """``factor`` or 1, whichever gives the better victims; ``batch``: in pixel space, as stored."""
    stored = victims.accuracy(batch, preprocessing)
    cut = victims.accuracy(unpacked(batch, factor), preprocessing)
    accuracies = {"as stored": stored, f"factor {factor}": cut}
    figures = (
        f"small victims reach {cut:.3f} on the smaller images, {stored:.3f} on the stored ones"
    )
    if cut < stored:
        note = f"not packed, though its mean images look so (factor {factor}): {figures}"
        return Choice(chosen="1", notes=(note,), accuracies=accuracies)
    note = f"{packed_note(factor, len(batch))}: {figures}"
    return Choice(chosen=str(factor), notes=(note,), accuracies=accuracies)


def unpacked(batch: Batch, factor: int) -> Batch:
    """The smaller images of a packed set, at full size, with their labels."""
    if factor == 1:
        return batch
    return Batch(images=unpack(batch.images, factor), labels=unpack_labels(batch.labels, factor))


def packed_note(factor: int, count: int) -> str:
    """What a reader should know of ``count`` packed images."""
    pieces = factor**2
    return f"each image packs {pieces}: cut and enlarged, they are {pieces * count} images"


def _read_as(name: str) -> str:
    return f"read as {name} ({SPACES[name].description})"


def _cost(seen: PixelEvidence, smooth: float | None) -> float:
    """What statistics that are not the data's cost a reading; smooth: the data's smoothness."""
    cost = _SHIFT_COST * seen.shift + _SPREAD_COST * abs(math.log2(seen.spread))
    return cost if smooth is None else cost + _SMOOTHNESS_COST * abs(seen.smoothness - smooth)


def _why(seen: PixelEvidence, accuracies: Mapping[str, float], clean: int, seconds: float) -> str:
    if not accuracies:
        return (
            f"its mean lies {seen.shift:.2f} deviations from the data's, its deviation is "
            f"{seen.spread:.2f} times the data's"
        )
    ordered = sorted(accuracies.items(), key=lambda each: -each[1])
    figures = ", ".join(f"{name} {rate:.3f}" for name, rate in ordered)
    return (
        f"{VICTIMS} small victims of each reading have these accuracies on {clean} clean images: "
        f"{figures} ({seconds:.0f} s)"
    )
