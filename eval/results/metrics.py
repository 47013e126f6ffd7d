"""What is measured: rates on test images, and their summaries over victims or seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, final

import numpy
import torch
from kornia.metrics import psnr, ssim
from pydantic import BaseModel, ConfigDict
from scipy import optimize, stats
from torch import Tensor, nn

from ...attacks import TestCase
from ...distill.training import predict
from ...distill.types import Batch

Kind = Literal["rate", "share", "number"]
"""What a figure is: a rate in [0, 1] that each victim has (an accuracy), the share of yes among
yes-or-no answers (alarms), or a number without bounds."""
_EDGE = 1e-9
FEWEST_VALUES = 3
"""Fewer values have no interval."""
SHARES = frozenset(
    {"set_alarm", "alarm", "set_alarm_calibrated", "alarm_calibrated", "target_found"}
    | {"target_suspected", "target_found_calibrated"}
)
_RATES = frozenset(
    {"clean_test_accuracy", "attack_success_rate", "attack_success_rate_all", "robust_accuracy"}
    | {"rows_flagged", "rows_left", "auroc", "defense_effectiveness_rating", "ssim"}
)
_KINDS_OF_RATES = ("row_", "tpr_", "fpr_")


def kind_of(name: str) -> Kind:
    """The kind of the metric ``name``; a control's is that of its metric. One that is not known is
    a number."""
    base = name.removeprefix("control_")
    rate = base in _RATES or base.startswith(_KINDS_OF_RATES)
    return "share" if base in SHARES else "rate" if rate else "number"


@final
class Summary(BaseModel):
    """One measure over victims or seeds; what can't be computed is ``None``, never NaN.

    std: ddof 1. ci95: the 95 % interval of the mean: Student's t, cut to [0, 1] for a rate;
    Wilson's for a share; ``None`` for fewer than three values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float | None
    std: float | None
    ci95: tuple[float, float] | None
    values: tuple[float | None, ...]


def summarise(values: Sequence[float | None], kind: Kind = "number") -> Summary:
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


def _interval(mean: float, std: float, count: int, kind: Kind) -> tuple[float, float] | None:
    if count < FEWEST_VALUES:
        return None
    if kind == "share":
        return wilson(mean, count)
    half = float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    low, high = mean - half, mean + half
    return (max(0.0, low), min(1.0, high)) if kind == "rate" else (low, high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval (Wilson, 1927) of a ``share`` of ``count`` independent answers.

    A seed whose victims differ counts as one answer with its mean: the interval is then too wide
    rather than too narrow.
    """
    z = float(stats.norm.ppf(0.975))
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float] | None:
    """The 95 % score interval of an AUROC of that many independent positives and negatives.

    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic",
    Statistics in Medicine 25 (2006), method 5: the areas whose own deviation (Hanley and McNeil's,
    with both counts replaced by their mean) reaches to the one found. Unlike a bootstrap it has a
    width at 0 and 1.
    """
    if min(positives, negatives) < FEWEST_VALUES:
        return None
    z, mean = float(stats.norm.ppf(0.975)), (positives + negatives) / 2 - 1

    def excess(theta: float) -> float:
        """How far ``area`` lies outside of the interval around ``theta``; negative within."""
        spread = theta * (1 - theta) / (positives * negatives)
        spread *= 1 + mean * (1 - theta) / (2 - theta) + mean * theta / (1 + theta)
        return (area - theta) ** 2 - z**2 * spread

    inside = min(max(area, _EDGE), 1 - _EDGE)  # at 0 and 1 themselves nothing deviates
    low = 0.0 if area <= 0 else float(optimize.brentq(excess, 0.0, inside))
    high = 1.0 if area >= 1 else float(optimize.brentq(excess, inside, 1.0))
    return low, high


Scores = Mapping[str, float | None]


def rates(network: nn.Module, test: Batch, case: TestCase | None) -> Scores:
    """What one victim scores, as shares of 1; see ``rates_of``."""
    return rates_of(partial(predict, network), test, case)


def rates_of(
    predictor: Callable[[Tensor], Tensor], test: Batch, case: TestCase | None
) -> dict[str, float | None]:
    """What a predictor (images to class numbers) scores; ``None`` where no image counts.

    clean_test_accuracy; and with a test case: attack_success_rate over the images that don't
    belong to their target class anyway, attack_success_rate_all over all images (the paper's,
    whose floor is about 1 / classes), robust_accuracy: triggered eligible images given their true
    label all the same.
    """
    scores: dict[str, float | None] = {
        "clean_test_accuracy": share(predictor(test.images) == test.labels)
    }
    if case is None:
        return scores
    labels = predictor(case.triggered)
    hit = labels == case.targets
    scores["attack_success_rate"] = share(hit[case.eligible])
    scores["attack_success_rate_all"] = share(hit)
    scores["robust_accuracy"] = share((labels == test.labels)[case.eligible])
    return scores


def collect(attacked: Sequence[Scores], control: Sequence[Scores] | None) -> dict[str, Summary]:
    """The record's metrics from each victim's rates and its twin's.

    Victim k of the attacked set and victim k of the control share weights and training order, so
    that backdoor_gain = ASR − control ASR is paired.
    """
    values = {name: [scores[name] for scores in attacked] for name in attacked[0]}
    if control is not None:
        for name in control[0]:
            values[f"control_{name}"] = [scores[name] for scores in control]
        if "attack_success_rate" in values:
            ours, theirs = values["attack_success_rate"], values["control_attack_success_rate"]
            values["backdoor_gain"] = [
                None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)
            ]
    return {name: summarise(each, kind_of(name)) for name, each in values.items()}


def over_seeds(records: Sequence[Mapping[str, Summary]]) -> dict[str, Summary]:
    """Metrics over distillation seeds: each seed's mean over its victims, then the interval."""
    names = records[0]
    return {
        name: summarise([record[name].mean for record in records], kind_of(name))
        for name in names
        if all(name in record for record in records)
    }


def share(hits: Tensor) -> float | None:
    """The share of true values in ``hits`` (N,); ``None`` where there are none to count."""
    return float(hits.double().mean()) if len(hits) else None


def stealth(images: Tensor, triggered: Tensor) -> Scores:
    """How visible a trigger is: mean PSNR (dB) and SSIM of triggered against clean images.

    SSIM's window is 11 pixels, or what a smaller image has room for. ``None`` where there is no
    image, and for a PSNR that is infinite because the trigger left an image as it was.
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
