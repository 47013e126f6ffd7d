"""Statistics against scipy, counted pairs and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distillsec.eval.results.statistics import auroc, auroc_interval, t_interval, wilson


@pytest.mark.parametrize("values", [[0.1, 0.9, 0.4], [0.5, 0.6, 0.55, 0.8, 0.2]])
def test_the_interval_of_a_mean_is_students(values: list[float]) -> None:
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    assert t_interval(mean, std, len(values)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 10), (10, 10), (1, 3)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([score for score, _ in rows])
    positive = torch.tensor([kind for _, kind in rows])
    ours, theirs = scores[positive], scores[~positive]
    if not len(ours) or not len(theirs):
        assert auroc(scores, positive) is None
        return
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in ours.tolist() for b in theirs.tolist()])
    assert auroc(scores, positive) == pytest.approx(float(wins), abs=1e-9)


def test_the_interval_of_an_auroc_has_its_nominal_coverage() -> None:
    """Ten attacked and ten clean statistics, normal, a deviation and a half apart: area 0.856."""
    generator, truth = np.random.default_rng(3), float(stats.norm.cdf(1.5 / math.sqrt(2)))
    covered = []
    for _ in range(600):
        ours, clean = generator.normal(1.5, 1, 10), generator.normal(0, 1, 10)
        area = float((ours[:, None] > clean).mean())
        interval = auroc_interval(area, 10, 10)
        assert interval is not None and 0 <= interval[0] <= area <= interval[1] <= 1
        covered.append(interval[0] <= truth <= interval[1])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)
    certain = auroc_interval(1.0, 10, 10)
    assert certain is not None and 0.7 < certain[0] < 0.9 and certain[1] == 1
    assert auroc_interval(0.5, 2, 2) is None
