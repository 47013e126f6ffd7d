"""The defense ``scan``."""

from __future__ import annotations

import math
from typing import Literal, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..base import DefenderView, DefenseOptions, SetScorer, SetScores, single_largest
from ..common.by_class import (
    anomaly_index,
    classes_needed,
    classes_of,
    held_out_needed,
    rows_needed,
    smallest_class,
)

_TOLERANCE, _MOST_STEPS = 1e-2, 100
Ratio = Literal["paper", "code"]


@final
class ScanOptions(DefenseOptions):
    """The paper's threshold and likelihood ratio."""

    ratio: Ratio = Field("paper", description="likelihood ratio: that of the paper or of the code")
    threshold: float = Field(math.exp(2), gt=0, description="anomaly index that is an alarm")
    dimensions: int = Field(
        64, ge=1, description="largest number of dimensions; each needs two held-out images"
    )


@final
class Scan(SetScorer):
    """SCAn: a test for each class, whether two groups of rows explain it better than one (Tang,
    Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
    Contamination Detection", USENIX Security 2021).

    In words: an activation is its class's identity plus a variation that all classes share; learn
    the covariances of both by expectation maximisation on clean images. Split each class of the set
    into two groups under that variation, and test by a likelihood ratio whether two groups explain
    the class better than one. A class with an outlying ratio (anomaly index above exp(2)) is
    contaminated, and its group with fewer clean images is the poison.

    Needs clean held-out images of every class (two for each dimension of the covariance), and three
    rows in a class.
    A row's score is ours: the difference of its squared distances, under the variation, to the
    means of the clean and of the other group. The set's statistic is the highest anomaly index.

    The published code (TDteach/Demon-in-the-Variant, ``pysrc/SCAn.py``, ``calc_test``; the same in
    Matlab, BackdoorBench and backdoor-toolbox) computes another ratio than the paper's. With one
    group, a class's identity is ``Su (n Su + Se)⁻¹ Σx``, as in its own ``build_global_model``; in
    the test the factor ``Su Se⁻¹`` is missing, which leaves ``Se (n Su + Se)⁻¹ Σx``: nearly 0.
    Its ratio then measures how far a class is from the mean of all classes rather than how much
    better two groups explain it. The default is the paper's; ``ratio="code"`` is the other.

    Deviations: activations are reduced by PCA to half as many dimensions as there are held-out
    images beyond one a class, since fewer images could not estimate the covariances, and to 64 at
    most, as many as the published code's networks have. The split is scikit-learn's 2-means on
    whitened activations, which is the official code's iteration with ten starts instead of one.
    Only the set's rows are split (BackdoorBench adds the clean images). The anomaly index is
    one-sided (the official code's is not). The variation is the Python code's; the Matlab code
    subtracts a class's first coordinate from all coordinates.
    """

    name = "scan"
    names_class = True
    Options = ScanOptions
    options: ScanOptions
    needs = "held-out images of every class (about 20 each), 3 rows in every class"
    in_reference_code = True

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return classes_needed(view) or held_out_needed(view, 2) or rows_needed(view, 3)

    def caution(self, view: DefenderView) -> str | None:
        found = smallest_class(view)
        return None if found >= 50 else f"{found} rows in a class: too few to test for two groups"

    def score_set(self, view: DefenderView) -> SetScores:
        clean, features = self._reduced(view)
        mean = clean.mean(dim=0)
        between, within = decompose(clean - mean, view.holdout.labels, view.classes)
        centred = features - features.mean(dim=0)
        rows = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        second = torch.zeros_like(rows, dtype=torch.bool)
        ratios = torch.zeros(view.classes, dtype=torch.float64)
        whitening = _inverse_root(within)
        for label, members in classes_of(view.labels):
            state = view.seed(self.name, label)
            own, known = centred[members], (clean - mean)[view.holdout.labels == label]
            rows[members], second[members] = two_groups(own @ whitening, known @ whitening, state)
            ratio = likelihood_ratio(own, second[members], between, within, self.options.ratio)
            ratios[label] = ratio
        index = anomaly_index(ratios)
        contaminated = index > self.options.threshold
        return SetScores(
            rows=rows,
            flagged=second & contaminated.to(second.device)[view.labels],
            statistic=float(index.max()),
            alarm=bool(contaminated.any()),
            suspect=single_largest(index),
        )

    def _reduced(self, view: DefenderView) -> tuple[Tensor, Tensor]:
        """The activations of the held-out images and of the set, in reduced dimensions."""
        from sklearn.decomposition import PCA

        clean = view.features(view.holdout.images).double()
        features = view.features(view.distilled.batch.images).double()
        most = (len(clean) - view.classes) // 2
        count = max(1, min(self.options.dimensions, most, features.shape[1], len(features)))
        state = view.seed(self.name, "projection")
        projection = PCA(count, random_state=state).fit(features.cpu().numpy())

        def reduced(activations: Tensor) -> Tensor:
            found = projection.transform(activations.cpu().numpy())
            return torch.from_numpy(found).to(features.device)

        return reduced(clean), reduced(features)


