"""The heat maps of a report's defenses, as tables that a phone and a screen reader can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from ...defenses import DEFENSES
from ..figures.defense_pictures import DETECTORS
from ..figures.heatmap import heat_cell, shade
from ..results.columns import twin_pair
from .model import Experiment, ResultRow
from .tables import ALARMS

LEVELS: Final = 20
_MEANINGS: Final = {
    "Detection": "AUROC of separating attacked rows, inputs, sets or models from clean ones: 1 "
    "is perfect, 0.5 is chance.",
    "Mitigation": "Defense effectiveness rating (DER): 1 is perfect, 0.5 changes nothing. Below it "
    "the remaining ASR / the CTA.",
}


@final
@dataclass(frozen=True)
class HeatCell:
    """level: 0 (bad for the defender) to 20 (good), ``None`` without a figure; lines: its text."""

    level: int | None
    lines: Sequence[str]


@final
@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Defenses down, points across. heads: (the point, what must stand beside its figures).

    rows: (the defense, a cell for each point).
    """

    title: str
    meaning: str
    heads: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[tuple[str, Sequence[HeatCell]]]


def heat_maps(experiment: Experiment) -> list[HeatMap]:
    """Detectors by AUROC, all others by their effectiveness rating; none without defenses."""
    detection = [row for row in experiment.defended if _detects(row)]
    mitigation = [row for row in experiment.defended if not _detects(row)]
    undefended = {_point(row): row for row in experiment.undefended}
    none = [("none", [_cell(row) for row in undefended.values()])]
    sides = [("Detection", detection, []), ("Mitigation", mitigation, none)]
    one_network = len({row.network for row in undefended.values()}) == 1
    return [
        HeatMap(
            title=title,
            meaning=_MEANINGS[title],
            heads=[_head(experiment, row, one_network) for row in undefended.values()],
            rows=[*first, *_rows(rows, list(undefended))],
        )
        for title, rows, first in sides
        if rows
    ]


def _point(row: ResultRow) -> tuple[str, str]:
    return row.point, row.network


def _rows(
    rows: Sequence[ResultRow], points: Sequence[tuple[str, str]]
) -> list[tuple[str, list[HeatCell]]]:
    """A line for each defense, a dash where a point has no result of it."""
    found = {(*_point(row), row.defense): _cell(row) for row in rows}
    empty = HeatCell(None, ["–"])
    return [
        (name, [found.get((*point, name), empty) for point in points])
        for name in dict.fromkeys(row.defense or "" for row in rows)
    ]


def _head(experiment: Experiment, row: ResultRow, one_network: bool) -> tuple[str, Sequence[str]]:
    """A point; a suite's settings and attacks need no names of what they are."""
    names = ", ".join(map(str, row.varied.values()))
    point = (names if experiment.shape == "suite" else row.point) or experiment.name
    return point if one_network else f"{point}, {row.network}", row.labels


def _detects(row: ResultRow) -> bool:
    """By its family; where a table does not have it, by the catalogue's, then by its figures."""
    known = DEFENSES.get(row.defense or "")
    family = row.family or (known.family if known else None)
    return "attack_success_rate" not in row.metrics if family is None else family in DETECTORS


def _cell(row: ResultRow) -> HeatCell:
    value, text = heat_cell(row.metrics, [row.state])
    if value is not None:
        level = round(min(1.0, max(0.0, value)) * LEVELS)
        return HeatCell(level, text.split("\n"))
    alarm = next((name for name in ALARMS if name in row.metrics), None)
    if alarm is not None and row.state == "done":
        return HeatCell(None, [f"alarm {twin_pair(row.metrics, alarm)}"])
    return HeatCell(None, text.split("\n"))


def shades() -> list[str]:
    """The colour of every level, as CSS writes it."""
    colours = [shade(level / LEVELS) for level in range(LEVELS + 1)]
    return ["#" + "".join(f"{round(part * 255):02x}" for part in colour) for colour in colours]
