"""The defense ``spectre``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from ..base import DefenderView, DefenseOptions, SetScorer, SetScores
from ..common.by_class import LEAST_CLASSES, anomaly_index, classes_of, rows_needed, smallest_class

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_ROWS_PER_DIMENSION = 5  # for an estimate of the covariance
_LEAST_ROWS = 10
# Constants of the robust covariance in the official code: C and tau of the filter, the shift of its
# thresholds, and how many rows it may leave out, relative to the poisoned ones.
_C, _TAU, _SHIFT, _LEFT_OUT = 10.0, 0.1, 3.0, 2.0


@final
class SpectreOptions(DefenseOptions):
    """The official code's: alpha 4, ten numbers of dimensions up to 100."""

    poisoned_share: float = Field(
        0.1, gt=0, le=0.25, description="upper bound on a class's poisoned share"
    )
    margin: float = Field(1.5, ge=1, description="removed share / that bound")
    alpha: float = Field(
        4.0, ge=0, description="sharpness of the QUE score: 0 is the norm, ∞ the top direction"
    )
    dimensions: int = Field(100, ge=1, description="largest number of dimensions")
    tried: int = Field(10, ge=1, description="how many numbers of dimensions are tried")


@final
class Spectre(SetScorer):
    """SPECTRE: spectral filtering of a class after whitening it by its clean rows' covariance
    (Hayase, Kong, Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Covariance
    Estimation", ICML 2021; SewoongLab/spectre-defense, in Julia).

    In words: project the penultimate activations of each class on their top k directions. Estimate
    their covariance robustly: while squares of the whitened rows vary too much in one direction,
    leave out the outliers along it, at most twice as many rows as may be poisoned. Whiten by that
    covariance and score rows by QUE (quantum entropy), which is between the squared norm and the
    top direction. Of several k use the one with the highest contamination: that of the class, after
    whitening by the rows left after the removal. Remove 1.5 times the share that may be poisoned
    from the class with the highest contamination.

    Needs ten rows in a class to be defined, five for each dimension that it uses. The paper assumes
    that there is an attack: ``alarm`` is ``None``. A class's contamination is the official code's
    criterion for k, ``tr(Σ Q)``. The set's statistic is ours: the contaminations as an anomaly
    index over classes. Two classes have no such index: the rows are scored, and the statistic is 0.

    Deviations: k is at most a fifth of the class's rows (the official code stops with an error
    below 100 rows). Directions without variance are left out, and variances are at least a
    millionth of the largest one when whitening. The official code is given the target class and
    the number of poisoned rows; here the class is the most contaminated one and the share is an
    option.
    """

    name = "spectre"
    names_class = True
    Options = SpectreOptions
    options: SpectreOptions
    needs = f"{_LEAST_ROWS} rows in every class, about 50 for a meaningful result"
    in_reference_code = True
    quick: ClassVar[Mapping[str, Any]] = {"dimensions": 25, "tried": 4}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return rows_needed(view, _LEAST_ROWS)

    def caution(self, view: DefenderView) -> str | None:
        if view.classes < LEAST_CLASSES:
            return "two classes: the set's statistic is always 0"
        found = smallest_class(view)
        if found >= 10 * _ROWS_PER_DIMENSION:
            return None
        return f"{found} rows in a class: a covariance of at most {_most(found, 100)} dimensions"

    def score_set(self, view: DefenderView) -> SetScores:
        options = self.options
        features = view.features(view.distilled.batch.images).double().cpu().numpy()
        rows = np.zeros(len(features))
        contaminated = torch.zeros(view.classes, dtype=torch.float64)
        for label, members in classes_of(view.labels):
            index = members.cpu().numpy()
            rows[index], contaminated[label] = best_scores(features[index], options)
        suspect = int(contaminated.argmax())
        scores = torch.from_numpy(rows).to(view.labels.device)
        flagged = torch.zeros_like(scores, dtype=torch.bool)
        members = torch.nonzero(view.labels == suspect)[:, 0]
        order = scores[members].argsort(descending=True, stable=True)
        flagged[members[order[: _removed(len(members), options)]]] = True
        several = view.classes >= LEAST_CLASSES
        return SetScores(
            rows=scores,
            flagged=flagged,
            statistic=float(anomaly_index(contaminated).max()) if several else 0.0,
            alarm=None,
            suspect=suspect,
        )


