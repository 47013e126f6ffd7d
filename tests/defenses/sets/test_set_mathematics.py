"""The mathematics of the set's defenses, each against something that computes it another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.spatial.distance import mahalanobis

from distillsec.defenses.sets import beatrix, scan, spectre
from distillsec.defenses.sets.activation_clustering import divide, reduce
from distillsec.defenses.sets.quantise import quantised
from distillsec.defenses.sets.spectral_signatures import signature
from distillsec.distill.types import RunError

RNG = np.random.default_rng(0)


def points(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) @ mixing


@pytest.mark.parametrize(("rows", "features"), [(30, 5), (5, 30), (2, 3), (12, 12)])
def test_a_signature_is_the_squared_projection_on_the_top_direction(
    rows: int, features: int
) -> None:
    some = points(rows, features)
    centred = (some - some.mean(dim=0)).numpy()
    covariance = centred.T @ centred
    direction = np.linalg.eigh(covariance)[1][:, -1]
    scores, variance = signature(some)
    assert np.allclose(scores.numpy(), (centred @ direction) ** 2, rtol=1e-8, atol=1e-10)
    assert variance == pytest.approx(np.linalg.eigvalsh(covariance)[-1] / rows)
    assert signature(torch.ones(4, 3, dtype=torch.float64))[1] == 0


def test_the_smaller_of_two_clusters_is_found() -> None:
    some = np.concatenate([RNG.normal(0, 1, (40, 12)), RNG.normal(12, 1, (9, 12))])
    for reduction in ("pca", "ica"):
        low = reduce(some, reduction, 5, 0)
        assert low.shape == (49, 5)
        smaller, nearness, silhouette = divide(low, 0)
        assert smaller.tolist() == [False] * 40 + [True] * 9
        assert (nearness[40:] > 0).all() and (nearness[:40] < 0).all()
        assert silhouette > 0.2
    assert reduce(some[:4], "pca", 10, 0).shape == (4, 3)  # n rows have n − 1 directions
    alike = np.ones((5, 3))
    assert divide(reduce(alike, "ica", 10, 0), 0)[2] == 0.0


def test_components_that_are_not_found_are_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lost:
        def __init__(self, *_: object, **__: object) -> None: ...

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            return np.full((len(features), 2), np.nan)

    monkeypatch.setattr("sklearn.decomposition.FastICA", Lost)
    features = np.random.default_rng(0).normal(size=(30, 8))
    with pytest.raises(RunError, match=r"30 rows of a class.* choose reduction=pca"):
        reduce(features, "ica", 2, 0)


# SPECTRE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_que_is_the_published_formula(alpha: float) -> None:
    some = points(60, 4).numpy()
    some = some / some.std(axis=0) * np.array([2.0, 1.0, 1.0, 0.9])
    covariance = np.cov(some.T)
    weights = expm(alpha * (covariance - np.eye(4)) / (np.linalg.norm(covariance, 2) - 1))
    expected = np.einsum("ni,ij,nj->n", some, weights / np.trace(weights), some)
    assert np.allclose(spectre.que(some, alpha), expected, rtol=1e-8)
    calm = 0.5 * some / np.abs(some).max()
    assert np.allclose(spectre.que(calm, alpha), (calm**2).mean(axis=1))  # nothing sticks out


def test_whitening_removes_a_covariance() -> None:
    some = points(500, 3).numpy()
    white = spectre.whiten(some, np.cov(some.T))
    assert np.allclose(np.cov(white.T), np.eye(3), atol=1e-9)


def test_the_robust_covariance_ignores_a_minority() -> None:
    clean = RNG.normal(0, 1, (300, 3))
    mixed = np.concatenate([clean, RNG.normal(15, 0.1, (15, 3))])
    centred = mixed - mixed.mean(axis=0)
    covariance = np.cov(centred[spectre.robust(centred, 15)].T)
    assert np.abs(covariance - np.eye(3)).max() < 0.5 and np.cov(mixed.T).max() > 10
    scores, contamination = spectre.best_scores(mixed, spectre.SpectreOptions())
    assert scores[300:].min() > np.quantile(scores[:300], 0.95)
    assert contamination > spectre.best_scores(clean, spectre.SpectreOptions())[1]


# SCAn --------------------------------------------------------------------------------------------


def test_the_decomposition_is_the_official_iteration() -> None:
    """Against its own formulas, row by row: u = −Se (n Su + Se)⁻¹ Su Se⁻¹ Σ x, with the sign."""
    labels = torch.arange(90) % 3
    features = points(90, 4, 1) + 4 * torch.nn.functional.one_hot(labels, 4).double()
    features = features - features.mean(dim=0)
    x, y = features.numpy(), labels.numpy()
    means = np.stack([x[y == k].mean(axis=0) for k in range(3)])
    identity, variation = np.cov(means[y].T), np.cov((x - means[y]).T)
    for _ in range(100):
        before = identity, variation
        inverse = np.linalg.pinv(variation)
        found = np.zeros((3, 4))
        for k in range(3):
            gain = -np.linalg.pinv((y == k).sum() * identity + variation) @ identity @ inverse
            for row in x[y == k]:
                found[k] -= variation @ gain @ row
        identity, variation = np.cov(found[y].T), np.cov((x - found[y]).T)
        if np.linalg.norm(identity - before[0]) + np.linalg.norm(variation - before[1]) < 1e-2:
            break
    between, within = scan.decompose(features, labels, 3)
    assert np.allclose(between.numpy(), identity, atol=1e-6)
    assert np.allclose(within.numpy(), variation, atol=1e-6)


def test_the_likelihood_ratio_counts_mahalanobis_distances() -> None:
    features, second = points(20, 3, 2), torch.arange(20) < 7
    between, within = torch.cov(points(40, 3, 3).T), torch.cov(points(40, 3, 4).T)
    inverse = np.linalg.inv(within.numpy())
    x = features.numpy()
    alone = between.numpy() @ np.linalg.inv(20 * between.numpy() + within.numpy()) @ x.sum(axis=0)
    pair = [x[~second.numpy()].mean(axis=0), x[second.numpy()].mean(axis=0)]
    expected = np.mean(
        [
            mahalanobis(row, alone, inverse) ** 2 - mahalanobis(row, pair[int(own)], inverse) ** 2
            for row, own in zip(x, second, strict=True)
        ]
    )
    found = scan.likelihood_ratio(features, second, between, within)
    assert found == pytest.approx(expected, rel=1e-8)
    assert scan.likelihood_ratio(features, torch.zeros(20, dtype=torch.bool), between, within) == 0


def test_the_group_with_the_clean_images_is_the_clean_one() -> None:
    clean = points(30, 2, 5) * 0.1
    rows = torch.cat([points(20, 2, 6) * 0.1, points(15, 2, 7) * 0.1 + 10])
    scores, second = scan.two_groups(rows, clean, 0)
    assert second.tolist() == [False] * 20 + [True] * 15
    assert scores[20:].min() > 0 > scores[:20].max()
    assert not scan.two_groups(torch.ones(4, 2, dtype=torch.float64), clean, 0)[1].any()


# Beatrix -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 5])
def test_gram_features_are_rooted_products_of_powers(order: int) -> None:
    maps = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    found = beatrix.gram(maps, order)
    assert found.shape == (3, 10)
    column = 0
    for i in range(4):
        for j in range(i, 4):
            product = (maps[:, i].double() ** order * maps[:, j].double() ** order).sum(dim=(1, 2))
            assert torch.allclose(found[:, column], product ** (1 / order), rtol=1e-6)
            column += 1


def test_deviations_are_zero_in_range_and_relative_outside() -> None:
    orders = [1]
    usual = beatrix.GramRange([torch.tensor([1.0])], [torch.tensor([2.0])])
    maps = torch.tensor([1.0, 1.2, 2.0, 0.5]).sqrt().view(4, 1, 1, 1)  # squared by the Gram matrix
    found = beatrix.deviations(maps, usual, orders)
    # One Gram feature counts over half a square of one channel, as in the official code.
    assert torch.allclose(found, torch.tensor([0, 0, 0, 1.0], dtype=torch.float64), atol=1e-5)
    clean = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).sqrt().view(5, 1, 1, 1)
    fitted = beatrix.gram_range(clean, orders, 10)
    assert fitted.low[0].item() == pytest.approx(3 - 10) and fitted.high[0].item() == pytest.approx(
        13
    )


def test_the_two_sample_statistic_is_the_kernel_discrepancy() -> None:
    first, second = points(6, 3, 8), points(4, 3, 9) + 2
    both = torch.cat([first, second])
    squares = torch.stack([((a - b) ** 2).sum() for a in both for b in both])
    bandwidth = squares.median()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        square = ((a - b) ** 2).sum()
        return sum(float(torch.exp(-square / (bandwidth * scale))) for scale in (0.5, 1.0))

    within = np.mean([kernel(a, b) for a in first for b in first])
    beside = np.mean([kernel(a, b) for a in second for b in second])
    across = np.mean([kernel(a, b) for a in first for b in second])
    expected = (within + beside - 2 * across) * 6 * 4 / 10
    assert beatrix.two_sample(first, second) == pytest.approx(expected, rel=1e-6)
    assert beatrix.two_sample(first, first) == pytest.approx(0, abs=1e-9)


# Quantise ----------------------------------------------------------------------------------------


def pixels(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_quantised_pixels_lie_on_levels() -> None:
    images = torch.tensor([-1.0, 0.0, 0.1, 0.49, 0.51, 1.0, 7.0]).view(7, 1, 1, 1)
    assert quantised(images, 1).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert len(quantised(pixels(50), 3).unique()) == 8
    assert torch.allclose(quantised(pixels(6), 16), pixels(6), atol=1e-4)
