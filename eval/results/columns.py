"""Which figures a table shows: columns by family of defenses, and pairs of set and clean twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ...defenses.base import Family
from .record import Metrics

Columns = Mapping[str, str]
"""The title of each metric's column."""

UNDEFENDED_COLUMNS: Columns = {
    "clean_test_accuracy": "CTA",
    "control_clean_test_accuracy": "CTA, clean twin",
    "attack_success_rate": "ASR",
    "control_attack_success_rate": "ASR, control",
    "backdoor_gain": "backdoor gain",
}
"""The columns of victims without a defense."""

SURVIVAL_COLUMNS: Columns = {
    name: title for name, title in UNDEFENDED_COLUMNS.items() if name != "backdoor_gain"
}
"""The columns of the variants of a set."""

_SET = {
    "row_auroc": "AUROC of rows",
    "set_statistic": "statistic",
    "set_alarm": "alarm",
    "rows_flagged": "rows flagged",
    "target_suspected": "target most anomalous",
    "target_found": "target found",
}
_INPUT = {"auroc": "AUROC", "tpr_at_5": "TPR at 5 %", "fpr_at_5": "FPR", "fpr_paper": "FPR paper"}
_RATES = {
    "attack_success_rate": "ASR",
    "clean_test_accuracy": "CTA",
    "robust_accuracy": "RA",
    "defense_effectiveness_rating": "DER",
}
_MODEL = {
    "model_statistic": "statistic",
    "alarm": "alarm",
    "target_found": "target found",
    "target_suspected": "target most anomalous",
}
FAMILY_COLUMNS: Mapping[Family, Columns] = {
    "set scores": _SET,
    "input scores": _INPUT,
    "inspection": _MODEL,
    "sanitised set": _RATES,
    "training": {**_RATES, "epsilon": "ε"},
    "purified input": _RATES,
    "repair": _RATES,
}
"""The columns of each family of defenses, the most important first."""

SEED_COLUMNS: Mapping[str, Columns] = {
    "row_auroc": {
        "row_tpr_paper": "TPR, paper",
        "row_fpr_paper": "FPR, paper",
        "row_tpr_calibrated": "TPR, calibrated",
        "row_fpr_calibrated": "FPR, calibrated",
    },
    "set_auroc": {
        "set_auroc": "AUROC of sets",
        "set_alarm": "alarm, paper",
        "set_alarm_calibrated": "alarm, calibrated",
        "target_suspected": "target most anomalous",
        "rows_flagged": "rows flagged",
        "target_found": "target found",
    },
    "model_auroc": {
        "model_auroc": "AUROC of models",
        "target_suspected": "target most anomalous",
        "alarm": "alarm, paper",
        "alarm_calibrated": "alarm, calibrated",
        "target_found": "target found",
        "target_found_calibrated": "found, calibrated",
    },
}
"""Further columns of a detector over distillation seeds, by the figure that judges it."""

_BUDGETS: Mapping[str, str] = {
    "quick": "budget quick: less work than published, no verdict on a defense",
    "paper": "budget paper: published settings",
    "tuned": "budget tuned: the strongest settings that keep the held-out accuracy",
}


def budget_label(budget: str) -> str:
    """The label that must stand beside a budget's figures."""
    return _BUDGETS.get(budget, f"budget {budget}")


@final
@dataclass(frozen=True)
class TwinPair:
    """One figure on the attacked sets and on their clean twins; ``None`` where it is missing."""

    attacked: float | None
    twin: float | None

    def __str__(self) -> str:
        ours, theirs = (
            "–" if value is None else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
            for value in (self.attacked, self.twin)
        )
        return f"{ours} ({theirs})"


def twin_pair(metrics: Metrics, name: str) -> TwinPair:
    """The mean of the metric ``name`` and of its control."""
    ours, theirs = metrics.get(name), metrics.get(f"control_{name}")
    return TwinPair(ours.mean if ours else None, theirs.mean if theirs else None)