def decompose(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Covariances (F, F) of the classes' identities and of the variation within classes.

    features: centred, ``(n, F)``. Expectation maximisation as in the official code: the identity of
    a class is its posterior mean; its posterior variance is ignored.
    """
    counts = torch.bincount(labels, minlength=classes)
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    identities = sums / counts.clamp(min=1).unsqueeze(1)
    between, within = _covariances(features, identities[labels])
    for _ in range(_MOST_STEPS):
        for label in range(classes):
            mixed = counts[label] * between + within
            identities[label] = between @ torch.linalg.pinv(mixed, hermitian=True) @ sums[label]
        before = between, within
        between, within = _covariances(features, identities[labels])
        moved = sum(float((a - b).norm()) for a, b in zip(before, (between, within), strict=True))
        if moved < _TOLERANCE:
            break
    return between, within


def _covariances(features: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
    count = features.shape[1]
    return tuple(  # type: ignore[return-value]
        torch.cov(part.T).reshape(count, count) for part in (identities, features - identities)
    )


def _inverse_root(covariance: Tensor) -> Tensor:
    """``covariance^(−1/2)`` without null directions: ``rows @ result`` are whitened."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-10 * values.max()
    scale = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    root: Tensor = vectors * scale
    return root


def two_groups(whitened: Tensor, clean: Tensor, state: int) -> tuple[Tensor, Tensor]:
    """2-means of ``whitened`` (n, F); the group nearer to most ``clean`` rows (m, F) is the clean
    one. Returns scores ``(n,)`` and whether a row is in the other group, ``bool (n,)``."""
    from sklearn.cluster import KMeans

    points = whitened.cpu().numpy()
    if len(np.unique(points, axis=0)) < 2:
        zeros = torch.zeros(len(points), dtype=torch.float64, device=whitened.device)
        return zeros, zeros.bool()
    means = KMeans(2, n_init=10, random_state=state).fit(points).cluster_centers_
    centres = torch.from_numpy(means).to(whitened.device)
    distances, of_clean = (torch.cdist(each, centres).square() for each in (whitened, clean))
    second = int((of_clean[:, 0] < of_clean[:, 1]).double().mean() >= 0.5)
    scores = distances[:, 1 - second] - distances[:, second]
    return scores, scores > 0


def likelihood_ratio(
    features: Tensor, second: Tensor, between: Tensor, within: Tensor, ratio: Ratio = "paper"
) -> float:
    """How much better two means explain ``features`` (n, F) than one: the mean difference of
    squared Mahalanobis distances under ``within``; 0 if all are in one group.

    ratio: the one mean is ``Su (n Su + Se)⁻¹ Σx`` (paper) or ``Se (n Su + Se)⁻¹ Σx`` (code), Su
    the covariance ``between`` identities and Se the one ``within`` classes.
    """
    if bool(second.all()) or not bool(second.any()):
        return 0.0
    count = len(features)
    mixed = torch.linalg.pinv(count * between + within, hermitian=True)
    alone = (between if ratio == "paper" else within) @ mixed @ features.sum(dim=0)
    pair = torch.stack([features[~second].mean(dim=0), features[second].mean(dim=0)])
    root = _inverse_root(within)
    one = ((features - alone) @ root).square().sum(dim=1)
    two = ((features - pair[second.long()]) @ root).square().sum(dim=1)
    return float((one - two).mean())
