"""An audit as text: words first, then figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..results.formatting import aligned, duration, minus
from .calibration import SCORED
from .record import AuditRecord

_WORDS: Final[Mapping[str, str]] = {
    "backdoored": "BACKDOORED: a trigger for class {suspect} is likely",
    "suspicious": "SUSPICIOUS: class {suspect} stands out, less than an alarm needs",
    "no evidence": "NO EVIDENCE of a backdoor was found",
    "cannot say": "CANNOT SAY",
}
_KINDS: Final[Mapping[str, str]] = {
    "inversion": "patch",
    "rows": "rows",
    "weights": "last layer",
}


def audit_text(record: AuditRecord, out: Path) -> str:
    """The verdict, what it rests on and what to do; then the figures of each class."""
    words = _WORDS[record.verdict].format(suspect=record.suspect_class)
    lines = [f"{record.source}: {words}", f"  why: {record.reason}", f"  so: {record.advice}"]
    lines += [*_evidence(record), f"  what this rests on: {_rests_on(record)}"]
    lines += [f"  ! {label}" for label in record.labels]
    lines += [f"  of itself no alarm: {note}" for note in record.structure]
    lines += ["", *_table(record), ""]
    files = ("audit.json", "audit.png", "patches.safetensors")
    return "\n".join([*lines, *(f"  {out / name}" for name in files)])


def _evidence(record: AuditRecord) -> list[str]:
    if record.score is None or record.suspect is None:
        return []
    found = record.classes[record.suspect]
    parts = ", ".join(f"{_KINDS[kind]} {value:.1f}" for kind, value in record.parts.items())
    return [
        f"  highest score: class {found.name}, {record.score:.1f} deviations from clean sets "
        f"({parts})",
        f"  its patch covers {found.size:.1f} pixels and sends {found.held_out:.0%} of other "
        f"classes' images there on victims that the search did not see, {found.other_network:.0%} "
        "on another architecture",
    ]


def _rests_on(record: AuditRecord) -> str:
    known, conditions = record.clean_sets, record.conditions
    clean = f"{conditions.clean} clean images" if conditions.clean else "no clean images"
    accuracy = "" if record.accuracy is None else f" of accuracy {record.accuracy:.3f}"
    text = f"{record.victims} victims{accuracy}, {clean}, {duration(record.seconds)}"
    if record.smallest_rate is None:
        return text
    return (
        f"{text}; compared with {known} clean sets, of whose kind at most "
        f"{record.false_alarms:.1%} are judged backdoored (the smallest rate that {known} sets can "
        f"state is {record.smallest_rate:.1%})"
    )


def _table(record: AuditRecord) -> list[str]:
    kinds = [kind for kind in _KINDS if kind in record.classes[0].evidence]
    heads = [_KINDS[kind] + ("" if kind in SCORED else " (not scored)") for kind in kinds]
    rows = [["class", "patch size", "held-out hits", *heads]]
    for found in record.classes:
        values = [minus(f"{found.evidence[kind]:.2f}") for kind in kinds]
        rows.append([found.name, f"{found.size:.1f}", f"{found.held_out:.2f}", *values])
    return aligned(rows)
