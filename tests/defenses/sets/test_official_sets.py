"""The set's defenses against the numbers of their official codes, on inputs that are formulas.

The numbers come from runs of the published functions on the same inputs:

- SCAn: TDteach/Demon-in-the-Variant 2da3942, ``pysrc/SCAn.py`` (``build_global_model``,
  ``find_split``, ``calc_test``, ``calc_final_score``).
- Beatrix: wanlunsec/Beatrix 685827e, ``defenses/Beatrix/Beatrix.py`` (``Feature_Correlations``,
  ``threshold_determine``, ``kmmd_dist``).
- Spectral signatures: MadryLab/backdoor_data_poisoning c15096f, ``compute_corr.py``.
- SPECTRE: SewoongLab/spectre-defense ccf594a, ``quantum_filters.jl``, ``dkk17.jl``. Julia was not
  at hand: the filter is SCLBD/BackdoorBench f02e353, ``detection_pretrain/spectre_utils.py``, with
  the Julia code's condition ``i / n >= cov_Tail`` (the translation has ``1 - i / n``); the scores
  are the Julia formulas with scipy's matrix exponential and root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from distillsec.defenses.common.by_class import anomaly_index
from distillsec.defenses.sets import beatrix, scan, spectre
from distillsec.defenses.sets.spectral_signatures import removed, signature
from distillsec.distill.networks.registry import NetworkSpec

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def waves(rows: int, size: int, phase: float) -> Tensor:
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(size, dtype=torch.float64)
    return (i * (j + 1.7) * 0.731 + phase).sin() + (i * i * 0.0137 * (j + 1)).cos()


# SCAn --------------------------------------------------------------------------------------------

LABELS = torch.arange(160) % 4
MEANS = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [-2, -2, 1]], dtype=torch.float64)
# The rows of each class that the official division calls its first group.
GROUPS = (
    (0, 1, 3, 4, 7, 10, 12, 16, 17, 19, 20, 21, 23, 24, 26, 27, 28, 30, 31, 32, 35, 36, 39),
    (0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31, 33, 34, 35, 37, 38),
    tuple({*range(40)} - {1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 37}),
    (2, 3, 5, 6, 7, 10, 11, 13, 16, 17, 21, 25, 27, 28, 29, 31, 32, 34, 35, 36, 39),
)


def contaminated() -> tuple[Tensor, Tensor]:
    """Clean features, and those of a set of which class 2 is two groups."""
    clean, features = waves(160, 3, 0.3) + MEANS[LABELS], waves(160, 3, 1.1) + MEANS[LABELS]
    poison = (LABELS == 2) & (torch.arange(160) % 3 == 0)
    features[poison] += torch.tensor([2.5, -2.0, 0.0], dtype=torch.float64)
    return clean - clean.mean(dim=0), features - features.mean(dim=0)


def ratios(ratio: scan.Ratio) -> Tensor:
    clean, features = contaminated()
    between, within = scan.decompose(clean, LABELS, 4)
    found = []
    for label, group in enumerate(GROUPS):
        second = torch.zeros(40, dtype=torch.bool)
        second[list(group)] = True
        own = features[torch.eq(LABELS, label)]
        found.append(scan.likelihood_ratio(own, second, between, within, ratio))
    return torch.tensor(found, dtype=torch.float64)


def test_scans_covariances_are_the_official_ones() -> None:
    between, within = scan.decompose(contaminated()[0], LABELS, 4)
    su = [3.137768471802, 1.007869560246, -0.904358407155, 3.156703429982, -0.673119194801]
    se = [1.066314982846, 0.234039302834, 0.003520415038, 0.970175262093, -0.026459009231]
    upper = torch.triu_indices(3, 3)
    assert between[*upper].tolist() == pytest.approx([*su, 1.481496225915], rel=1e-9)
    assert within[*upper].tolist() == pytest.approx([*se, 1.008095146699], rel=1e-9)


def test_scans_code_ratio_is_the_published_codes() -> None:
    found = ratios("code")
    official = [4.461480029555, 5.712720523161, 3.792861124148, 4.523634577352]
    assert found.tolist() == pytest.approx(official, rel=1e-9)
    index = [0.057367530203, 2.252377431441, 1.29161398875, 0.057367530203]  # without its sign
    assert anomaly_index(found).abs().tolist() == pytest.approx(index, rel=1e-9)


def test_scans_paper_ratio_points_at_the_class_of_two_groups() -> None:
    """The published code's ratio points at another class here, whose mean lies far out."""
    clean, features = contaminated()
    between, within = scan.decompose(clean, LABELS, 4)
    inverse = within.inverse()
    for label, found in enumerate(ratios("paper").tolist()):
        own = features[torch.eq(LABELS, label)]
        # The identity's posterior mean, from the precisions of the prior and of 40 rows.
        alone = torch.linalg.solve(between.inverse() + 40 * inverse, inverse @ own.sum(dim=0))
        group = torch.zeros(40, dtype=torch.bool)
        group[list(GROUPS[label])] = True
        halves = [own[group] - own[group].mean(dim=0), own[~group] - own[~group].mean(dim=0)]
        one, two = own - alone, torch.cat(halves)
        expected = ((one @ inverse) * one).sum() / 40 - ((two @ inverse) * two).sum() / 40
        assert found == pytest.approx(float(expected), rel=1e-9)
    index = anomaly_index(ratios("paper"))
    assert int(index.argmax()) == 2 and float(index[2]) > 10
    assert int(anomaly_index(ratios("code")).argmax()) == 1


