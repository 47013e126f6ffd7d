"""Spectral signatures: poisoned rows stand out along their class's strongest direction."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor

from .base import DefenderView, DefenseOptions, SetScorer, SetScores
from .by_class import anomaly_index, classes_of, rows_needed, smallest_class


@final
class SpectralSignaturesOptions(DefenseOptions):
    """The paper's: an upper bound on the poisoned share, of which half as much more is removed."""

    poisoned_share: float = Field(
        0.1, gt=0, lt=0.5, description="upper bound on a class's poisoned share"
    )
    margin: float = Field(1.5, ge=1, description="removed share over that bound")


@final
class SpectralSignatures(SetScorer):
    """Spectral signatures (Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS
    2018).

    In words: in each class centre the penultimate activations, take their top right singular
    vector, score a row by the square of its activation along it, and remove the highest scores,
    1.5 times the share that may be poisoned (15 % by default).

    Needs two rows in a class to be defined, and more rows than poisoned ones by far to mean
    anything. The removal of a fixed share is no alarm: ``alarm`` is ``None``.

    Deviations: the official code projects uncentred activations, takes absolute values and removes
    what lies above a percentile; here it is the paper's formula. The set's statistic is ours, since
    the paper has none: the variance along a class's top direction, as an anomaly index over
    classes; ``suspect`` is the class that it points at.
    """

    name = "spectral-signatures"
    Options = SpectralSignaturesOptions
    needs = "2 rows in every class; means something from about 50 on"

    def __init__(self, options: SpectralSignaturesOptions) -> None:
        self.options: SpectralSignaturesOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return rows_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        found = smallest_class(view)
        return None if found >= 50 else f"{found} rows in a class: any of them may be its direction"

    def score_set(self, view: DefenderView) -> SetScores:
        features = view.features(view.distilled.batch.images).double()
        rows = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        flagged = torch.zeros_like(rows, dtype=torch.bool)
        variances = torch.zeros(view.classes, dtype=torch.float64)
        removed = self.options.margin * self.options.poisoned_share
        for label, members in classes_of(view.labels):
            scores, variances[label] = signature(features[members])
            rows[members] = scores
            order = scores.argsort(descending=True)
            flagged[members[order[: round(removed * len(members))]]] = True
        index = anomaly_index(variances)
        return SetScores(
            rows=rows,
            flagged=flagged,
            statistic=float(index.max()),
            alarm=None,
            suspect=int(index.argmax()),
        )


def signature(features: Tensor) -> tuple[Tensor, float]:
    """Squared projections ``(n,)`` of centred ``features`` (n, F) on their top right singular
    vector, and the variance along it."""
    centred = features - features.mean(dim=0)
    if len(centred) > centred.shape[1]:  # the covariance is the smaller matrix, and as exact here
        top = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    else:
        top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    scores = (centred @ top).square()
    return scores, float(scores.mean())
