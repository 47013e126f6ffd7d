"""Rates on test images, and their summaries over victims or seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, final

import numpy
import torch
from kornia.metrics import psnr, ssim
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ...attacks import TestCase
from ...distill.engine import PLAIN, Engine
from ...distill.training import predict
from ...distill.types import Batch
from .statistics import FEWEST_VALUES, t_interval, wilson

MetricKind = Literal["rate", "share", "number"]
"""A rate in [0, 1] of each victim (an accuracy), the share of yes among yes-or-no answers (alarms),
or a number without bounds."""
SHARES = frozenset(
    {"set_alarm", "alarm", "set_alarm_calibrated", "alarm_calibrated", "target_found"}
    | {"target_suspected", "target_found_calibrated"}
)
_RATES = frozenset(
    {"clean_test_accuracy", "attack_success_rate", "attack_success_rate_all", "robust_accuracy"}
    | {"attack_success_rate_published"}
    | {"rows_flagged", "rows_left", "auroc", "defense_effectiveness_rating", "ssim"}
    | {"false_trigger_rate"}
)
_RATE_PREFIXES = ("row_", "tpr_", "fpr_")


def kind_of(name: str) -> MetricKind:
    """The kind of the metric ``name``, or of the metric that it is the control of; a number where
    the metric is unknown."""
    base = name.removeprefix("control_")
    rate = base in _RATES or base.startswith(_RATE_PREFIXES)
    return "share" if base in SHARES else "rate" if rate else "number"


@final
class Summary(BaseModel):
    """One metric over victims or seeds; what can't be computed is ``None``, never NaN.

    std: ddof 1. ci95: the 95 % interval of the mean: Student's t, cut to [0, 1] for a rate;
    Wilson's for a share; ``None`` for fewer than three values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float | None
    std: float | None
    ci95: tuple[float, float] | None
    values: tuple[float | None, ...]


def summarise(values: Sequence[float | None], kind: MetricKind = "number") -> Summary:
    """Mean, deviation and 95 % interval of the values that exist."""
    found = numpy.array([value for value in values if value is not None], dtype=float)
    kept = tuple(None if value is None else float(value) for value in values)
    if not len(found):
        return Summary(mean=None, std=None, ci95=None, values=kept)
    mean = float(found.mean())
    if len(found) == 1:
        return Summary(mean=mean, std=None, ci95=None, values=kept)
    std = float(found.std(ddof=1))
    return Summary(mean=mean, std=std, ci95=_interval(mean, std, len(found), kind), values=kept)


def _interval(mean: float, std: float, count: int, kind: MetricKind) -> tuple[float, float] | None:
    if count < FEWEST_VALUES:
        return None
    if kind == "share":
        return wilson(mean, count)
    low, high = t_interval(mean, std, count)
    return (max(0.0, low), min(1.0, high)) if kind == "rate" else (low, high)


Scores = Mapping[str, float | None]
"""The rates of one victim by name, as ``rates_of`` gives them."""

_CLEAN_SCORES = {"clean_test_accuracy"}
_EARLIER_SCORES = _CLEAN_SCORES | {
    "attack_success_rate",
    "attack_success_rate_all",
    "robust_accuracy",
}  # under an attack, before false triggers were counted
_ATTACK_SCORES = _EARLIER_SCORES | {"false_trigger_rate"}
_PUBLISHED_SCORES = _ATTACK_SCORES | {"attack_success_rate_published"}


def is_scores(found: object) -> bool:
    """Whether ``found``, from a file, is a victim's ``Scores``, with or without a test case."""
    known = (_CLEAN_SCORES, _EARLIER_SCORES, _ATTACK_SCORES, _PUBLISHED_SCORES)
    if not isinstance(found, dict) or found.keys() not in known:
        return False
    values = [value for value in found.values() if value is not None]
    return all(isinstance(value, int | float) and 0 <= value <= 1 for value in values)


def rates(network: nn.Module, test: Batch, case: TestCase | None, engine: Engine = PLAIN) -> Scores:
    """The rates of one victim, whose passes ``engine`` runs; see ``rates_of``."""
    return rates_of(partial(predict, network, engine=engine), test, case)