# Beatrix -----------------------------------------------------------------------------------------

ORDERS = range(1, 9)


def maps(rows: int, phase: float) -> Tensor:
    i = torch.arange(rows, dtype=torch.float64).view(-1, 1, 1, 1)
    c, y, z = torch.meshgrid(*(torch.arange(n).double() for n in (3, 2, 2)), indexing="ij")
    found = 1 + 0.9 * ((i + 1) * (c + 1.3) * 0.77 + y * 1.9 + z * 0.63 + phase).sin()
    return found * torch.where(i % 7 == 3, 6.0 + i / 10, 1.0)


@pytest.mark.parametrize(
    ("count", "threshold", "expected"),
    # Even and odd counts of clean images, with folds that leave none, one and three of them over.
    [
        (30, 26.327857553881987, [11.501149505831078, 0.0, 12.232910835495062]),
        (31, 25.462988250653126, [10.817372976113786, 0.0, 11.269674479108724]),
        (25, 23.64381305496955, [9.53543443612012, 0.0, 9.790051291489439]),
        (23, 21.507096856719127, [10.815126737738456, 0.01468186510869447, 10.781690090613228]),
    ],
)
def test_beatrix_deviations_and_threshold_are_the_official_ones(
    count: int, threshold: float, expected: Sequence[float]
) -> None:
    clean = maps(count, 0.2)
    usual = beatrix.gram_range(clean, ORDERS, 10)
    found = beatrix.deviations(maps(12, 0.9), usual, ORDERS)[[3, 5, 10]]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert beatrix.clean_threshold(clean, ORDERS, 10, 0.95) == pytest.approx(threshold, rel=1e-9)


@pytest.mark.parametrize(("count", "expected"), [(6, 1.0723798015330286), (5, 1.0110524672832093)])
def test_beatrix_two_sample_statistic_is_the_official_one(count: int, expected: float) -> None:
    """Of ten rows the distances have no single middle one; of nine they have."""

    def sines(rows: int, phase: float) -> Tensor:
        i = torch.arange(rows, dtype=torch.float64)[:, None]
        return (i * (torch.arange(3).double() + 1.7) * 0.731 + phase).sin()

    found = beatrix.two_sample(sines(count, 0.1), sines(4, 0.8) + 0.5)
    assert found == pytest.approx(expected, rel=1e-9)


def test_beatrix_uses_the_input_of_a_resnets_last_stage(badnets: Case) -> None:
    view = badnets.view
    network = replace(view.network, spec=NetworkSpec(network="resnet18", norm="batch"))(0).eval()
    images = view.holdout.images[:2]
    seen: list[Tensor] = []
    trunk = network.trunk
    assert isinstance(trunk, torch.nn.Sequential)
    hook = trunk[-4].register_forward_hook(lambda module, given, _: seen.append(given[0]))
    network(images)
    hook.remove()
    found = beatrix.maps_before_last_stage(network, images)
    assert found.shape == (2, 256, 2, 2) and torch.allclose(found, seen[0], atol=1e-6)
    plain = beatrix.maps_before_last_stage(view.victim, images)
    assert plain.shape == (2, 16, 4, 4)  # the last convolution's, where there are no stages


