"""Beatrix: the correlations between channels of a poisoned row are out of its class's range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.networks.registry import Network
from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, SetScorer, SetScores, single_largest
from ..common.by_class import (
    anomaly_index,
    classes_needed,
    classes_of,
    fewest_held_out,
    held_out_needed,
    rows_needed,
)
from ..common.maps import at_the_last_maps, feature_map

_FOLDS = 5
_PUBLISHED = 30
_SMALL = 1e-6


@final
class BeatrixOptions(DefenseOptions):
    """The official code's settings; the thresholds are the paper's."""

    orders: int = Field(8, ge=1, le=16, description="Gram matrices of powers 1 to this one")
    width: float = Field(10.0, gt=0, description="MADs around the median that are in range")
    quantile: float = Field(0.95, gt=0, lt=1, description="of clean deviations: a row's threshold")
    threshold: float = Field(math.exp(2), gt=0, description="anomaly index that raises the alarm")
    most: int = Field(500, ge=2, description="most rows of a group in the two-sample test")


@final
class Beatrix(SetScorer):
    """Beatrix (Ma, Wang, Sun, Nie, Tian, Wang, Ni, "The 'Beatrix' Resurrections: Robust Backdoor
    Detection via Gram Matrices", NDSS 2023).

    In words: of a row's feature maps take Gram matrices of powers 1 to 8. Add up how far their
    entries lie outside of the range of the clean images of its class (median ± 10 MAD). Rows above
    the clean images' own 95 % quantile are one group, the others another, and a kernel two-sample
    statistic between both says how contaminated the class is. A class whose statistic stands out
    (anomaly index above exp(2)) raises the alarm.

    Needs five held-out images of every class (the paper has 30), and two rows in a class.
    A row's score is its deviation above its class's threshold.

    As in the official code (wanlunsec/Beatrix, ``defenses/Beatrix/Beatrix.py``), the medians of
    Gram features and of distances are torch's, of an even count the lower of the two middle values
    (its anomaly index, by numpy, takes their mean); the quantile is the sorted deviations' entry at
    0.95 times their number, without interpolation; the maps are what enters a ResNet's last stage.

    Deviations: the anomaly index is one-sided (the official code's is not); in networks without
    residual blocks the maps are those of the last convolution, since they have no stages, and a
    network without maps is taken as one pixel of as many channels as features. Clean images are
    grouped by their true label (the official code: by the predicted one). At most 500 rows of a
    group, drawn at random, enter the two-sample test (the official code looks at 500 clean and 500
    triggered images of a class). Powers are taken in double precision.
    """

    name = "beatrix"
    names_class = True
    Options = BeatrixOptions
    needs = f"{_FOLDS} held-out images of every class ({_PUBLISHED} in the paper), 2 rows in each"
    quick: ClassVar[Mapping[str, Any]] = {"orders": 4}

    def __init__(self, options: BeatrixOptions) -> None:
        self.options: BeatrixOptions = options

    def objection(self, view: DefenderView) -> str | None:
        few = held_out_needed(view, _FOLDS) or rows_needed(view, 2)
        return classes_needed(view) or few

    def caution(self, view: DefenderView) -> str | None:
        fewest = fewest_held_out(view)
        if fewest >= _PUBLISHED:
            return None
        return (
            f"{fewest} held-out images of a class, the paper has {_PUBLISHED}: its range is narrow"
        )

    def score_set(self, view: DefenderView) -> SetScores:
        options = self.options
        orders = range(1, options.orders + 1)
        clean = maps_before_last_stage(view.victim, view.holdout.images)
        maps = maps_before_last_stage(view.victim, view.distilled.batch.images)
        rows = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
        contaminated = torch.zeros(view.classes, dtype=torch.float64)
        for label, members in classes_of(view.labels):
            known = clean[view.holdout.labels == label]
            limit = clean_threshold(known, orders, options.width, options.quantile)
            found = deviations(maps[members], fit_range(known, orders, options.width), orders)
            rows[members] = found - limit
            contaminated[label] = self._contamination(view, maps[members], found > limit, label)
        index = anomaly_index(contaminated)
        alarm = bool(index.max() > options.threshold)
        return SetScores(
            rows=rows,
            flagged=(rows > 0) & (index > options.threshold).to(rows.device)[view.labels],
            statistic=float(index.max()),
            alarm=alarm,
            suspect=single_largest(index),
        )

    def _contamination(
        self, view: DefenderView, maps: Tensor, outside: Tensor, label: int
    ) -> float:
        """The two-sample statistic between a class's rows in range and those outside."""
        groups = []
        for number, members in enumerate((~outside, outside)):
            own = maps[members].mean(dim=(2, 3)).double()
            generator = view.generator(self.name, label, number)
            order = torch.randperm(len(own), generator=generator)[: self.options.most]
            groups.append(own[order.to(own.device)])
        return two_sample(*groups) if all(map(len, groups)) else 0.0


@final
@dataclass(frozen=True, eq=False)
class Range:
    """The range of a class's Gram features: by order, lowest and highest, each ``(G,)``."""

    low: Sequence[Tensor]
    high: Sequence[Tensor]


def gram(maps: Tensor, order: int) -> Tensor:
    """Correlations of channels ``(n, C (C + 1) / 2)`` of ``maps`` (n, C, H, W): the upper triangle
    of the Gram matrix of their ``order``-th powers, its ``order``-th root with the sign kept."""
    powers = maps.double().flatten(2) ** order
    products = powers @ powers.transpose(1, 2)
    rows, columns = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
    upper = products[:, rows, columns]
    return upper.sign() * upper.abs() ** (1 / order)


def fit_range(clean: Tensor, orders: Sequence[int], width: float) -> Range:
    """The medians of the Gram features of ``clean`` (m, C, H, W), ``width`` MADs to either side."""
    low, high = [], []
    for order in orders:
        found = gram(clean, order)
        median = found.median(dim=0).values  # the lower of two, as in the official code
        spread = width * (found - median).abs().median(dim=0).values
        low.append(median - spread)
        high.append(median + spread)
    return Range(low, high)


def deviations(maps: Tensor, usual: Range, orders: Sequence[int]) -> Tensor:
    """How far ``maps`` (n, C, H, W) lie out of the ``usual`` range, relative to its ends: ``(n,)``,
    the sum over Gram features over C² / 2, and the mean over orders."""
    total = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
    for order, low, high in zip(orders, usual.low, usual.high, strict=True):
        for first in range(0, len(maps), 1024):
            some = gram(maps[first : first + 1024], order)
            below = (low - some).clamp(min=0) / (low + _SMALL).abs()
            above = (some - high).clamp(min=0) / (high + _SMALL).abs()
            total[first : first + 1024] += (below + above).sum(dim=1)
    return total / (maps.shape[1] ** 2 / 2) / len(orders)


def clean_threshold(clean: Tensor, orders: Sequence[int], width: float, quantile: float) -> float:
    """The ``quantile`` of clean images' deviations from the range of the others, five-fold.

    The folds are a fifth of the images each, rounded down; what is left over is in none of them.
    """
    size = len(clean) // _FOLDS
    found = []
    for first in range(0, _FOLDS * size, size):
        others = torch.cat([clean[:first], clean[first + size :]])
        usual = fit_range(others, orders, width)
        found.append(deviations(clean[first : first + size], usual, orders))
    ordered = torch.cat(found).sort().values
    return float(ordered[int(len(ordered) * quantile)])


def two_sample(first: Tensor, second: Tensor) -> float:
    """Kernel two-sample statistic of (n, F) and (m, F): the squared mean discrepancy under two
    Gaussian kernels around the median distance, times n m / (n + m)."""
    both = torch.cat([first, second])
    distances = torch.cdist(both, both).square()
    # The median over all pairs, each twice and each row with itself: the lower of two.
    bandwidth = distances.median().clamp(min=1e-12)
    kernel = sum((-distances / (bandwidth * scale)).exp() for scale in (0.5, 1.0))
    assert isinstance(kernel, Tensor)
    n, m = len(first), len(second)
    gap = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(gap * n * m / (n + m))


def maps_before_last_stage(network: nn.Module, images: Tensor) -> Tensor:
    """The maps ``(N, C, H, W)`` that enter a residual network's last stage, which begins at the
    last block with a stride; the last maps of other networks."""
    halves = at_the_last_maps(network)
    layers = [] if halves is None else list(halves.maps)
    strided = [number for number, layer in enumerate(layers) if _strides(layer)]
    if not strided or not strided[-1] or not isinstance(network, Network):
        return feature_map(network, images)
    normalise, before = network.normalise, nn.Sequential(*layers[: strided[-1]])

    def answer(some: Tensor) -> Tensor:
        found: Tensor = before(normalise(some))
        return found

    return in_pieces(answer, images)


def _strides(layer: nn.Module) -> bool:
    parts = (part for part in layer.modules() if isinstance(part, nn.Conv2d))
    return any(max(part.stride) > 1 for part in parts)
