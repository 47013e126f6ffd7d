"""The verdict on a defense: whether it meets a benchmark's thresholds, on sufficient evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .columns import twin_pair
from .record import Metrics, Outcome

FEWEST_JUDGED = 10
"""A detector of sets or models needs as many attacked ones, and as many clean ones, for a
verdict."""
DETECTION_FIGURES: Mapping[str, str] = {
    "row_auroc": "rows",
    "auroc": "inputs",
    "set_auroc": "sets",
    "model_auroc": "models",
}
"""The figures that judge a detector, and what each is measured on; the first that exists counts."""
_LEAST_AUROC, _LEAST_TARGET_SHARE = 0.9, 0.8
_MOST_ASR, _MOST_LOST_CTA = 0.1, 0.05


def detection_figure(metrics: Metrics) -> str | None:
    """The figure that judges a detector; ``None`` for a defense that is no detector."""
    return next((name for name in DETECTION_FIGURES if name in metrics), None)


def verdict(outcomes: Sequence[Outcome], metrics: Metrics, before: Metrics) -> bool | None:
    """Whether a defense holds; ``None`` where its figures are no sufficient evidence.

    A detector holds from an AUROC of 0.9 on, or where the target is the most anomalous class in
    80 % of the models; another defense holds with an ASR of at most 0.1 and at most 0.05 of CTA
    lost.

    outcomes: one for each seed. metrics: their summary over seeds. before: the metrics without a
    defense.
    """
    return meets_thresholds(metrics, before) if _sufficient(outcomes, metrics) else None


def _sufficient(outcomes: Sequence[Outcome], metrics: Metrics) -> bool:
    """Whether the budget, and the number of sets or models, allow a verdict."""
    if not outcomes or any(outcome.budget == "quick" for outcome in outcomes):
        return False
    detector = detection_figure(metrics)
    if detector == "set_auroc":
        return len(outcomes) >= FEWEST_JUDGED
    if detector == "model_auroc":
        models = [len(outcome.metrics["model_statistic"].values) for outcome in outcomes]
        # A method that raises no alarm (BTI-DBF) gives no verdict either.
        return sum(models) >= FEWEST_JUDGED and "alarm" in metrics
    return True


def meets_thresholds(metrics: Metrics, before: Metrics) -> bool | None:
    """Whether the figures meet the thresholds; ``None`` where they are missing, or where the attack
    did not work without a defense either."""
    detector = detection_figure(metrics)
    if detector is not None:
        target, area = metrics.get("target_suspected"), metrics[detector].mean
        if target is not None and target.mean is not None and target.mean >= _LEAST_TARGET_SHARE:
            return True
        return None if area is None else area >= _LEAST_AUROC
    asr_before, asr = (twin_pair(m, "attack_success_rate").attacked for m in (before, metrics))
    cta_before, cta = (twin_pair(m, "clean_test_accuracy").attacked for m in (before, metrics))
    if asr_before is None or asr is None or cta_before is None or cta is None:
        return None
    if asr_before <= _MOST_ASR:
        return None
    return asr <= _MOST_ASR and cta_before - cta <= _MOST_LOST_CTA
