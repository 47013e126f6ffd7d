"""A suite's table: each defense over the distillation seeds, from the bench's records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from ...defenses.base import Budget, Family
from ..results.against_twins import of_models, of_sets
from ..results.defense_tables import COLUMNS, budget_label, cell
from ..results.metrics import over_seeds
from ..results.record import (
    Failure,
    Metrics,
    Outcome,
    Record,
    command_line,
    environment,
    read_record,
)
from .suite import Group, Suite, calibrated_defenses, calibration_groups, groups

BENCHMARK_VERSION = 1
# A detector holds from this AUROC on, or where the target is the most anomalous class in this share
# of models; what answers holds at this ASR and this loss of CTA.
HOLDS_AUROC, HOLDS_FOUND, HOLDS_ASR, HOLDS_LOSS = 0.9, 0.8, 0.1, 0.05
FEWEST_JUDGED = 10
"""Attacked sets or models, and as many clean ones, behind a verdict on a detector of them."""
# Of a detector's figures the first that was measured is the one it is judged by.
JUDGED = ("row_auroc", "auroc", "set_auroc", "model_auroc")

Status = Literal["done", "not applicable", "error", "missing"]


@final
class Row(BaseModel):
    """One defense against one attack on one setting, over distillation seeds.

    defense: ``none`` for the undefended victims. seeds: those with figures. cells: how many cells
    are in each status. metrics: as in a run's record, each seed the mean over its victims; besides,
    for sets and models, ``set_auroc`` and ``model_auroc`` (statistics of attacked against clean
    ones) and the alarms at a threshold that clean ones set. clean_sets: how many were made for
    calibration besides the twins. holds: whether it comes up to the bar; ``None`` where its figures
    can't say: a quick budget, too few sets or models.
    """

    model_config = ConfigDict(extra="forbid")

    setting: str
    attack: str
    network: str
    defense: str
    family: Family | None
    cells: dict[Status, int]
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
    rows: list[Row]
    failures: list[Failure]

    def chosen(self, **wanted: str) -> list[Row]:
        """The rows whose fields are as wanted."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in wanted.items())]


def summarise_suite(suite: Suite, out: Path, failures: Sequence[Failure]) -> Benchmark:
    """The table of what is finished under ``out``."""
    rows, finished = [], True
    for setting in suite.settings:
        mine = [group for group in groups(suite) if group.setting == setting]
        clean = calibration_groups(suite, setting) if calibrated_defenses(suite, setting) else []
        for network in suite.networks():
            references = _records(out, clean, "clean", network)
            finished &= _complete(references, clean)
            for attack in suite.attacks_of(setting):
                records = _records(out, mine, attack, network)
                finished &= _complete(records, mine)
                place = {"setting": setting, "attack": attack}
                rows += _rows(suite, records, references, len(mine), network, place)
    return Benchmark(
        status="done" if finished and not failures else "running",
        suite=suite.model_dump(mode="json"),
        environment=environment("cpu"),
        command=command_line(),
        rows=rows,
        failures=list(failures),
    )


def _records(
    out: Path, chosen: Sequence[Group], attack: str, network: str | None
) -> dict[int, Record]:
    """The bench's records that are there, by seed."""
    paths = {group.seed: out / group.defended(attack, network) / "record.json" for group in chosen}
    return {seed: read_record(path) for seed, path in paths.items() if path.exists()}


def _complete(records: Mapping[int, Record], wanted: Sequence[Group]) -> bool:
    return len(records) == len(wanted) and all(r.status == "done" for r in records.values())


def _rows(
    suite: Suite,
    records: Mapping[int, Record],
    references: Mapping[int, Record],
    wanted: int,
    network: str | None,
    place: dict[str, str],
) -> list[Row]:
    """The undefended row, then one for each defense."""
    if network is None and records:
        network = next(iter(records.values())).config["network"]
    where: dict[str, Any] = place | {"network": network or ""}
    measured = {seed: record for seed, record in records.items() if record.metrics}
    before = over_seeds([record.metrics for record in measured.values()]) if measured else {}
    cells: dict[Status, int] = {"done": len(measured), "missing": wanted - len(measured)}
    none = Row(
        **where, defense="none", family=None, cells=cells, seeds=list(measured), metrics=before
    )
    rows = [none]
    for name in suite.defenses_of(place["setting"]):
        outcomes, clean = (
            {s: r.defenses[name] for s, r in each.items() if name in r.defenses}
            for each in (records, references)
        )
        rows.append(_row(where, name, outcomes, clean, wanted, before))
    return rows


def _row(
    where: dict[str, Any],
    name: str,
    outcomes: Mapping[int, Outcome],
    clean: Mapping[int, Outcome],
    wanted: int,
    before: Metrics,
) -> Row:
    done = {seed: outcome for seed, outcome in outcomes.items() if outcome.status == "done"}
    cells: dict[Status, int] = {"missing": wanted - len(outcomes)}
    for outcome in outcomes.values():
        cells[outcome.status] = cells.get(outcome.status, 0) + 1
    each = list(done.values())
    metrics = over_seeds([outcome.metrics for outcome in each]) if each else {}
    references = [outcome.metrics for outcome in clean.values() if outcome.status == "done"]
    metrics |= of_sets([outcome.metrics for outcome in each], references)
    metrics |= of_models([outcome.metrics for outcome in each], references)
    family = next((outcome.family for outcome in outcomes.values()), None)
    return Row(
        **where,
        defense=name,
        family=family,
        cells={status: count for status, count in cells.items() if count},
        reason=next((o.reason for o in outcomes.values() if o.reason), None),
        caution=next((o.caution for o in each if o.caution), None),
        seeds=list(done),
        clean_sets=len(references),
        seconds=sum(outcome.seconds for outcome in each) / max(1, len(each)),
        metrics=metrics,
        holds=_holds(metrics, before) if _judged_by(each, metrics) else None,
    )


