"""What the set's defenses do with two classes, with their published thresholds and bit depths."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from distillsec.defenses import DEFENSES
from distillsec.defenses.base import SetScorer
from distillsec.defenses.sets import activation_clustering
from distillsec.distill.types import Batch

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


# Few classes -------------------------------------------------------------------------------------


def two_classes(case: Case) -> Case:
    index = torch.nonzero((case.view.labels == 3) | (case.view.labels == 5))[:, 0]
    few = case.rows(index)
    batch = few.view.distilled.batch
    labels = (batch.labels == 3).long()
    distilled = replace(
        few.view.distilled,
        batch=Batch(images=batch.images, labels=labels),
        classes=few.view.distilled.classes[:2],
    )
    held = few.view.holdout
    known = torch.nonzero((held.labels == 3) | (held.labels == 5))[:, 0]
    holdout = Batch(images=held.images[known], labels=(held.labels[known] == 3).long())
    return replace(few, view=few.fresh(distilled=distilled, holdout=holdout))


@pytest.mark.parametrize("name", ["scan", "beatrix"])
def test_alarms_are_not_applicable_to_two_classes(name: str, sparse: Case) -> None:
    kind = DEFENSES[name]
    reason = kind(kind.Options()).not_applicable_because(two_classes(sparse).view)
    assert reason == "needs 3 classes, there are 2"


@pytest.mark.parametrize("name", ["spectral-signatures", "spectre"])
def test_rows_of_two_classes_are_scored_without_a_statistic(name: str, sparse: Case) -> None:
    case = two_classes(sparse)
    kind = DEFENSES[name]
    defense = kind(kind.Options(**kind.quick))
    assert isinstance(defense, SetScorer)
    assert defense.not_applicable_because(case.view) is None
    assert "two classes" in (defense.caution(case.view) or "")
    found = defense.score_set(case.view)
    assert found.statistic == 0 and found.alarm is None
    ten = defense.score_set(sparse.view)
    index = torch.nonzero((sparse.view.labels == 3) | (sparse.view.labels == 5))[:, 0]
    assert torch.allclose(found.rows, ten.rows[index], rtol=1e-4, atol=1e-6)  # as among ten


# Activation clustering ---------------------------------------------------------------------------


def test_thresholds_are_compared_as_in_the_authors_toolbox() -> None:
    """ClusteringAnalyzer rounds a size to two digits and a silhouette to four, and wants less than
    the one threshold and more than the other."""
    for count, expected in ((344, True), (346, False), (350, False), (0, False)):
        assert activation_clustering.is_small(np.arange(1000) < count, 0.35) is expected
    for silhouette, divided in ((0.1, False), (0.10004, False), (0.10006, True)):
        assert activation_clustering.is_separate(silhouette, 0.1) is divided


def test_reclassification_clears_clean_clusters_only(sparse: Case) -> None:
    view = sparse.view
    clean = torch.nonzero((view.labels == 5) & ~sparse.poisoned)[:40, 0]
    accused = {3: torch.nonzero(sparse.poisoned)[:, 0], 5: clean}
    found = activation_clustering.not_cleared(view, accused, 1.0, "activation-clustering")
    assert list(found) == [3] and torch.equal(found[3], accused[3])


def test_size_alone_flags_more_than_size_and_silhouette(honest: Case) -> None:
    kind = activation_clustering.ActivationClustering
    options = activation_clustering.ActivationClusteringOptions
    both = kind(options(reduction="pca", silhouette=0.3)).score_set(honest.view).flagged
    size = kind(options(reduction="pca", analysis="size")).score_set(honest.view).flagged
    assert size.sum() > both.sum() and not (both & ~size).any()


# Pixels ------------------------------------------------------------------------------------------


def test_bit_depths_are_the_papers_for_grey_and_for_colour(badnets: Case) -> None:
    kind = DEFENSES["quantise"]
    grey = badnets.view
    images = torch.linspace(0, 1, len(grey.labels) * 192).view(-1, 3, 8, 8)
    colour = badnets.fresh(distilled=grey.with_images(images))
    for view, levels in ((grey, 2), (colour, 32)):
        defense: Any = kind(kind.Options())
        found = defense.sanitise(view).batch.images
        assert len(found.unique()) == levels
    assert [step["bits"] for step in kind.grid] == [5, 4, 3, 2, 1]