def rates_of(
    predictor: Callable[[Tensor], Tensor], test: Batch, case: TestCase | None
) -> dict[str, float | None]:
    """The rates of a predictor (images to class numbers), in [0, 1]; ``None`` for no images.

    clean_test_accuracy; with a test case also attack_success_rate over the eligible images,
    attack_success_rate_all over all images (the root paper's, at least about 1 / classes),
    robust_accuracy: the share of triggered eligible images that get their true label, and
    false_trigger_rate: the share of eligible images that get their target without the trigger.
    Where the attack's paper has its own images, also attack_success_rate_published over these.
    """
    clean = predictor(test.images)
    scores: dict[str, float | None] = {"clean_test_accuracy": share(clean == test.labels)}
    if case is None:
        return scores
    labels = predictor(case.triggered)
    hit = labels == case.targets
    scores["attack_success_rate"] = share(hit[case.eligible])
    scores["attack_success_rate_all"] = share(hit)
    scores["robust_accuracy"] = share((labels == test.labels)[case.eligible])
    scores["false_trigger_rate"] = share((clean == case.targets)[case.eligible])
    if case.published is not None:
        hit = predictor(case.published.triggered) == case.published.targets
        scores["attack_success_rate_published"] = share(hit)
    return scores


def effectiveness(before: Scores, after: Scores) -> float | None:
    """Defense effectiveness rating: (max(0, ΔASR) − max(0, ΔCTA) + 1) / 2, Δ = before − after.

    Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
    ICCV 2023. Between 0 and 1; 0.5 where nothing is gained or lost. ``None`` where a rate is
    missing.
    """
    drops = []
    for name in ("attack_success_rate", "clean_test_accuracy"):
        first, then = before.get(name), after.get(name)
        if first is None or then is None:
            return None
        drops.append(max(0.0, first - then))
    return (drops[0] - drops[1] + 1) / 2


def collect(attacked: Sequence[Scores], control: Sequence[Scores] | None) -> dict[str, Summary]:
    """The metrics of a record, from the rates of each victim and of each victim of the clean twin.

    Victim k of the attacked set and victim k of the control share initial weights and training
    order, so backdoor_gain = ASR − control ASR is paired. A rate that only some victims have (the
    others were measured by an earlier version) is ``None`` for the others.
    """
    values = _by_name(attacked)
    if control is not None:
        values |= {f"control_{name}": each for name, each in _by_name(control).items()}
        if "attack_success_rate" in values:
            ours, theirs = values["attack_success_rate"], values["control_attack_success_rate"]
            values["backdoor_gain"] = [
                None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)
            ]
    return {name: summarise(each, kind_of(name)) for name, each in values.items()}


def _by_name(victims: Sequence[Scores]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for scores in victims for name in scores)
    return {name: [scores.get(name) for scores in victims] for name in names}


def over_seeds(records: Sequence[Mapping[str, Summary]]) -> dict[str, Summary]:
    """The metrics that all ``records`` have, over distillation seeds: each seed counts once, with
    its mean over victims. Empty for no records."""
    names = [name for name in records[0] if all(name in r for r in records)] if records else []
    return {name: summarise([r[name].mean for r in records], kind_of(name)) for name in names}


def share(hits: Tensor) -> float | None:
    """The share of true values in ``hits`` (N,); ``None`` for N = 0."""
    return float(hits.double().mean()) if len(hits) else None


def stealth(images: Tensor, triggered: Tensor) -> Scores:
    """How visible a trigger is: mean PSNR (dB) and SSIM of triggered against clean images.

    The window of SSIM is 11 pixels, or the largest odd size that a smaller image allows. ``None``
    where there is no image, and for an infinite PSNR (the trigger changed no pixel).
    """
    if not len(images):
        return {"psnr": None, "ssim": None}
    window = min(11, (min(images.shape[-2:]) - 1) // 2 * 2 + 1)
    pairs = zip(triggered, images, strict=True)
    ratios = torch.stack([psnr(ours, theirs, max_val=1.0) for ours, theirs in pairs])
    ratio = float(ratios.mean())
    return {
        "psnr": ratio if math.isfinite(ratio) else None,
        "ssim": float(ssim(triggered, images, window).mean()),
    }


Distance = Mapping[str, float]
"""How far two sets are apart: ``linf``, ``l2`` and ``rms``, as ``distance`` gives them."""


def distance(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far the images of two sets are apart, row k from row k; both ``(N, C, H, W)``, N > 0.

    linf: the largest difference of a pixel. l2: the L2 norm of an image's difference, mean over the
    images. rms: the root mean square over all pixels.
    """
    apart = ours - theirs
    return {
        "linf": float(apart.abs().max()),
        "l2": float(apart.flatten(1).norm(dim=1).mean()),
        "rms": float(apart.square().mean().sqrt()),
    }


def mean_distance(distances: Sequence[Distance]) -> dict[str, float] | None:
    """The mean of each figure; ``None`` for no distances."""
    if not distances:
        return None
    return {name: sum(each[name] for each in distances) / len(distances) for name in distances[0]}
