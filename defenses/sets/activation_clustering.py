"""Activation clustering: a poisoned class falls into a large and a small cluster."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from torch import Tensor

from ...distill.training import fit, predict
from ..base import DefenderView, DefenseOptions, SetScorer, SetScores, single_largest
from ..common.by_class import classes_of, rows_needed, smallest_class

_SILHOUETTE_ROWS = 20_000  # it looks at all pairs of rows

Array = npt.NDArray[np.float64]
Reduction = Literal["ica", "pca"]
Analysis = Literal["silhouette", "size"]
# As in the Adversarial Robustness Toolbox, whose thresholds are compared with rounded figures.
_SIZE_DIGITS, _SILHOUETTE_DIGITS = 2, 4
_ICA_STEPS, _ICA_TOLERANCE = 1000, 0.005


@final
class ActivationClusteringOptions(DefenseOptions):
    """The paper's ICA to ten dimensions; both thresholds as in IBM's own toolbox, the authors'."""

    reduction: Reduction = Field("ica", description="ica (the paper's) or pca")
    components: int = Field(10, ge=1, description="dimensions that activations are reduced to")
    analysis: Analysis = Field(
        "silhouette", description="what condemns the smaller cluster: silhouette and size, or size"
    )
    silhouette: float = Field(
        0.1, ge=-1, le=1, description="silhouette above which a class falls into two clusters"
    )
    size: float = Field(
        0.35, gt=0, le=0.5, description="share below which the smaller cluster is suspicious"
    )
    reclassification: bool = Field(
        False, description="acquit clusters that a network trained without them gives their label"
    )
    acquittal: float = Field(
        1.0, gt=0, description="own label over the next one above which a cluster is acquitted"
    )


@final
class ActivationClustering(SetScorer):
    """Activation clustering (Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by
    Activation Clustering", SafeAI at AAAI 2019).

    In words: in each class reduce the penultimate activations to ten independent components, divide
    them by 2-means, and call the class poisoned where the division is real (a silhouette above 0.1)
    and lopsided (the smaller part below 35 %): that part is the poison. With ``reclassification``
    (the paper's exclusionary reclassification) a network trained without these parts classifies
    them, and acquits a part of which more rows get their own label than any other one.

    Needs three rows in a class to be defined. Ten rows have at most nine components, in which any
    two parts look divided.
    A row's score is ours, since the paper only flags: how much nearer it is to the centre of the
    smaller cluster than to the larger one's, as a share of both, times its class's silhouette.
    The set's statistic: the highest silhouette of a lopsided class.

    The paper names three analyses (size, silhouette, reclassification) without one setting for all;
    the thresholds, their rounding and the stopping rule of ICA are those of the authors' own
    implementation, the Adversarial Robustness Toolbox (``ClusteringAnalyzer``), whose default is
    PCA and the smaller cluster of every class. trojanzoo's silhouette analysis has the same
    thresholds; BackdoorBench and backdoor-toolbox go by size alone (``analysis="size"``; the
    latter with PCA).

    Deviations: the silhouette of more than 20,000 rows is that of 20,000 of them; with
    ``analysis="size"`` the statistic is still the silhouette, and the alarm is that a part is
    flagged.
    """

    name = "activation-clustering"
    names_class = True
    Options = ActivationClusteringOptions
    needs = "3 rows in every class; means something from about 50 on"

    def __init__(self, options: ActivationClusteringOptions) -> None:
        self.options: ActivationClusteringOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return rows_needed(view, 3)

    def caution(self, view: DefenderView) -> str | None:
        found, wanted = smallest_class(view), 5 * self.options.components
        if found >= wanted:
            return None
        return (
            f"{found} rows in a class for {self.options.components} components: they divide anyhow"
        )

    def score_set(self, view: DefenderView) -> SetScores:
        options = self.options
        features = view.features(view.distilled.batch.images).double()
        rows = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        lopsided: dict[int, float] = {}
        accused: dict[int, Tensor] = {}
        for label, members in classes_of(view.labels):
            state = view.seed(self.name, label)
            own = features[members].cpu().numpy()
            reduced = reduce(own, options.reduction, options.components, state)
            smaller, nearness, silhouette = divide(reduced, state)
            rows[members] = silhouette * torch.from_numpy(nearness).to(rows.device)
            if is_lopsided(smaller, options.size):
                lopsided[label] = round(silhouette, 4)  # as the toolbox compares it
                if options.analysis == "size" or is_divided(silhouette, options.silhouette):
                    accused[label] = members[torch.from_numpy(smaller).to(rows.device)]
        if options.reclassification and accused:
            accused = reclassified(view, accused, options.acquittal, self.name)
        flagged = torch.zeros_like(rows, dtype=torch.bool)
        for some in accused.values():
            flagged[some] = True
        divided = torch.tensor([lopsided.get(label, -1.0) for label in range(view.classes)])
        return SetScores(
            rows=rows,
            flagged=flagged,
            statistic=float(divided.max()),
            alarm=bool(accused),
            suspect=single_largest(divided),
        )


