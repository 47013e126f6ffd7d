"""The anomaly index and the median that the defenses of classes share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distillsec.defenses.common.by_class import anomaly_index, middle

NORMS = [107.0, 105, 102, 86, 100, 110, 80, 93, 71, 81]


@pytest.mark.parametrize("count", range(1, 8))
def test_the_median_is_numpys_for_odd_and_even_counts(count: int) -> None:
    values = torch.tensor([5.0, -1, 8, 2, 9, 0.5, 3])[:count]
    assert float(middle(values)) == float(np.median(values.numpy()))


def test_the_median_goes_along_the_first_dimension() -> None:
    values = torch.tensor([[1.0, 40], [2, 10], [7, 30], [4, 20]])
    assert middle(values).tolist() == np.median(values.numpy(), axis=0).tolist() == [3, 25]


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
def test_how_often_clean_classes_pass_the_usual_thresholds(
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
def test_small_lognormal_norms_pass_two_less_often_than_gaussian_ones(
    sigma: float, share: float
) -> None:
    """Ten norms with a long upper tail, negated: the small ones are the anomaly."""
    generator = torch.Generator().manual_seed(1)
    norms = (sigma * torch.randn(4000, 10, generator=generator, dtype=torch.float64)).exp()
    passing = float((largest(-norms) > 2).double().mean())
    assert passing == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(norms)))
