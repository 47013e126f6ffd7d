"""What the defenses of a set share: its classes one by one, and which of them stands out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import DefenderView

# 1 / the 75 % quantile of the standard normal: makes the MAD a deviation.
_MAD = 1.4826
_MEAN = 1.2533  # the square root of π / 2 does the same for the mean absolute deviation
_NOTHING = 1e-9


def classes_of(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every class that ``labels`` (N,) hold, with its rows."""
    for label in labels.unique().tolist():
        yield int(label), torch.nonzero(labels == label)[:, 0]


def smallest_class(view: DefenderView) -> int:
    """How many rows the smallest of the set's classes has; classes without rows don't count."""
    counts = torch.bincount(view.labels)
    return int(counts[counts > 0].min())


def anomaly_index(values: Tensor) -> Tensor:
    """How many deviations each value lies above the median: ``(x − median) / (1.4826 · MAD)``.

    One-sided: below the median is no anomaly. Where more than half of the values are equal the MAD
    is 0; then it is the mean absolute deviation, times 1.2533, that measures (Iglewicz and Hoaglin,
    1993), and values that are all equal are no anomaly.
    """
    apart = (values - values.median()).abs()
    spread = _MAD * apart.median()
    if float(spread) <= _NOTHING * float(1 + values.abs().max()):
        spread = _MEAN * apart.mean()
    if float(spread) == 0:
        return torch.zeros_like(values)
    return (values - values.median()) / spread


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
