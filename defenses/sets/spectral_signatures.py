"""The defense ``spectral-signatures``."""

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
    """The paper's: 1.5 times an upper bound on the poisoned share is removed."""

    formula: Formula = Field("paper", description="scores: those of the paper or of the code")
    poisoned_share: float = Field(
        0.1, gt=0, lt=0.5, description="upper bound on a class's poisoned share"
    )
    margin: float = Field(1.5, ge=1, description="removed share / that bound")


@final
class SpectralSignatures(SetScorer):
    """Spectral signatures: poisoned rows are outliers along their class's top direction (Tran, Li,
    Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018).

    In words: centre the penultimate activations of each class and compute their top right singular
    vector. A row's score is the square of its activation along it; the highest scores are removed,
    1.5 times the share that may be poisoned (15 % by default).

    Needs two rows in a class to be defined, and far more clean rows than poisoned ones for a
    meaningful result. The removal of a fixed share is no alarm: ``alarm`` is ``None``.

    The published code (MadryLab/backdoor_data_poisoning, ``compute_corr.py``; the same in
    BackdoorBench) differs from the paper: it projects uncentred activations on that vector, takes
    absolute values, and removes rows above their 85th percentile. The default is the paper's
    formula; ``formula="code"`` is the other. The share of 15 % is that percentile.

    Deviations: the official code is given the target class, here the share is removed from every
    class. The set's statistic is ours, since the paper has none: the variance along a class's top
    direction, as an anomaly index over classes; ``suspect`` is the class with the highest. Two
    classes have no such index: the rows are scored, the statistic is 0 and ``suspect`` is ``None``.
    """

    name = "spectral-signatures"
    names_class = True
    Options = SpectralSignaturesOptions
    options: SpectralSignaturesOptions
    needs = "2 rows in every class, about 50 for a meaningful result"
    in_reference_code = True

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return rows_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        if view.classes < LEAST_CLASSES:
            return "two classes: the set's statistic is always 0"
        found = smallest_class(view)
        return None if found >= 50 else f"{found} rows in a class: any one may be its top direction"

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
    if len(centred) > centred.shape[1]:  # the covariance is the smaller matrix, and as accurate
        top = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    else:
        top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    squares = (centred @ top).square()
    scores = squares if formula == "paper" else (features @ top).abs()
    return scores, float(squares.mean())


def removed(rows: int, share: float, formula: Formula = "paper") -> int:
    """How many of a class's ``rows`` are removed: this ``share`` of them (paper), or those above
    the percentile 1 − ``share`` as numpy interpolates it (code)."""
    if formula == "paper":
        return round(share * rows)
    return rows - 1 - math.floor((1 - share) * (rows - 1) + 1e-9)
