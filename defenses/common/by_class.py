"""The classes of a set: their rows, and which class is an outlier."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import DefenderView

# 1 / the 75 % quantile of the standard normal: makes the MAD a standard deviation.
_MAD = 1.4826
_MEAN = 1.2533  # the square root of π / 2 does the same for the mean absolute deviation
_NEGLIGIBLE = 1e-9
LEAST_CLASSES = 3
"""The anomaly index of two values is always 0.674, so it needs three."""


def classes_of(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each class in ``labels`` (N,), with its row numbers."""
    for label in labels.unique().tolist():
        yield int(label), torch.nonzero(labels == label)[:, 0]


def smallest_class(view: DefenderView) -> int:
    """The number of rows in the set's smallest class; classes without rows do not count."""
    counts = torch.bincount(view.labels)
    return int(counts[counts > 0].min())


def median(values: Tensor) -> Tensor:
    """The median along the first dimension. That of an even count is the mean of the two middle
    values, as in numpy and the papers' codes; ``Tensor.median`` takes the lower one."""
    ordered, count = values.sort(dim=0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def anomaly_index(values: Tensor) -> Tensor:
    """How many deviations each value lies above the median: ``(x − median) / (1.4826 · MAD)``.

    One-sided: values below the median have a negative index. If more than half of the values are
    equal, the MAD is 0 and the mean absolute deviation times 1.2533 takes its place (Iglewicz and
    Hoaglin, 1993). Values that are all equal have index 0.
    """
    centre = median(values)
    apart = (values - centre).abs()
    spread = _MAD * median(apart)
    if float(spread) <= _NEGLIGIBLE * float(1 + values.abs().max()):
        spread = _MEAN * apart.mean()
    if float(spread) == 0:
        return torch.zeros_like(values)
    return (values - centre) / spread


def classes_needed(view: DefenderView, least: int = LEAST_CLASSES) -> str | None:
    """Why a defense that compares ``least`` classes or more is not applicable, or ``None``."""
    return None if view.classes >= least else f"needs {least} classes, there are {view.classes}"


def rows_needed(view: DefenderView, least: int) -> str | None:
    """Why a defense that needs ``least`` rows in every class is not applicable, or ``None``."""
    found = smallest_class(view)
    if found >= least:
        return None
    return f"needs {least} rows in every class, the smallest has {found}"


def fewest_held_out(view: DefenderView) -> int:
    """The number of held-out images of the class with the fewest."""
    return int(torch.bincount(view.holdout.labels, minlength=view.classes).min())


def held_out_needed(view: DefenderView, least: int) -> str | None:
    """Why a defense that needs ``least`` held-out images of every class is not applicable, or
    ``None``."""
    found = fewest_held_out(view)
    if found >= least:
        return None
    return f"needs {least} held-out images of every class, one has {found}"
