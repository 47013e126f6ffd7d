"""Spectral signatures: poisoned rows stand out along their class's strongest direction."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from ..base import DefenderView, DefenseOptions, SetScorer, SetScores, single_largest
from ..common.by_class import LEAST_CLASSES, anomaly_index, classes_of, rows_needed, smallest_class

Formula = Literal["paper", "code"]


@final
class SpectralSignaturesOptions(DefenseOptions):
    """The paper's: an upper bound on the poisoned share, of which half as much more is removed."""

    formula: Formula = Field(
        "paper", description="scores: the paper's, or as the published code computes them"
    )
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

    The published code (MadryLab/backdoor_data_poisoning, ``compute_corr.py``; the same in
    BackdoorBench) differs from the paper: it projects uncentred activations on that vector, takes
    absolute values, and removes what lies above their 85th percentile. The default is the paper's
    formula, ``formula="code"`` the other. The share of 15 % is that percentile.

    Deviations: the official code is given the target class, here every class loses the share; the
    set's statistic is ours, since the paper has none: the variance along a class's top direction,
    as an anomaly index over classes; ``suspect`` is the class that it points at. Two classes have
    no such index: the rows are scored all the same, the statistic is 0 and no class is suspect.
    """

    name = "spectral-signatures"
    names_class = True
    Options = SpectralSignaturesOptions
    needs = "2 rows in every class; means something from about 50 on"

    def __init__(self, options: SpectralSignaturesOptions) -> None:
        self.options: SpectralSignaturesOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return rows_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        if view.classes < LEAST_CLASSES:
            return "two classes: the set's statistic is always 0"
        found = smallest_class(view)
        return None if found >= 50 else f"{found} rows in a class: any of them may be its direction"

    def score_set(self, view: DefenderView) -> SetScores:
        options = self.options
        features = view.features(view.distilled.batch.images).double()
        rows = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        flagged = torch.zeros_like(rows, dtype=torch.bool)
        variances = torch.zeros(view.classes, dtype=torch.float64)
        for label, members in classes_of(view.labels):
            scores, variances[label] = signature(features[members], options.formula)
            rows[members] = scores
            count = removed(len(members), options.margin * options.poisoned_share, options.formula)
            order = scores.argsort(descending=True, stable=True)
            flagged[members[order[:count]]] = True
        several = view.classes >= LEAST_CLASSES
        index = anomaly_index(variances) if several else torch.zeros_like(variances)
        return SetScores(
            rows=rows,
            flagged=flagged,
            statistic=float(index.max()),
            alarm=None,
            suspect=single_largest(index) if several else None,
        )


def signature(features: Tensor, formula: Formula = "paper") -> tuple[Tensor, float]:
    """Scores ``(n,)`` of ``features`` (n, F) by their centred top right singular vector, and the
    variance along it.

    formula: squares of the centred projections (paper), or absolute uncentred projections (code).
    """
    centred = features - features.mean(dim=0)
    if len(centred) > centred.shape[1]:  # the covariance is the smaller matrix, and as exact here
        top = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    else:
        top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    squares = (centred @ top).square()
    scores = squares if formula == "paper" else (features @ top).abs()
    return scores, float(squares.mean())


def removed(rows: int, share: float, formula: Formula = "paper") -> int:
    """How many of a class's ``rows`` are removed: their ``share`` (paper), or those above the
    percentile that lets this share through, as numpy interpolates it (code)."""
    if formula == "paper":
        return round(share * rows)
    return rows - 1 - math.floor((1 - share) * (rows - 1) + 1e-9)
