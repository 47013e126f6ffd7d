"""Statistics as pure functions: the AUROC, and intervals of means, shares and AUROCs."""

from __future__ import annotations

import math
from typing import Final

from scipy import optimize, stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

FEWEST_VALUES: Final = 3
"""Fewer values have no interval."""
CALIBRATED: Final = 0.05
"""The false-positive rate that a calibrated threshold aims at."""
_EDGE: Final = 1e-9


def t_interval(mean: float, std: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Student's t) of the mean of ``count`` values; ``std`` with ddof 1."""
    half = float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return mean - half, mean + half


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval (Wilson, 1927) of a ``share`` of ``count`` independent answers.

    A seed whose victims differ counts as one answer, with its mean: the interval is then too wide
    rather than too narrow.
    """
    z = float(stats.norm.ppf(0.975))
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve of ``scores`` (N,); ``None`` where all are of one kind.

    positive: ``bool (N,)``.
    """
    if bool(positive.all()) or not bool(positive.any()):
        return None
    return float(roc_auc_score(positive.cpu().numpy(), scores.cpu().numpy()))


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float] | None:
    """The 95 % score interval of an AUROC of that many independent positives and negatives.

    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic",
    Statistics in Medicine 25 (2006), method 5: all areas whose own deviation (Hanley and McNeil's,
    with both counts replaced by their mean) reaches ``area``. Unlike a bootstrap interval it has a
    width at 0 and 1. ``None`` for fewer than three of either kind.
    """
    if min(positives, negatives) < FEWEST_VALUES:
        return None
    z, mean = float(stats.norm.ppf(0.975)), (positives + negatives) / 2 - 1

    def excess(theta: float) -> float:
        """How far ``area`` lies outside the interval around ``theta``; negative inside."""
        spread = theta * (1 - theta) / (positives * negatives)
        spread *= 1 + mean * (1 - theta) / (2 - theta) + mean * theta / (1 + theta)
        return (area - theta) ** 2 - z**2 * spread

    inside = min(max(area, _EDGE), 1 - _EDGE)  # the deviation at 0 and 1 is zero
    low = 0.0 if area <= 0 else float(optimize.brentq(excess, 0.0, inside))
    high = 1.0 if area >= 1 else float(optimize.brentq(excess, inside, 1.0))
    return low, high