def _most(rows: int, dimensions: int) -> int:
    return max(1, min(dimensions, rows // _ROWS_PER_DIMENSION))


def _removed(rows: int, options: SpectreOptions) -> int:
    return round(options.margin * options.poisoned_share * rows)


def best_scores(features: Array, options: SpectreOptions) -> tuple[Array, float]:
    """QUE scores ``(n,)`` of one class at the best number of dimensions, and its contamination."""
    count = len(features)
    projected = principal(features, _most(count, options.dimensions))
    most = projected.shape[1]
    if most < 1:
        return np.zeros(count), 0.0
    poisoned = round(options.poisoned_share * count)
    best, found = np.zeros(count), -np.inf
    for k in np.unique(np.round(np.linspace(1, np.sqrt(most), options.tried) ** 2).astype(int)):
        scores = quantum_scores(projected[:, :k], poisoned, options.alpha)
        left = projected[np.argsort(scores, kind="stable")[: count - _removed(count, options)]]
        covariance = np.cov(left.T).reshape(most, most)
        contamination = contaminated_by(whiten(projected, covariance), options.alpha)
        if contamination > found:
            best, found = scores, contamination
    return best, found


def principal(features: Array, most: int) -> Array:
    """Centred ``features`` (n, F) along their top directions, ``(n, k)``: ``most`` of them, or as
    many as have variance."""
    centred = features - features.mean(axis=0)
    if len(centred) > centred.shape[1]:  # the covariance is the smaller matrix
        squares, vectors = np.linalg.eigh(centred.T @ centred)
        values, directions = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1].T
        least = 1e-7  # smaller eigenvalues are rounding errors
    else:
        _, values, directions = np.linalg.svd(centred, full_matrices=False)
        least = 1e-9
    kept = min(most, int((values > least * max(float(values[0]), 1e-30)).sum()))
    projected: Array = centred @ directions[:kept].T
    return projected


def quantum_scores(projected: Array, poisoned: int, alpha: float) -> Array:
    """QUE scores ``(n,)`` of ``projected`` (n, k) after whitening by their robust covariance.

    One dimension needs no whitening: the scores are the squares.
    """
    if projected.shape[1] == 1:
        return np.square(projected[:, 0])
    kept = robust(projected, poisoned)
    return que(whiten(projected, np.cov(projected[kept].T, bias=True)), alpha)


def robust(points: Array, poisoned: int) -> Mask:
    """The rows of centred ``points`` (n, k) that a robust covariance uses, ``bool (n,)``.

    The filter of Diakonikolas et al. (2017) as in the official code. It ends when the rows left
    agree with a Gaussian, when there is no outlier, or when twice the number of ``poisoned`` rows
    have been left out.
    """
    kept = np.ones(len(points), dtype=bool)
    limit = round(_LEFT_OUT * poisoned)
    while limit > 0:
        found = within(points[kept], poisoned / len(points), limit)
        if found is None or bool(found.all()):
            break
        limit -= int((~found).sum())
        kept[kept] = found
    return kept


def within(points: Array, share: float, limit: int) -> Mask | None:
    """One step of the filter: which of ``points`` (n, k) are kept; ``None`` if it has ended.

    share: the poisoned share, below 1. limit: how many rows may be left out.
    """
    count, size = points.shape
    white = whiten(points, points.T @ points / count)
    norms = np.square(white).sum(axis=1)
    far = norms >= _C * size * math.log(count / _TAU)
    if far.any():
        usual: Mask = ~far
        return usual | _lowest(norms, count - limit)
    value, direction = top_variation(white)
    if value <= 1 + _C * share * math.log(1 / share) ** 2:
        return None
    scores = (np.einsum("ni,ij,nj->n", white, direction, white) - np.trace(direction)) / math.sqrt(
        2
    )
    apart = np.abs(scores - np.median(scores))
    beyond = np.sort(apart) - _SHIFT
    allowed = np.arange(1, count + 1) / count >= _tail(beyond, share)
    ends = np.flatnonzero((beyond > 0) & allowed)
    if not len(ends):
        return None
    inside: Mask = apart <= beyond[ends[0]]
    return inside | _lowest(apart, count - limit)


def _tail(beyond: Array, share: float) -> Array:
    """The official code's bound on the share of clean rows this far ``beyond``."""
    near = beyond <= 10 * math.log(1 / share)
    some = np.where(near, math.e, beyond)
    return np.where(near, 1.0, 3 * share / (some * np.log(some)) ** 2)


def _lowest(values: Array, count: int) -> Mask:
    """The ``count`` lowest of ``values``, and those equal to the highest of these."""
    if count <= 0:
        return np.zeros(len(values), dtype=bool)
    chosen: Mask = values <= np.partition(values, count - 1)[count - 1]
    return chosen


def top_variation(white: Array) -> tuple[float, Array]:
    """The direction in which squares of ``white`` (n, k) vary most: the largest eigenvalue of
    ``mean(z zᵀ) − i iᵀ``, where z (k²) holds the products of a row's entries and i the entries of
    the identity, and its eigenvector as a symmetric matrix (k, k) of norm 1."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    count, size = white.shape

    def multiply(flat: Array) -> Array:
        square = flat.reshape(size, size)
        weights = np.einsum("ni,ni->n", white @ square, white)
        found = (white * weights[:, None]).T @ white / count
        found[np.diag_indices(size)] -= np.trace(square)
        flattened: Array = found.ravel()
        return flattened

    if size == 1:
        return float(multiply(np.ones(1))[0]), np.ones((1, 1))
    # Not the identity as a start: it is nearly an eigenvector.
    start = np.ones(size * size)
    operator = LinearOperator((size * size, size * size), matvec=multiply, dtype=np.float64)
    value, vector = eigsh(operator, 1, which="LM", v0=start, tol=1e-12)
    square = vector[:, 0].reshape(size, size)
    return float(value[0]), (square + square.T) / 2


def whiten(points: Array, covariance: Array) -> Array:
    """``points`` (n, k) whitened by ``covariance``, with a lower bound on the variances."""
    values, vectors = np.linalg.eigh(covariance)
    floor = 1e-6 * max(float(values.max()), 1e-30)
    scaled: Array = points @ vectors / np.sqrt(np.maximum(values, floor))
    return scaled


def que(whitened: Array, alpha: float) -> Array:
    """QUE scores ``(n,)``: ``xᵀ Q x / tr Q``, Q = exp(α (Σ − I) / (‖Σ‖ − 1)), Σ the covariance of
    ``whitened`` (n, k). If ‖Σ‖ ≤ 1, Q is the identity."""
    _, vectors, weights = _entropy(whitened, alpha)
    scores: Array = ((whitened @ vectors) ** 2) @ weights
    return scores


def contaminated_by(whitened: Array, alpha: float) -> float:
    """The variance of ``whitened`` (n, k) weighted towards top directions: ``tr(Σ Q) / tr Q``."""
    values, _, weights = _entropy(whitened, alpha)
    return float(values @ weights)


def _entropy(whitened: Array, alpha: float) -> tuple[Array, Array, Array]:
    """Eigenvalues and eigenvectors of the covariance, and the eigenvalues of Q / tr Q."""
    covariance = np.cov(whitened.T).reshape(whitened.shape[1], whitened.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    excess = values[-1] - 1
    weights = np.exp(alpha * (values - 1) / excess) if excess > 1e-9 else np.ones_like(values)
    return values, vectors, weights / weights.sum()
