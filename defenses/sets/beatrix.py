"""The defense ``beatrix``."""

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
from ..common.maps import feature_map, split_at_last_maps

_FOLDS = 5
_PUBLISHED = 30
_SMALL = 1e-6


@final
class BeatrixOptions(DefenseOptions):
    """The official code's settings; the thresholds are the paper's."""

    orders: int = Field(8, ge=1, le=16, description="highest power of the Gram matrices, from 1")
    width: float = Field(10.0, gt=0, description="half width of the range around the median, MADs")
    quantile: float = Field(
        0.95, gt=0, lt=1, description="quantile of clean deviations that is a row's threshold"
    )
    threshold: float = Field(math.exp(2), gt=0, description="anomaly index that is an alarm")
    most: int = Field(500, ge=2, description="largest number of rows of a group in the test")


@final
class Beatrix(SetScorer):
    """Beatrix: correlations between a poisoned row's channels are outside its class's range (Ma,
    Wang, Sun, Nie, Tian, Wang, Ni, "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram
    Matrices", NDSS 2023).

    In words: compute Gram matrices of powers 1 to 8 of a row's feature maps. Add up how far their
    entries are outside the range of the clean images of its class (median ± 10 MAD). Rows above the
    95 % quantile of the clean images are one group, the others another. A kernel two-sample
    statistic between the two is the contamination of the class, and an outlier among the classes
    (anomaly index above exp(2)) is an alarm.

    Needs five held-out images of every class (the paper has 30), and two rows in a class.
    A row's score is its deviation minus the threshold of its class.

    As in the official code (wanlunsec/Beatrix, ``defenses/Beatrix/Beatrix.py``): medians of Gram
    features and of distances are torch's, the lower of the two middle values of an even count (the
    anomaly index, by numpy, takes their mean); the quantile is the entry of the sorted deviations
    at 0.95 times their number, without interpolation; the maps are the input of a ResNet's last
    stage.

    Deviations: the anomaly index is one-sided (the official code's is not). In networks without
    residual blocks, which have no stages, the maps are those of the last convolution; a network
    without maps counts as one pixel with as many channels as features. Clean images are grouped by
    their true label (official code: the predicted one). The two-sample test uses at most 500 rows
    of a group, drawn at random (official code: 500 clean and 500 triggered images of a class).
    Powers are computed in double precision.
    """

    name = "beatrix"
    names_class = True
    Options = BeatrixOptions
    options: BeatrixOptions
    needs = f"{_FOLDS} held-out images of every class ({_PUBLISHED} in the paper), 2 rows in each"
    quick: ClassVar[Mapping[str, Any]] = {"orders": 4}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        few = held_out_needed(view, _FOLDS) or rows_needed(view, 2)
        return classes_needed(view) or few

    def caution(self, view: DefenderView) -> str | None:
        fewest = fewest_held_out(view)
        if fewest >= _PUBLISHED:
            return None
        return f"{fewest} held-out images of a class, the paper has {_PUBLISHED}: a narrow range"

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
            found = deviations(maps[members], gram_range(known, orders, options.width), orders)
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
        """The two-sample statistic between the rows of a class inside and outside the range."""
        groups = []
        for number, members in enumerate((~outside, outside)):
            own = maps[members].mean(dim=(2, 3)).double()
            generator = view.generator(self.name, label, number)
            order = torch.randperm(len(own), generator=generator)[: self.options.most]
            groups.append(own[order.to(own.device)])
        return two_sample(*groups) if all(map(len, groups)) else 0.0


@final
@dataclass(frozen=True, eq=False)
class GramRange:
    """The range of a class's Gram features: for each order the bounds, each ``(G,)``."""

    low: Sequence[Tensor]
    high: Sequence[Tensor]


def gram(maps: Tensor, order: int) -> Tensor:
    """Correlations of channels ``(n, C (C + 1) / 2)`` of ``maps`` (n, C, H, W): the signed
    ``order``-th root of the upper triangle of the Gram matrix of their ``order``-th powers."""
    powers = maps.double().flatten(2) ** order
    products = powers @ powers.transpose(1, 2)
    rows, columns = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
    upper = products[:, rows, columns]
    return upper.sign() * upper.abs() ** (1 / order)


def gram_range(clean: Tensor, orders: Sequence[int], width: float) -> GramRange:
    """The Gram features of ``clean`` (m, C, H, W): their median, plus and minus ``width`` MADs."""
    low, high = [], []
    for order in orders:
        found = gram(clean, order)
        median = found.median(dim=0).values  # the lower of two, as in the official code
        spread = width * (found - median).abs().median(dim=0).values
        low.append(median - spread)
        high.append(median + spread)
    return GramRange(low, high)


def deviations(maps: Tensor, clean: GramRange, orders: Sequence[int]) -> Tensor:
    """How far ``maps`` (n, C, H, W) are outside the ``clean`` range, relative to its bounds:
    ``(n,)``, summed over Gram features, divided by C² / 2, and averaged over orders."""
    total = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
    for order, low, high in zip(orders, clean.low, clean.high, strict=True):
        for first in range(0, len(maps), 1024):
            some = gram(maps[first : first + 1024], order)
            below = (low - some).clamp(min=0) / (low + _SMALL).abs()
            above = (some - high).clamp(min=0) / (high + _SMALL).abs()
            total[first : first + 1024] += (below + above).sum(dim=1)
    return total / (maps.shape[1] ** 2 / 2) / len(orders)


def clean_threshold(clean: Tensor, orders: Sequence[int], width: float, quantile: float) -> float:
    """The ``quantile`` of clean images' deviations, by five-fold cross-validation.

    A fold is a fifth of the images, rounded down; the remaining images are in none.
    """
    size = len(clean) // _FOLDS
    found = []
    for first in range(0, _FOLDS * size, size):
        others = torch.cat([clean[:first], clean[first + size :]])
        known = gram_range(others, orders, width)
        found.append(deviations(clean[first : first + size], known, orders))
    ordered = torch.cat(found).sort().values
    return float(ordered[int(len(ordered) * quantile)])


def two_sample(first: Tensor, second: Tensor) -> float:
    """Kernel two-sample statistic of (n, F) and (m, F): the squared maximum mean discrepancy under
    two Gaussian kernels around the median distance, times n m / (n + m)."""
    both = torch.cat([first, second])
    distances = torch.cdist(both, both).square()
    # Over all entries, with both orders of a pair and the zero diagonal; the lower of two.
    bandwidth = distances.median().clamp(min=1e-12)
    kernel = sum((-distances / (bandwidth * scale)).exp() for scale in (0.5, 1.0))
    assert isinstance(kernel, Tensor)
    n, m = len(first), len(second)
    gap = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(gap * n * m / (n + m))


def maps_before_last_stage(network: nn.Module, images: Tensor) -> Tensor:
    """The maps ``(N, C, H, W)`` that a residual network's last stage takes, which begins at the
    last block with a stride; the last maps of other networks."""
    split = split_at_last_maps(network)
    layers = [] if split is None else list(split.maps)
    strided = [number for number, layer in enumerate(layers) if _strides(layer)]
    if not strided or not strided[-1] or not isinstance(network, Network):
        return feature_map(network, images)
    return in_pieces(nn.Sequential(network.normalise, *layers[: strided[-1]]), images)


def _strides(layer: nn.Module) -> bool:
    parts = (part for part in layer.modules() if isinstance(part, nn.Conv2d))
    return any(max(part.stride) > 1 for part in parts)