def _judged_by(outcomes: Sequence[Outcome], metrics: Metrics) -> bool:
    """Whether there is enough behind the figures for a verdict."""
    if not outcomes or any(outcome.budget == "quick" for outcome in outcomes):
        return False
    detector = judged(metrics)
    if detector == "set_auroc":
        return len(outcomes) >= FEWEST_JUDGED
    if detector == "model_auroc":
        models = [len(outcome.metrics["model_statistic"].values) for outcome in outcomes]
        # A method that raises no alarm (BTI-DBF) gives no verdict either.
        return sum(models) >= FEWEST_JUDGED and "alarm" in metrics
    return True


def judged(metrics: Metrics) -> str | None:
    """The figure by which a detector is judged; ``None`` for a defense that answers."""
    return next((name for name in JUDGED if name in metrics), None)


def _holds(metrics: Metrics, before: Metrics) -> bool | None:
    """Whether a defense comes up to the bar; ``None`` where its figures can't say."""
    detector = judged(metrics)
    if detector is not None:
        named, value = metrics.get("target_suspected"), metrics[detector].mean
        if named is not None and named.mean is not None and named.mean >= HOLDS_FOUND:
            return True
        return None if value is None else value >= HOLDS_AUROC
    after, first = cell(metrics, "clean_test_accuracy"), cell(before, "clean_test_accuracy")
    rate = cell(metrics, "attack_success_rate").attacked
    undefended = cell(before, "attack_success_rate").attacked
    if rate is None or after.attacked is None or first.attacked is None:
        return None
    if undefended is None or undefended <= HOLDS_ASR:  # there was nothing to take away
        return None
    return rate <= HOLDS_ASR and first.attacked - after.attacked <= HOLDS_LOSS


_MORE = {
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


def as_markdown(found: Benchmark) -> str:
    """A section for every setting and attack, a table for every family in it."""
    lines = [
        f"# {found.suite['description'] or 'Benchmark'}",
        "",
        *_legend(found.suite["budget"]),
    ]
    places = dict.fromkeys((row.setting, row.attack, row.network) for row in found.rows)
    for setting, attack, network in places:
        rows = found.chosen(setting=setting, attack=attack, network=network)
        lines += ["", f"## {setting}, {attack}, victims: {network}", ""]
        lines += _undefended(rows[0])
        for family in COLUMNS:
            lines += _section(family, [row for row in rows if row.family == family])
        missing = [row.defense for row in rows[1:] if row.family is None]
        if missing:
            lines += ["", f"Not run yet: {', '.join(missing)}."]
    if found.failures:
        lines += ["", "## Failures", ""]
        lines += [f"- `{failure.place}`: {failure.reason}" for failure in found.failures]
    return "\n".join(lines) + "\n"


def _legend(budget: Budget) -> list[str]:
    lines = [
        f"{budget_label(budget).capitalize()}. Figures: mean over distillation seeds [95 % "
        "interval] on attacked sets (clean twin). Target most anomalous: the share of victims for "
        "which the target is the class with the largest anomaly, alarm or not; chance is "
        "1 / classes.",
    ]
    if budget != "quick":
        lines[0] += (
            " **Bold**: AUROC ≥ 0.9, or the target most anomalous in 4 of 5, or ASR ≤ 0.1 at ≤ 5 "
            f"points of CTA; detectors of sets and of models from {FEWEST_JUDGED} of them on."
        )
    return lines


def _undefended(row: Row) -> list[str]:
    told = [
        f"{title} {_told(row.metrics, name)}"
        for name, title in (("clean_test_accuracy", "CTA"), ("attack_success_rate", "ASR"))
    ]
    return [f"No defense, {len(row.seeds)} seeds: {', '.join(told)}."]


def _section(family: Family, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    columns: dict[str, str] = {}
    for row in rows:
        detector = judged(row.metrics)
        columns |= {
            key: title
            for key, title in {**COLUMNS[family], **_MORE.get(detector or "", {})}.items()
            if key in row.metrics and not key.endswith("_statistic")
        }
    lines = ["", f"| {family} | {' | '.join([*columns.values(), 'seeds', 'note'])} |"]
    lines.append("| --- " * (len(columns) + 3) + "|")
    for row in rows:
        name = f"**{row.defense}**" if row.holds else row.defense
        figures = [_told(row.metrics, key) for key in columns]
        note = row.reason or row.caution or ""
        if row.cells.get("not applicable"):
            note = f"not applicable: {note}"
        if row.cells.get("error"):
            note = f"failed: {note}"
        lines.append(f"| {' | '.join([name, *figures, str(len(row.seeds)), note])} |")
    return lines


def _told(metrics: Metrics, name: str) -> str:
    """``mean [low, high] (twin)``."""
    summary = metrics.get(name)
    if summary is None or summary.mean is None:
        return "–"
    text = f"{summary.mean:.3f}"
    if summary.ci95 is not None:
        text += f" [{summary.ci95[0]:.2f}, {summary.ci95[1]:.2f}]"
    theirs = cell(metrics, name).twin
    return text if theirs is None else f"{text} ({theirs:.3f})"
