"""SPECTRE: spectral filtering of a class after whitening it by its clean rows' covariance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from sklearn.covariance import MinCovDet

from .base import DefenderView, DefenseOptions, SetScorer, SetScores
from .by_class import anomaly_index, classes_of, rows_needed, smallest_class

Array = npt.NDArray[np.float64]

# The robust estimate of a covariance wants several rows for each dimension.
_ROWS_PER_DIMENSION = 5
_LEAST_ROWS = 10
_ROBUST_ROWS = 1000  # the determinant's search goes over all rows many times


@final
class SpectreOptions(DefenseOptions):
    """The paper's: alpha 4, up to 100 dimensions of which ten numbers are tried."""

    poisoned_share: float = Field(
        0.1, gt=0, le=0.25, description="upper bound on a class's poisoned share"
    )
    margin: float = Field(1.5, ge=1, description="removed share over that bound")
    alpha: float = Field(
        4.0, ge=0, description="sharpness of the QUE score: 0 norm, ∞ top direction"
    )
    dimensions: int = Field(100, ge=1, description="most dimensions")
    tried: int = Field(10, ge=1, description="how many numbers of dimensions are tried")


@final
class Spectre(SetScorer):
    """SPECTRE (Hayase, Kong, Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust
    Covariance Estimation", ICML 2021).

    In words: in each class project the penultimate activations on their k top directions, estimate
    mean and covariance robustly, whiten by them, and score rows by QUE (quantum entropy), between
    the norm and the top direction. Of several k take the one whose removal leaves the rest of the
    class looking most contaminated to what is left; remove 1.5 times the share that may be
    poisoned, in the class that looks most contaminated of all.

    Needs ten rows in a class to be defined, five for each dimension that it uses. The paper assumes
    that there is an attack: ``alarm`` is ``None``. The set's statistic: the classes' mean QUE score
    as an anomaly index over classes.

    Deviations: scikit-learn's minimum covariance determinant stands in for the paper's filter
    (Diakonikolas et al.), so k ends at a fifth of the class's rows; it bears nearly half of them as
    outliers, where the filter takes out twice the poisoned share; the robust mean is used too,
    and one dimension is whitened like the others. Of more than 1,000 rows, 1,000 drawn at random
    give the robust estimate.
    """

    name = "spectre"
    Options = SpectreOptions
    needs = f"{_LEAST_ROWS} rows in every class; means something from about 50 on"
    quick: ClassVar[Mapping[str, Any]] = {"dimensions": 25, "tried": 4}

    def __init__(self, options: SpectreOptions) -> None:
        self.options: SpectreOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return rows_needed(view, _LEAST_ROWS)

    def caution(self, view: DefenderView) -> str | None:
        found = smallest_class(view)
        if found >= 10 * _ROWS_PER_DIMENSION:
            return None
        return f"{found} rows in a class: a covariance of {_most(found, 100)} dimensions at most"

    def score_set(self, view: DefenderView) -> SetScores:
        options = self.options
        features = view.features(view.distilled.batch.images).double().cpu().numpy()
        rows = np.zeros(len(features))
        removed = options.margin * options.poisoned_share
        contaminated = torch.zeros(view.classes, dtype=torch.float64)
        for label, members in classes_of(view.labels):
            state = view.seed(self.name, label)
            index = members.cpu().numpy()
            rows[index], contaminated[label] = best_scores(features[index], options, removed, state)
        index_of = anomaly_index(contaminated)
        suspect = int(index_of.argmax())
        scores = torch.from_numpy(rows).to(view.labels.device)
        flagged = torch.zeros_like(scores, dtype=torch.bool)
        members = torch.nonzero(view.labels == suspect)[:, 0]
        order = scores[members].argsort(descending=True)
        flagged[members[order[: round(removed * len(members))]]] = True
        return SetScores(
            rows=scores,
            flagged=flagged,
            statistic=float(index_of.max()),
            alarm=None,
            suspect=suspect,
        )


def _most(rows: int, dimensions: int) -> int:
    return max(1, min(dimensions, rows // _ROWS_PER_DIMENSION))


def best_scores(
    features: Array, options: SpectreOptions, removed: float, state: int
) -> tuple[Array, float]:
    """QUE scores ``(n,)`` of one class at the best number of dimensions, and its contamination."""
    most = _most(len(features), options.dimensions)
    centred = features - features.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    most = min(most, int((values > 1e-9 * max(values[0], 1e-30)).sum()))
    if most < 1:
        return np.zeros(len(features)), 0.0
    projected = centred @ directions[:most].T
    count = round(removed * len(features))
    best, found = np.zeros(len(features)), -np.inf
    for k in np.unique(np.round(np.linspace(1, np.sqrt(most), options.tried) ** 2).astype(int)):
        scores = que(whiten(projected[:, :k], robust(projected[:, :k], state)), options.alpha)
        left = projected[np.argsort(scores)[: len(scores) - count]]
        seen = whiten(projected, (left.mean(axis=0), np.cov(left.T).reshape(most, most)))
        contamination = float(que(seen, options.alpha).mean())
        if contamination > found:
            best, found = scores, contamination
    return best, found


def robust(points: Array, state: int) -> tuple[Array, Array]:
    """Mean and covariance of most of ``points`` (n, k), by the minimum covariance determinant."""
    if len(points) > _ROBUST_ROWS:
        points = np.random.default_rng(state).choice(points, _ROBUST_ROWS, replace=False)
    with warnings.catch_warnings():
        # Dead units and few rows make the determinant vanish, or grow on the way; either is borne.
        warnings.simplefilter("ignore")
        found = MinCovDet(random_state=state).fit(points)
    return found.location_, found.covariance_


def whiten(points: Array, moments: tuple[Array, Array]) -> Array:
    """``points`` (n, k) with ``moments`` (mean, covariance) taken out; null directions stay low."""
    mean, covariance = moments
    values, vectors = np.linalg.eigh(covariance)
    floor = 1e-6 * max(float(values.max()), 1e-30)
    scaled: Array = (points - mean) @ vectors / np.sqrt(np.maximum(values, floor))
    return scaled


def que(whitened: Array, alpha: float) -> Array:
    """QUE scores ``(n,)``: ``xᵀ Q x / tr Q``, Q = exp(α (Σ − I) / (‖Σ‖ − 1)), Σ the covariance of
    ``whitened`` (n, k). Where nothing sticks out (‖Σ‖ ≤ 1) Q is the identity."""
    covariance = np.cov(whitened.T).reshape(whitened.shape[1], whitened.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    excess = values[-1] - 1
    weights = np.exp(alpha * (values - 1) / excess) if excess > 1e-9 else np.ones_like(values)
    scores: Array = ((whitened @ vectors) ** 2) @ (weights / weights.sum())
    return scores
