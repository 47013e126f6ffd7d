"""What the defenses of a set share: its classes one by one, and which of them stands out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import DefenderView

# 1 / the 75 % quantile of the standard normal: makes the MAD a deviation.
_MAD = 1.4826


def classes_of(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every class that ``labels`` (N,) hold, with its rows."""
    for label in labels.unique().tolist():
        yield int(label), torch.nonzero(labels == label)[:, 0]


def smallest_class(view: DefenderView) -> int:
    """How many rows the set's smallest class has; 0 where one has none."""
    return int(torch.bincount(view.labels, minlength=view.classes).min())


def anomaly_index(values: Tensor) -> Tensor:
    """How many deviations each value lies above the median: ``(x − median) / (1.4826 · MAD)``.

    One-sided: below the median is no anomaly. Where more than half of the values are equal the MAD
    is 0, and what is above them is compared with the values' own scale instead of being infinite.
    """
    median = values.median()
    spread = _MAD * (values - median).abs().median()
    floor = torch.finfo(values.dtype).eps ** 0.5 * (1 + values.abs().max())
    return (values - median) / spread.clamp(min=float(floor))


def rows_needed(view: DefenderView, least: int) -> str | None:
    """The objection of a defense that wants ``least`` rows in every class."""
    found = smallest_class(view)
    return (
        None if found >= least else f"needs {least} rows in every class, the smallest has {found}"
    )
