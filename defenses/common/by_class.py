"""What the defenses of a set share: its classes one by one, and which of them stands out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import DefenderView

# 1 / the 75 % quantile of the standard normal: makes the MAD a deviation.
_MAD = 1.4826
_MEAN = 1.2533  # the square root of π / 2 does the same for the mean absolute deviation
_NOTHING = 1e-9
LEAST_CLASSES = 3
"""The anomaly index of two values is always 0.674: it says nothing about either of them."""


def classes_of(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every class that ``labels`` (N,) hold, with its rows."""
    for label in labels.unique().tolist():
        yield int(label), torch.nonzero(labels == label)[:, 0]


def smallest_class(view: DefenderView) -> int:
    """How many rows the smallest of the set's classes has; classes without rows don't count."""
    counts = torch.bincount(view.labels)
    return int(counts[counts > 0].min())


def middle(values: Tensor) -> Tensor:
    """The median along the first dimension, of an even count the mean of the two middle values.

    ``Tensor.median`` takes the lower of the two; the papers' codes (numpy) take their mean.
    """
    ordered, count = values.sort(dim=0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def anomaly_index(values: Tensor) -> Tensor:
    """How many deviations each value lies above the median: ``(x − median) / (1.4826 · MAD)``.

    One-sided: below the median is no anomaly. Where more than half of the values are equal the MAD
    is 0; then it is the mean absolute deviation, times 1.2533, that measures (Iglewicz and Hoaglin,
    1993), and values that are all equal are no anomaly.
    """
    centre = middle(values)
    apart = (values - centre).abs()
    spread = _MAD * middle(apart)
    if float(spread) <= _NOTHING * float(1 + values.abs().max()):
        spread = _MEAN * apart.mean()
    if float(spread) == 0:
        return torch.zeros_like(values)
    return (values - centre) / spread


def classes_needed(view: DefenderView, least: int = LEAST_CLASSES) -> str | None:
    """The objection of a defense whose statistic compares classes, and wants ``least`` of them."""
    return None if view.classes >= least else f"needs {least} classes, there are {view.classes}"


def rows_needed(view: DefenderView, least: int) -> str | None:
    """The objection of a defense that wants ``least`` rows in every class."""
    found = smallest_class(view)
    if found >= least:
        return None
    return f"needs {least} rows in every class, the smallest has {found}"


def fewest_held_out(view: DefenderView) -> int:
    """How many held-out images the class has that has the fewest."""
    return int(torch.bincount(view.holdout.labels, minlength=view.classes).min())


def held_out_needed(view: DefenderView, least: int) -> str | None:
    """The objection of a defense that wants ``least`` held-out images of every class."""
    found = fewest_held_out(view)
    if found >= least:
        return None
    return f"needs {least} held-out images of every class, one has {found}"