# Spectral signatures and SPECTRE -----------------------------------------------------------------


def heavy() -> spectre.Array:
    features: spectre.Array = waves(60, 6, 0.0).numpy() ** 3 * (1.0 + np.arange(6))
    features[-4:] += np.array([0, 0, 9, -7, 0, 5])
    features[-4:] *= 1.5
    return features


@pytest.mark.parametrize(
    ("count", "first", "rows"),
    [
        (20, [10.581801728389436, 5.819115976067346, 3.960744807234184], [3, 6, 12]),
        (21, [10.873215144075942, 6.076862648712061, 4.718052197394909], [3, 6, 12]),
        (10, [15.008492598669804, 7.386051562293552, 24.352694036947206], [3, 6]),
        (47, [8.625939582718157, 4.451840646476497, 1.0954532844734244], [3, 6, 8, 12, 24, 35, 40]),
    ],
)
def test_spectral_signatures_code_formula_is_the_published_codes(
    count: int, first: Sequence[float], rows: Sequence[int]
) -> None:
    features = torch.from_numpy(heavy()[:count] + 4)
    scores, _ = signature(features, "code")
    assert scores[:3].tolist() == pytest.approx(first, rel=1e-9)
    top = scores.argsort(descending=True)[: removed(count, 0.15, "code")]
    assert sorted(top.tolist()) == rows


@pytest.mark.parametrize("count", range(2, 120))
def test_as_many_rows_are_removed_as_lie_above_numpys_percentile(count: int) -> None:
    scores = np.arange(count) ** 1.5
    assert removed(count, 0.15, "code") == (scores > np.percentile(scores, 85)).sum()
    assert removed(count, 0.15) == round(0.15 * count)


@pytest.mark.parametrize(
    ("dimensions", "out", "expected"),
    [
        (2, [58], [0.0391051787398, 0.0833332243187, 0.0124379175141, 0.2424800685035]),
        (4, [24, 57, 58], [0.0199051987083, 0.7607253439812, 0.0613564336417, 0.4676224474415]),
        (
            6,
            [1, 2, 6, 7, 24, 35, 40, 44, 47, 57, 58, 59],
            [0.1778829671854, 16.6813544728934, 0.1421864560823, 10.7829850425750],
        ),
    ],
)
def test_spectres_filter_and_scores_are_the_official_ones(
    dimensions: int, out: Sequence[int], expected: Sequence[float]
) -> None:
    projected = spectre.principal(heavy(), 6)[:, :dimensions]
    assert np.flatnonzero(~spectre.robust(projected, 6)).tolist() == out
    scores = spectre.quantum_scores(projected, 6, 4.0)
    assert scores[[0, 7, 30, 59]].tolist() == pytest.approx(expected, rel=1e-7)


def test_spectres_choice_of_dimensions_is_the_official_one() -> None:
    """The official criterion is 5.624 at its best k, 1, whose scores are squares."""
    scores, contamination = spectre.best_scores(heavy(), spectre.SpectreOptions())
    assert contamination == pytest.approx(5.624322136779109, rel=1e-9)
    official = [2.6322016409, 50.9586182681, 1.5358672828, 204.930128323, 22.1290983858]
    assert scores[[0, 7, 30, 57, 59]].tolist() == pytest.approx(official, rel=1e-8)


def test_spectres_top_variation_is_the_whole_operators() -> None:
    white = waves(50, 4, 0.5).numpy()
    products = np.stack([np.kron(row, row) for row in white])
    identity = np.eye(4).ravel()
    operator = products.T @ products / 50 - np.outer(identity, identity)
    values, vectors = np.linalg.eigh(operator)
    top = int(np.abs(values).argmax())
    value, direction = spectre.top_variation(white)
    assert value == pytest.approx(values[top], rel=1e-9)
    assert abs(float(direction.ravel() @ vectors[:, top])) == pytest.approx(1, abs=1e-9)
