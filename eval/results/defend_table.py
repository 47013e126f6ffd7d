"""The record of a ``defend`` run as a summary: a table for every family, and a conclusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...defenses.base import FAMILIES, Family
from .blocks import (
    Block,
    Paragraph,
    TextCell,
    TextTable,
    Tone,
    alarm_tone,
    asr_tone,
    auroc_tone,
    cta_tone,
    plain,
)
from .columns import FAMILY_COLUMNS, TwinPair, budget_label, twin_pair
from .conclusion import by_effect, conclusion
from .formatting import duration
from .record import Metrics, Outcome, Record
from .subject import objects_text, subject, victims_text


def defend_table(record: Record, folder: Path) -> str:
    """The summary as text."""
    return plain(defend_blocks(record, folder))


def defend_blocks(record: Record, folder: Path) -> list[Block]:
    """The figures of each family, the best defense first; what does not apply, folded; one
    conclusion."""
    bench, config = record.bench, record.config
    blocks: list[Block] = [
        "",
        TextCell(f"defend: {subject(record)}", "title"),
        f"  {folder / 'record.json'}",
    ]
    blocks += [f"  {objects_text(record)}"] if record.objects else []
    blocks += [TextCell(f"  ! {label}", "warning") for label in record.labels]
    blocks += [
        f"  {budget_label(bench['budget'])}",
        f"  holdout {bench['holdout']} clean images · "
        f"{config['victims']} victims: {victims_text(config)} · figures: attacked set (clean twin)",
        "",
        f"  no defense: CTA {twin_pair(record.metrics, 'clean_test_accuracy')}, "
        f"ASR {twin_pair(record.metrics, 'attack_success_rate')}",
    ]
    shown = {n: o for n, o in record.defenses.items() if o.status != "not applicable"}
    for family in FAMILIES:
        members = {name: outcome for name, outcome in shown.items() if outcome.family == family}
        blocks += _family(family, by_effect(members), record.metrics)
    blocks += _folded(record.defenses)
    if record.defenses:
        blocks += ["", Paragraph(f"Conclusion: {conclusion(record)}")]
    blocks += ["", f"  time: {duration(record.timings.get('defenses_seconds', 0.0))} in defenses"]
    return [*blocks, f"  {folder / 'defenses.png'}"]


def _family(family: Family, members: Mapping[str, Outcome], before: Metrics) -> list[Block]:
    if not members:
        return []
    done = [outcome.metrics for outcome in members.values() if outcome.status == "done"]
    shown = {
        k: t for k, t in FAMILY_COLUMNS[family].items() if any(k in metrics for metrics in done)
    }
    rows: list[tuple[TextCell, ...]] = []
    notes: dict[str, str] = {}
    for name, outcome in members.items():
        cells = [_cell(key, outcome.metrics, before) for key in shown]
        note = "; ".join([*_tuned(outcome), *([outcome.caution] if outcome.caution else [])])
        if outcome.status != "done":
            cells = (
                [TextCell(outcome.status, "bad"), *[TextCell("")] * (len(shown) - 1)]
                if shown
                else []
            )
            note = f"{outcome.status}: {outcome.reason}"
        if note:
            notes[name] = note
        rows.append((TextCell(name), *cells))
    table = TextTable((family, *shown.values()), tuple(rows))
    return ["", table, *(f"    {name}: {note}" for name, note in notes.items())]


def _cell(key: str, metrics: Metrics, before: Metrics) -> TextCell:
    pair = twin_pair(metrics, key)
    return TextCell(str(pair), _tone(key, pair, twin_pair(before, "clean_test_accuracy")))


def _tone(key: str, pair: TwinPair, cta: TwinPair) -> Tone:
    tones: Mapping[str, Tone] = {
        "attack_success_rate": asr_tone(pair.attacked),
        "clean_test_accuracy": cta_tone(pair.attacked, cta.attacked),
        "auroc": auroc_tone(pair.attacked),
        "row_auroc": auroc_tone(pair.attacked),
        "set_alarm": alarm_tone(pair.attacked, pair.twin),
        "alarm": alarm_tone(pair.attacked, pair.twin),
    }
    return tones.get(key, "")


def _folded(defenses: Mapping[str, Outcome]) -> list[Block]:
    """One line for each reason why defenses are not applicable."""
    reasons: dict[str, list[str]] = {}
    for name, outcome in defenses.items():
        if outcome.status == "not applicable":
            reasons.setdefault(outcome.reason or "no reason given", []).append(name)
    if not reasons:
        return []
    count = sum(map(len, reasons.values()))
    lines = [
        TextCell(f"    {', '.join(names)}: {reason}", "chance") for reason, names in reasons.items()
    ]
    return ["", f"  not applicable: {count} of {len(defenses)}", *lines]


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
