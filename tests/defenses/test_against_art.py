"""Agreement with the Adversarial Robustness Toolbox on the same activations and inputs.

Where ART computes something else than the paper it cites, it is given what makes both the same, and
the difference is documented here:

- its spectral signature is the absolute value of a projection of *uncentred* activations on the top
  direction of the centred ones; the paper squares the projection of the centred ones. It is given
  centred activations, and its scores are squared.
- its STRIP takes the entropy over the overlays, for each class, instead of over the classes, for
  each overlay. It is given the predictions with both exchanged.
- its analyses of clusters fail: the one by silhouette on a lopsided class below the threshold, the
  one by size with numpy 2. Its clusters and silhouettes are set against its own thresholds here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from distillsec.defenses.common.by_class import classes_of
from distillsec.defenses.inputs.strip import Strip, StripOptions
from distillsec.defenses.sets.activation_clustering import (
    ActivationClustering,
    ActivationClusteringOptions,
    divide,
    reduce,
)
from distillsec.defenses.sets.spectral_signatures import (
    SpectralSignatures,
    SpectralSignaturesOptions,
    signature,
)
from distillsec.distill.training import in_pieces

if TYPE_CHECKING:
    from tests.defenses.conftest import Case

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def art() -> Iterator[Any]:
    module = pytest.importorskip("art")
    yield module


def test_spectral_signatures(sparse: Case) -> None:
    from art.defences.detector.poison import SpectralSignatureDefense

    features = sparse.view.features(sparse.view.distilled.batch.images).double()
    defense = SpectralSignatures(SpectralSignaturesOptions())
    flagged = defense.score_set(sparse.view).flagged
    for _, members in classes_of(sparse.view.labels):
        own = features[members]
        scores, _ = signature(own)
        centred = (own - own.mean(dim=0)).numpy()
        theirs = SpectralSignatureDefense.spectral_signature_scores(centred)[:, 0] ** 2
        assert np.allclose(scores.numpy(), theirs, rtol=1e-4, atol=1e-4)
        count = round(0.15 * len(members))  # its own rule: the highest eps · multiplier
        removed = np.argsort(-theirs, kind="stable")[:count]
        assert set(removed) == set(np.flatnonzero(flagged[members].numpy()))


def test_activation_clustering(sparse: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from art.defences.detector.poison import clustering_analyzer
    from art.defences.detector.poison.activation_defence import (
        cluster_activations,
        reduce_dimensionality,
    )

    # Its clustering has no seed; ours is given the same.
    monkeypatch.setattr(
        "art.defences.detector.poison.activation_defence.KMeans",
        lambda n_clusters: KMeans(n_clusters, n_init=10, random_state=0),
    )
    features = sparse.view.features(sparse.view.distilled.batch.images).double().numpy()
    labels = sparse.view.labels
    parts = [features[members.numpy()] for _, members in classes_of(labels)]
    clusters, reduced = cluster_activations(parts, nb_clusters=2, nb_dims=10, reduce="PCA")
    analyzer = clustering_analyzer.ClusteringAnalyzer()
    _, _, report = analyzer.analyze_by_silhouette_score(
        clusters, reduced, silhouette_threshold=-1, size_threshold=0.35, r_silhouette=6
    )
    found, rows = [], np.zeros(0)
    for (label, members), part, theirs, low in zip(
        classes_of(labels), parts, clusters, reduced, strict=True
    ):
        ours = reduce(part, "pca", 10, 0)
        assert np.allclose(np.abs(ours), np.abs(reduce_dimensionality(part, 10, "PCA")), atol=1e-4)
        assert np.allclose(np.abs(ours), np.abs(low), atol=1e-4)  # a direction has no sign
        smaller, _, silhouette = divide(ours, 0)
        small = theirs == np.bincount(theirs, minlength=2).argmin()
        assert np.array_equal(smaller, small)
        known = float(report[f"class_{label}"]["avg_silhouette_score"])
        assert silhouette == pytest.approx(known, abs=1e-4)
        if small.mean() < 0.35 and known > 0.4:
            found.append(label)
            rows = members.numpy()[small]
    assert found == [3]
    options = ActivationClusteringOptions(reduction="pca", silhouette=0.4)
    flagged = ActivationClustering(options).score_set(sparse.view).flagged
    assert np.array_equal(np.flatnonzero(flagged.numpy()), rows)


def test_activation_clustering_by_ica(sparse: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's reduction, with the toolbox's stopping rule, which ICA's default is not."""
    from art.defences.detector.poison.activation_defence import reduce_dimensionality
    from sklearn import decomposition

    monkeypatch.setattr(
        "sklearn.decomposition.FastICA",
        partial(decomposition.FastICA, random_state=0, whiten_solver="eigh"),
    )
    features = sparse.view.features(sparse.view.distilled.batch.images).double().numpy()
    for _, members in list(classes_of(sparse.view.labels))[2:4]:
        own = features[members.numpy()]
        theirs = reduce_dimensionality(own, 10, "FastICA")
        ours = reduce(own, "ica", 10, 0)
        assert np.allclose(ours, theirs, atol=1e-8)
        first, second = divide(ours, 0), divide(theirs, 0)
        assert np.array_equal(first[0], second[0])
        assert first[2] == pytest.approx(second[2], abs=1e-8)


def test_strip(badnets: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from art.estimators.poison_mitigation.strip.strip import STRIPMixin

    copies, view = 20, badnets.view
    options = StripOptions(copies=copies, image_weight=0.5, overlay_weight=0.5)
    strip = Strip(options)
    rows = torch.randint(len(view.holdout), (copies,), generator=view.generator("strip")).numpy()
    monkeypatch.setattr(np.random, "choice", lambda values, count: rows)

    class Classifier:
        """The victim, with overlays and classes exchanged where it is asked about overlays."""

        def predict(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            logits = in_pieces(view.victim, torch.from_numpy(x).float())
            found: np.ndarray[Any, Any] = logits.double().softmax(dim=1).numpy()
            return found.T if len(x) == copies else found

    class Guarded(STRIPMixin, Classifier):  # type: ignore[misc]
        nb_classes = 10

    guarded = Guarded(
        predict_fn=Classifier().predict, num_samples=copies, false_acceptance_rate=0.01
    )
    guarded.mitigate(view.holdout.images.numpy())
    assert -strip.threshold(view) == pytest.approx(guarded.entropy_threshold, abs=1e-4)
    images = torch.cat([badnets.clean.images[:30], badnets.triggered[:31]])
    scores = strip.score_inputs(view, images)
    refused = ~guarded.predict(images.numpy()).any(axis=1)
    assert 0 < refused.sum() < len(images)
    assert np.array_equal(refused, (scores >= strip.threshold(view)).numpy())
