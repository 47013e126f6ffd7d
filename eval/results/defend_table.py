"""The record of a ``defend`` run as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...defenses.base import FAMILIES, Family
from .columns import FAMILY_COLUMNS, budget_label, twin_pair
from .formatting import aligned, duration
from .record import Outcome, Record
from .subject import subject, victims_text


def defend_table(record: Record, folder: Path) -> str:
    """The figures of each defense, a table for every family."""
    bench, config = record.bench, record.config
    lines = ["", f"defend: {subject(record)}"]
    lines += [f"  ! {label}" for label in record.labels]
    lines += [
        f"  {budget_label(bench['budget'])}",
        f"  holdout {bench['holdout']} clean images · "
        f"{config['victims']} victims: {victims_text(config)} · figures: attacked set (clean twin)",
        "",
        f"  no defense: CTA {twin_pair(record.metrics, 'clean_test_accuracy')}, "
        f"ASR {twin_pair(record.metrics, 'attack_success_rate')}",
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
    shown = {
        k: t for k, t in FAMILY_COLUMNS[family].items() if any(k in metrics for metrics in done)
    }
    rows = [[family, *shown.values()]]
    notes: dict[str, str] = {}
    for name, outcome in members.items():
        figures = [str(twin_pair(outcome.metrics, key)) for key in shown]
        note = "; ".join([*_tuned(outcome), *([outcome.caution] if outcome.caution else [])])
        if outcome.status != "done":
            figures = [outcome.status, *[""] * (len(shown) - 1)] if shown else []
            note = f"{outcome.status}: {outcome.reason}"
        if note:
            notes[name] = note
        rows.append([name, *figures])
    return ["", *aligned(rows), *(f"    {name}: {note}" for name, note in notes.items())]


def _tuned(outcome: Outcome) -> list[str]:
    """The settings that tuning chose, for the attacked set and for its twin."""
    found = []
    for side, tuning in outcome.tuning.items():
        for each in tuning.tried:
            if each.chosen:
                changed = {k: v for k, v in each.options.items() if v != outcome.options.get(k)}
                text = ", ".join(f"{key} {value}" for key, value in changed.items())
                found.append(f"{side}: {text or 'published settings'}")
    return found
