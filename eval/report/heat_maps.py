"""The defense heat map of a report, as a table that reads on a phone and aloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from ...defenses import DEFENSES
from ..figures.defense_pictures import DETECTORS
from ..figures.heatmap import heat_cell, shade
from ..results.columns import twin_pair
from .model import Row, Source, told_place

LEVELS: Final = 20
_ALARMS: Final = ("set_alarm", "alarm")


@final
@dataclass(frozen=True)
class HeatCell:
    """level: 0 (bad for the defender) to 20 (good), ``None`` for no figure; lines: what it says."""

    level: int | None
    lines: Sequence[str]


@final
@dataclass(frozen=True, kw_only=True)
class Heat:
    """Defenses down, places across. heads: (the place, what must stand beside its figures).

    rows: (the defense, a cell for each place).
    """

    title: str
    meaning: str
    heads: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[tuple[str, Sequence[HeatCell]]]


def heat_maps(source: Source) -> list[Heat]:
    """Detectors by AUROC and all others by their effectiveness rating; nothing without defenses."""
    rows = source.defended
    if not rows:
        return []
    plain = {(told_place(row) if row.place else "", row.network): row for row in source.undefended}
    alone = len({network for _, network in plain}) == 1
    heads = [_head(source, row, alone=alone) for row in plain.values()]
    found = []
    for detect in (True, False):
        members = [row for row in rows if _detects(row) == detect]
        names = list(dict.fromkeys(row.defense or "" for row in members))
        by_place = {
            (told_place(row) if row.place else "", row.network, row.defense): row for row in members
        }
        lines = [] if detect or not names else [("none", [_cell(row) for row in plain.values()])]
        for name in names:
            cells = [by_place.get((*place, name)) for place in plain]
            lines.append((name, [_cell(row) if row else HeatCell(None, ["–"]) for row in cells]))
        if names:
            title = "Detection" if detect else "Answers"
            heat = Heat(title=title, meaning=_MEANING[detect], heads=heads, rows=lines)
            found.append(heat)
    return found


def _head(source: Source, row: Row, *, alone: bool) -> tuple[str, Sequence[str]]:
    """A place; a suite's settings and attacks say by themselves what they are."""
    told = ", ".join(map(str, row.place.values())) if source.shape == "suite" else told_place(row)
    name = told if row.place else source.name
    return name if alone else f"{name}, {row.network}", row.labels


_MEANING: Final = {
    True: "AUROC of telling attacked rows, inputs, sets or models from clean ones: 1 is perfect, "
    "0.5 is chance.",
    False: "Defense effectiveness rating (DER): 1 is perfect, 0.5 changes nothing. Below it the "
    "ASR that is left / the CTA.",
}


def _detects(row: Row) -> bool:
    """By its family; where a table doesn't tell it, by the catalogue's, then by its figures."""
    known = DEFENSES.get(row.defense or "")
    family = row.family or (known.family if known else None)
    return "attack_success_rate" not in row.metrics if family is None else family in DETECTORS


def _cell(row: Row) -> HeatCell:
    value, text = heat_cell(row.metrics, [row.state])
    if value is not None:
        level = round(min(1.0, max(0.0, value)) * LEVELS)
        return HeatCell(level, text.split("\n"))
    alarm = next((name for name in _ALARMS if name in row.metrics), None)
    if alarm is not None and row.state == "done":
        both = twin_pair(row.metrics, alarm)
        return HeatCell(None, [f"alarm {both}"])
    return HeatCell(None, text.split("\n"))


def shades() -> list[str]:
    """The colour of every level, as CSS has it."""
    colours = [shade(level / LEVELS) for level in range(LEVELS + 1)]
    return ["#" + "".join(f"{round(part * 255):02x}" for part in colour) for colour in colours]
