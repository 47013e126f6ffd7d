"""What defenses did, for people: which figure of each family is the one to look at, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ...defenses.base import FAMILIES, Family
from ..run.progress import duration
from .record import Metrics, Outcome, Record

# For each family: the figures of a table's columns, with their heads. The first is the one to look
# at. In a family of detectors it is better when high; of the others', when low.
_SET = {
    "row_auroc": "AUROC of rows",
    "set_statistic": "statistic",
    "set_alarm": "alarm",
    "rows_flagged": "rows flagged",
    "target_suspected": "target most anomalous",
    "target_found": "target found",
}
_INPUT = {"auroc": "AUROC", "tpr_at_5": "TPR at 5 %", "fpr_at_5": "FPR", "fpr_paper": "FPR paper"}
_ANSWERS = {
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
COLUMNS: Mapping[Family, Mapping[str, str]] = {
    "set scores": _SET,
    "input scores": _INPUT,
    "inspection": _MODEL,
    "sanitised set": _ANSWERS,
    "training": {**_ANSWERS, "epsilon": "ε"},
    "purified input": _ANSWERS,
    "repair": _ANSWERS,
}


_BUDGETS: Mapping[str, str] = {
    "quick": "budget quick: less work than published, no verdict on a defense",
    "paper": "budget paper: published settings",
    "tuned": "budget tuned: the strongest settings that keep the held-out accuracy",
}


def budget_label(budget: str) -> str:
    """What must stand beside a budget's figures."""
    return _BUDGETS.get(budget, f"budget {budget}")


@final
@dataclass(frozen=True)
class Cell:
    """One figure on the attacked sets and on their clean twins; ``None`` where there is none."""

    attacked: float | None
    twin: float | None

    def __str__(self) -> str:
        ours, theirs = (
            "–" if value is None else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
            for value in (self.attacked, self.twin)
        )
        return f"{ours} ({theirs})"


def cell(metrics: Metrics, name: str) -> Cell:
    """The means of a figure and of its twin."""
    ours, theirs = metrics.get(name), metrics.get(f"control_{name}")
    return Cell(ours.mean if ours else None, theirs.mean if theirs else None)


def defense_table(record: Record, folder: Path) -> str:
    """The bench's record as a table by family."""
    bench, config = record.bench, record.config
    lines = ["", f"defend: {config['dataset']} · {record.distilled.get('source')}"]
    lines += [f"  ! {label}" for label in record.labels]
    lines += [
        f"  {budget_label(bench['budget'])}",
        f"  holdout {bench['holdout']} clean images · "
        f"{config['victims']} victims · figures: attacked set (clean twin)",
        "",
        f"  no defense: CTA {cell(record.metrics, 'clean_test_accuracy')}, "
        f"ASR {cell(record.metrics, 'attack_success_rate')}",
    ]
    for family in FAMILIES:
        members = {n: o for n, o in record.defenses.items() if o.family == family}
        lines += _family(family, members)
    lines += ["", f"  time: {duration(record.timings.get('defenses_seconds', 0.0))} in defenses"]
    lines += [f"  {folder / name}" for name in ("record.json", "defenses.png")]
    return "\n".join(lines)


def _family(family: Family, members: Mapping[str, Outcome]) -> list[str]:
    if not members:
        return []
    done = [outcome.metrics for outcome in members.values() if outcome.status == "done"]
    shown = {k: t for k, t in COLUMNS[family].items() if any(k in metrics for metrics in done)}
    rows = [[family, *shown.values()]]
    notes: dict[str, str] = {}
    for name, outcome in members.items():
        told = [str(cell(outcome.metrics, key)) for key in shown]
        if outcome.status != "done":
            notes[name] = f"{outcome.status}: {outcome.reason}"
            told = [outcome.status, *[""] * (len(shown) - 1)] if shown else []
        else:
            parts = [*_tuned(outcome), *([outcome.caution] if outcome.caution else [])]
            if parts:
                notes[name] = "; ".join(parts)
        rows.append([name, *told])
    return ["", *_aligned(rows), *(f"    {name}: {note}" for name, note in notes.items())]


def _tuned(outcome: Outcome) -> list[str]:
    """Which settings a tuned defender chose, for the attacked set and for its twin."""
    found = []
    for side, tuning in outcome.tuning.items():
        for each in tuning.tried:
            if each.chosen:
                changed = {k: v for k, v in each.options.items() if v != outcome.options.get(k)}
                text = ", ".join(f"{key} {value}" for key, value in changed.items())
                found.append(f"{side}: {text or 'published settings'}")
    return found


def _aligned(rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
