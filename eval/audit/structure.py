"""What a set's values show without any training: information, and no alarm by itself."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ...distill.files.artifact import pixel_range
from ...distill.types import DistilledSet, hard_labels

_ROUNDING: Final = 1e-3
_SAME: Final = 1e-3
"""Root mean square of a pixel's difference, in pixel units, below which two rows are the same."""


def structure_notes(distilled: DistilledSet) -> list[str]:
    """What is unusual about the pixels, labels and rows of a set, a sentence each."""
    images, labels = distilled.batch.images, distilled.batch.labels
    found = (_outside(images), _no_distribution(labels), _duplicates(images), _uneven(distilled))
    return [note for note in found if note]


def _outside(images: Tensor) -> str | None:
    low, high = pixel_range(images)
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return None
    share = float(((images < 0) | (images > 1)).double().mean())
    return (
        f"{share:.0%} of its pixels are outside [0, 1] ({low:.2f} to {high:.2f}): usual for "
        "distilled sets; no file of pictures can hold them"
    )


def _no_distribution(labels: Tensor) -> str | None:
    """Soft labels that are negative, or do not add up to 1."""
    if labels.ndim == 1:
        return None
    wrong = (labels.sum(dim=1) - 1).abs() > 0.01
    wrong |= (labels < -_ROUNDING).any(dim=1)
    if not bool(wrong.any()):
        return None
    return f"the labels of {int(wrong.sum())} of {len(labels)} rows are no probabilities"


def _duplicates(images: Tensor) -> str | None:
    """Rows that are the same as an earlier one."""
    rows = images.flatten(1).double()
    distances = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    earlier = torch.ones_like(distances, dtype=torch.bool).tril(-1)
    count = int(((distances < _SAME) & earlier).any(dim=1).sum())
    return f"{count} of {len(rows)} rows are the same as an earlier one" if count else None


def _uneven(distilled: DistilledSet) -> str | None:
    """Classes with more rows than others."""
    counts = hard_labels(distilled.batch.labels).bincount(minlength=len(distilled.classes))
    fewest, most = int(counts.min()), int(counts.max())
    return f"classes have {fewest} to {most} rows" if fewest != most else None
