"""The table of a suite: its rows, its file format, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from ...defenses.base import Budget, Family
from .columns import FAMILY_COLUMNS, SEED_COLUMNS, budget_label, twin_pair
from .formatting import (
    markdown_failures,
    markdown_head,
    markdown_row,
    markdown_text,
    mean_and_interval,
)
from .judgement import FEWEST_JUDGED, detection_figure
from .record import Failure, Metrics

BENCHMARK_VERSION = 1

CellStatus = Literal["done", "not applicable", "error", "missing"]


@final
class BenchmarkRow(BaseModel):
    """One defense against one attack on one setting, over distillation seeds.

    defense: ``none`` for the undefended victims. seeds: those with figures. cells: the number of
    cells in each status. metrics: as in a run's record, each seed the mean over its victims; for
    sets and models also ``set_auroc`` and ``model_auroc`` (statistics of attacked against clean
    ones) and the alarms at a calibrated threshold. clean_sets: how many were made for calibration
    besides the twins. holds: whether the defense meets the thresholds of ``judgement``; ``None``
    where its figures are no sufficient evidence: a quick budget, too few sets or models.
    """

    model_config = ConfigDict(extra="forbid")

    setting: str
    attack: str
    network: str
    defense: str
    family: Family | None
    cells: dict[CellStatus, int]
    reason: str | None = None
    caution: str | None = None
    seeds: list[int] = Field(default_factory=list)
    clean_sets: int = 0
    seconds: float = 0.0
    metrics: Metrics = Field(default_factory=dict)
    holds: bool | None = None


@final
class Benchmark(BaseModel):
    """All rows of a suite."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = BENCHMARK_VERSION
    kind: Literal["benchmark"] = "benchmark"
    status: Literal["running", "done"]
    suite: dict[str, Any]
    environment: dict[str, Any]
    command: str
    rows: list[BenchmarkRow]
    failures: list[Failure]

    def select(self, **fields: str) -> list[BenchmarkRow]:
        """The rows with these values of their fields."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in fields.items())]


def benchmark_markdown(table: Benchmark) -> str:
    """A section for every setting and attack, with a table for every family."""
    title = markdown_text(table.suite["description"] or "Benchmark")
    lines = [f"# {title}", "", _legend(table.suite["budget"])]
    places = dict.fromkeys((row.setting, row.attack, row.network) for row in table.rows)
    for setting, attack, network in places:
        rows = table.select(setting=setting, attack=attack, network=network)
        lines += ["", f"## {setting}, {attack}, victims: {network}", "", _undefended(rows[0])]
        for family in FAMILY_COLUMNS:
            lines += _section(family, [row for row in rows if row.family == family])
        missing = [row.defense for row in rows[1:] if row.family is None]
        if missing:
            lines += ["", f"Not run yet: {', '.join(missing)}."]
    lines += markdown_failures(table.failures)
    return "\n".join(lines) + "\n"


def _legend(budget: Budget) -> str:
    text = (
        f"{budget_label(budget).capitalize()}. Figures: mean over distillation seeds [95 % "
        "interval] on attacked sets (clean twin). Target most anomalous: the share of victims for "
        "which the target is the class with the largest anomaly, alarm or not; chance is "
        "1 / classes."
    )
    if budget == "quick":
        return text
    return (
        f"{text} **Bold**: AUROC ≥ 0.9, or the target most anomalous in 4 of 5, or ASR ≤ 0.1 at "
        f"≤ 5 points of CTA; detectors of sets and of models need at least {FEWEST_JUDGED} of them."
    )


def _undefended(row: BenchmarkRow) -> str:
    cta, asr = (
        _figure(row.metrics, name) for name in ("clean_test_accuracy", "attack_success_rate")
    )
    return f"No defense, {len(row.seeds)} seeds: CTA {cta}, ASR {asr}."


def _section(family: Family, rows: Sequence[BenchmarkRow]) -> list[str]:
    if not rows:
        return []
    columns: dict[str, str] = {}
    for row in rows:
        further = SEED_COLUMNS.get(detection_figure(row.metrics) or "", {})
        columns |= {
            key: title
            for key, title in {**FAMILY_COLUMNS[family], **further}.items()
            if key in row.metrics and not key.endswith("_statistic")
        }
    lines = ["", *markdown_head([family, *columns.values(), "seeds", "note"])]
    for row in rows:
        name = f"**{row.defense}**" if row.holds else row.defense
        figures = [_figure(row.metrics, key) for key in columns]
        lines.append(markdown_row([name, *figures, str(len(row.seeds)), _note(row)]))
    return lines


def _note(row: BenchmarkRow) -> str:
    note = markdown_text(row.reason or row.caution or "")
    if row.cells.get("not applicable"):
        note = f"not applicable: {note}"
    return f"failed: {note}" if row.cells.get("error") else note


def _figure(metrics: Metrics, name: str) -> str:
    """``mean [low, high] (twin)``."""
    text, twin = mean_and_interval(metrics, name), twin_pair(metrics, name).twin
    return text if text == "–" or twin is None else f"{text} ({twin:.3f})"