def is_lopsided(smaller: npt.NDArray[np.bool_], size: float) -> bool:
    """Whether the share of the ``smaller`` cluster (n,), rounded, is below ``size``; no cluster
    is none."""
    return bool(smaller.any()) and round(float(smaller.mean()), _SIZE_DIGITS) < size


def is_divided(silhouette: float, threshold: float) -> bool:
    """Whether the rounded ``silhouette`` is above ``threshold``."""
    return round(silhouette, _SILHOUETTE_DIGITS) > threshold


def reclassified(
    view: DefenderView, accused: Mapping[int, Tensor], acquittal: float, name: str
) -> dict[int, Tensor]:
    """Which of the ``accused`` parts (rows by class) stay so after exclusionary reclassification.

    A network trained on the other rows classifies each part: of its rows, those that get the own
    label over those that get the most frequent other one is its score; a part above ``acquittal``
    is acquitted.
    """
    batch = view.distilled.batch
    kept = torch.ones(len(batch), dtype=torch.bool, device=view.labels.device)
    for rows in accused.values():
        kept[rows] = False
    network = view.network(view.seed(name, "reclassification"))
    others = batch.rows(torch.nonzero(kept)[:, 0])
    generator = view.generator(name, "reclassification", "training")
    network = fit(network, others, view.distilled.recipe.by_epochs(), generator)
    still = {}
    for label, rows in accused.items():
        found = predict(network, batch.images[rows])
        counts = torch.bincount(found, minlength=view.classes)
        own, counts[label] = int(counts[label]), 0
        if own <= acquittal * int(counts.max()):
            still[label] = rows
    return still


def reduce(features: Array, reduction: Reduction, components: int, state: int) -> Array:
    """``features`` (n, F) in at most ``components`` dimensions, as many as n rows allow."""
    count = min(components, len(features) - 1, features.shape[1], _rank(features))
    if count < 1:
        return np.zeros((len(features), 1))
    if reduction == "pca":
        return np.asarray(PCA(count, svd_solver="full").fit_transform(features))
    with warnings.catch_warnings():
        # Two Gaussian components have no independent axes to converge to: any rotation will do.
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
        return np.asarray(ica.fit_transform(features))


def _rank(features: Array) -> int:
    """How many directions ``features`` (n, F) vary in."""
    centred = features - features.mean(axis=0)
    tall = len(centred) > centred.shape[1]
    values = np.linalg.eigvalsh(centred.T @ centred if tall else centred @ centred.T)
    return int((values > 1e-10 * max(float(values[-1]), 1e-30)).sum())


def divide(reduced: Array, state: int) -> tuple[npt.NDArray[np.bool_], Array, float]:
    """Two clusters of ``reduced`` (n, k): who is in the smaller one; how much nearer each row is to
    its centre, −1 to 1; the silhouette (0 where the rows are all alike)."""
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
