"""The defense ``activation-clustering``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from ...distill.training import fit, predict
from ...distill.types import RunError
from ..base import DefenderView, DefenseOptions, SetScorer, SetScores, single_largest
from ..common.by_class import classes_of, rows_needed, smallest_class

_SILHOUETTE_ROWS = 20_000  # the silhouette compares all pairs of rows

Array = npt.NDArray[np.float64]
Reduction = Literal["ica", "pca"]
Analysis = Literal["silhouette", "size"]
# As in the Adversarial Robustness Toolbox, whose thresholds are compared with rounded figures.
_SIZE_DIGITS, _SILHOUETTE_DIGITS = 2, 4
_ICA_STEPS, _ICA_TOLERANCE = 1000, 0.005


@final
class ActivationClusteringOptions(DefenseOptions):
    """The paper's ICA to ten dimensions; both thresholds are those of the authors' toolbox."""

    reduction: Reduction = Field("ica", description="ica (the paper's) or pca")
    components: int = Field(10, ge=1, description="dimensions that activations are reduced to")
    analysis: Analysis = Field(
        "silhouette", description="test of the smaller cluster: its size, or the silhouette too"
    )
    silhouette: float = Field(
        0.1, ge=-1, le=1, description="silhouette above which a class has two clusters"
    )
    size: float = Field(
        0.35, gt=0, le=0.5, description="share below which the smaller cluster is suspicious"
    )
    reclassification: bool = Field(
        False, description="clear clusters whose label a network trained without them predicts"
    )
    acquittal: float = Field(
        1.0, gt=0, description="ratio of rows predicted as their label that clears a cluster"
    )


@final
class ActivationClustering(SetScorer):
    """Activation clustering: a poisoned class splits into a large and a small cluster (Chen et al.,
    "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI at AAAI
    2019).

    In words: reduce the penultimate activations of each class to ten independent components and
    cluster them by 2-means. A class is poisoned if the clusters are separate (a silhouette above
    0.1) and the smaller one holds less than 35 % of the rows: that cluster is the poison. With
    ``reclassification`` (the paper's exclusionary reclassification) a network trained without these
    clusters classifies them, and clears a cluster if more of its rows get their own label than any
    other one.

    Needs three rows in a class to be defined. Ten rows have at most nine components, in which any
    two clusters look separate.
    A row's score is ours, since the paper only flags: how much nearer it is to the centre of the
    smaller cluster than to that of the larger one, relative to the sum of both distances, times its
    class's silhouette. The set's statistic is the highest silhouette of a class with a small
    cluster.

    The paper names three analyses (size, silhouette, reclassification) without one setting for all.
    The thresholds, their rounding and the stopping rule of ICA are those of the authors' own
    implementation, the Adversarial Robustness Toolbox (``ClusteringAnalyzer``), which by default
    uses PCA and flags the smaller cluster of every class. trojanzoo's silhouette analysis has the
    same thresholds; BackdoorBench and backdoor-toolbox use the size alone (``analysis="size"``; the
    latter with PCA).

    Deviations: the silhouette of more than 20,000 rows is that of 20,000 of them. With
    ``analysis="size"`` the statistic is still the silhouette, and any flagged cluster is an alarm.
    """

    name = "activation-clustering"
    names_class = True
    Options = ActivationClusteringOptions
    options: ActivationClusteringOptions
    needs = "3 rows in every class, about 50 for a meaningful result"

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return rows_needed(view, 3)

    def caution(self, view: DefenderView) -> str | None:
        found, components = smallest_class(view), self.options.components
        if found >= 5 * components:
            return None
        return (
            f"{found} rows in a class for {components} components: any two clusters look separate"
        )

    def score_set(self, view: DefenderView) -> SetScores:
        options = self.options
        features = view.features(view.distilled.batch.images).double()
        rows = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        silhouettes: dict[int, float] = {}
        suspected: dict[int, Tensor] = {}
        for label, members in classes_of(view.labels):
            state = view.seed(self.name, label)
            own = features[members].cpu().numpy()
            reduced = reduce(own, options.reduction, options.components, state)
            smaller, nearness, silhouette = divide(reduced, state)
            rows[members] = silhouette * torch.from_numpy(nearness).to(rows.device)
            if is_small(smaller, options.size):
                silhouettes[label] = round(silhouette, _SILHOUETTE_DIGITS)
                if options.analysis == "size" or is_separate(silhouette, options.silhouette):
                    suspected[label] = members[torch.from_numpy(smaller).to(rows.device)]
        if options.reclassification and suspected:
            suspected = not_cleared(view, suspected, options.acquittal, self.name)
        flagged = torch.zeros_like(rows, dtype=torch.bool)
        for some in suspected.values():
            flagged[some] = True
        by_class = torch.tensor([silhouettes.get(label, -1.0) for label in range(view.classes)])
        return SetScores(
            rows=rows,
            flagged=flagged,
            statistic=float(by_class.max()),
            alarm=bool(suspected),
            suspect=single_largest(by_class),
        )


def is_small(smaller: npt.NDArray[np.bool_], size: float) -> bool:
    """Whether the ``smaller`` cluster (n,) has rows, but less than a share ``size``, rounded."""
    return bool(smaller.any()) and round(float(smaller.mean()), _SIZE_DIGITS) < size


def is_separate(silhouette: float, threshold: float) -> bool:
    """Whether the rounded ``silhouette`` of two clusters is above ``threshold``."""
    return round(silhouette, _SILHOUETTE_DIGITS) > threshold


def not_cleared(
    view: DefenderView, suspected: Mapping[int, Tensor], acquittal: float, name: str
) -> dict[int, Tensor]:
    """The ``suspected`` clusters (rows by class) that exclusionary reclassification does not clear.

    A network trained on all other rows classifies each cluster. The cluster is cleared if the rows
    that get their own label are more than ``acquittal`` times those that get the most frequent
    other one.
    """
    batch = view.distilled.batch
    kept = torch.ones(len(batch), dtype=torch.bool, device=view.labels.device)
    for rows in suspected.values():
        kept[rows] = False
    network = view.network(view.seed(name, "reclassification"))
    others = batch.rows(torch.nonzero(kept)[:, 0])
    generator = view.generator(name, "reclassification", "training")
    network = fit(network, others, view.distilled.recipe.by_epochs(), generator)
    remaining = {}
    for label, rows in suspected.items():
        found = predict(network, batch.images[rows])
        counts = torch.bincount(found, minlength=view.classes)
        own, counts[label] = int(counts[label]), 0
        if own <= acquittal * int(counts.max()):
            remaining[label] = rows
    return remaining


def reduce(features: Array, reduction: Reduction, components: int, state: int) -> Array:
    """``features`` (n, F) in ``components`` dimensions, or as many as the n rows allow.

    Errors: ``RunError`` where ICA finds no components.
    """
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning

    count = min(components, len(features) - 1, features.shape[1], _rank(features))
    if count < 1:
        return np.zeros((len(features), 1))
    if reduction == "pca":
        return np.asarray(PCA(count, svd_solver="full").fit_transform(features))
    with warnings.catch_warnings():
        # Two Gaussian components have no unique independent axes; any rotation is valid.
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver = "eigh" if len(features) > features.shape[1] else "svd"
        ica = FastICA(
            count,
            whiten="unit-variance",
            whiten_solver=solver,
            max_iter=_ICA_STEPS,
            tol=_ICA_TOLERANCE,
            random_state=state,
        )
        with np.errstate(all="ignore"):
            found = np.asarray(ica.fit_transform(features))
    if not np.isfinite(found).all():
        raise RunError(
            f"ICA finds no {count} independent components in the {len(features)} rows of a class, "
            "whose features hardly vary: choose reduction=pca or fewer components"
        )
    return found


def _rank(features: Array) -> int:
    """The number of directions in which ``features`` (n, F) vary."""
    centred = features - features.mean(axis=0)
    tall = len(centred) > centred.shape[1]
    values = np.linalg.eigvalsh(centred.T @ centred if tall else centred @ centred.T)
    return int((values > 1e-10 * max(float(values[-1]), 1e-30)).sum())


def divide(reduced: Array, state: int) -> tuple[npt.NDArray[np.bool_], Array, float]:
    """2-means of ``reduced`` (n, k): the rows of the smaller cluster; how much nearer each row is
    to its centre, −1 to 1; the silhouette (0 if all rows are equal)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if np.ptp(reduced, axis=0).max() == 0:
        return np.zeros(len(reduced), dtype=bool), np.zeros(len(reduced)), 0.0
    clusters = KMeans(2, n_init=10, random_state=state).fit(reduced)
    labels = clusters.labels_
    small = int((labels == 1).mean() < 0.5)
    to_small, to_large = clusters.transform(reduced)[:, [small, 1 - small]].T
    nearness = (to_large - to_small) / (to_large + to_small)
    rows = min(len(reduced), _SILHOUETTE_ROWS)
    if rows == len(reduced):
        return labels == small, nearness, float(silhouette_score(reduced, labels))
    some = silhouette_score(reduced, labels, sample_size=rows, random_state=state)
    return labels == small, nearness, float(some)
