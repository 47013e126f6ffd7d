"""The anomaly index and the median that the defenses of classes share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation
from torch import Tensor

from distillsec.defenses.common.by_class import anomaly_index, classes_of, median

NORMS = [107.0, 105, 102, 86, 100, 110, 80, 93, 71, 81]


@pytest.mark.parametrize("count", range(1, 8))
def test_the_median_is_numpys_for_odd_and_even_counts(count: int) -> None:
    values = torch.tensor([5.0, -1, 8, 2, 9, 0.5, 3])[:count]
    assert float(median(values)) == float(np.median(values.numpy()))


def test_the_median_goes_along_the_first_dimension() -> None:
    values = torch.tensor([[1.0, 40], [2, 10], [7, 30], [4, 20]])
    assert median(values).tolist() == np.median(values.numpy(), axis=0).tolist() == [3, 25]


def test_the_index_of_ten_mask_norms_is_neural_cleanses() -> None:
    """bolunwang/backdoor, ``mad_outlier_detection.py``: 1.638 for the smallest of these norms."""
    index = anomaly_index(-torch.tensor(NORMS, dtype=torch.float64))
    assert float(index.max()) == pytest.approx(1.638, abs=5e-4)
    assert int(index.argmax()) == NORMS.index(71)


def test_of_two_values_the_index_is_a_constant() -> None:
    for values in ([1.0, 2.0], [-5.0, 300.0]):
        index = anomaly_index(torch.tensor(values, dtype=torch.float64))
        assert index.tolist() == pytest.approx([-1 / 1.4826, 1 / 1.4826])


def largest(values: Tensor) -> Tensor:
    return torch.stack([anomaly_index(row).max() for row in values])


@pytest.mark.parametrize(
    ("classes", "above_two", "above_e2"),
    # Shares of 100,000 draws of an implementation over whole arrays, in numbers.
    [(3, 0.235, 0.073), (4, 0.207, 0.022), (10, 0.330, 0.004)],
)
def test_how_often_clean_classes_exceed_the_usual_thresholds(
    classes: int, above_two: float, above_e2: float
) -> None:
    """One-sided, of Gaussian values. Three and four classes pass 2 less often than ten; they pass
    exp(2) more often, in 7 and 2 of 100 clean models."""
    generator = torch.Generator().manual_seed(0)
    found = largest(torch.randn(4000, classes, generator=generator, dtype=torch.float64))
    for threshold, share in ((2.0, above_two), (math.exp(2), above_e2)):
        error = 4 * math.sqrt(share * (1 - share) / len(found))
        assert float((found > threshold).double().mean()) == pytest.approx(share, abs=error)


@pytest.mark.parametrize(("sigma", "share"), [(0.25, 0.193), (0.5, 0.104), (1.0, 0.030)])
def test_small_lognormal_norms_exceed_two_less_often_than_gaussian_ones(
    sigma: float, share: float
) -> None:
    """Ten norms with a long upper tail, negated: the small ones are the anomaly."""
    generator = torch.Generator().manual_seed(1)
    norms = (sigma * torch.randn(4000, 10, generator=generator, dtype=torch.float64)).exp()
    passing = float((largest(-norms) > 2).double().mean())
    assert passing == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(norms)))


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12, unique=True))
def test_the_anomaly_index_is_the_papers(values: list[float]) -> None:
    spread = median_abs_deviation(values, scale=1 / 1.4826)  # numpy's medians, odd or even
    if spread > 1e-3:
        expected = (np.array(values) - np.median(values)) / spread
        found = anomaly_index(torch.tensor(values, dtype=torch.float64))
        assert np.allclose(found.numpy(), expected, rtol=1e-9)


def test_equal_values_are_no_anomaly_and_one_among_them_is() -> None:
    assert anomaly_index(torch.full((10,), 3.0)).abs().max() == 0
    values = torch.full((10,), 3.0, dtype=torch.float64)
    values[4] = 4
    index = anomaly_index(values)
    assert index.argmax() == 4 and index[4] == pytest.approx(1 / (1.2533 * 0.1))
    values[4] = 2
    assert anomaly_index(values).max() <= 0  # below the median is no anomaly


def test_classes_come_with_their_rows() -> None:
    found = {label: rows.tolist() for label, rows in classes_of(torch.tensor([4, 1, 4, 1, 1]))}
    assert found == {1: [1, 3, 4], 4: [0, 2]}
