"""The table of a suite, from the records of its defense jobs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results.benchmark import Benchmark, BenchmarkRow, CellStatus
from ..results.detection import detection_of_models, detection_of_sets
from ..results.judgement import verdict
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
from .suite import Suite, TwinGroup, calibrated_defenses, calibration_groups, groups


def summarise_suite(suite: Suite, out: Path, failures: Sequence[Failure]) -> Benchmark:
    """The table of the finished runs under ``out``."""
    rows, finished = [], True
    for setting in suite.settings:
        own = [group for group in groups(suite) if group.setting == setting]
        clean = calibration_groups(suite, setting) if calibrated_defenses(suite, setting) else []
        for network in suite.networks():
            references = _records(out, clean, "clean", network)
            finished &= _complete(references, clean)
            for attack in suite.attacks_of(setting):
                records = _records(out, own, attack, network)
                finished &= _complete(records, own)
                place = {"setting": setting, "attack": attack}
                rows += _rows(suite, records, references, len(own), network, place)
    return Benchmark(
        status="done" if finished and not failures else "running",
        suite=suite.model_dump(mode="json"),
        environment=environment("cpu"),
        command=command_line(),
        rows=rows,
        failures=list(failures),
    )


def _records(
    out: Path, chosen: Sequence[TwinGroup], attack: str, network: str | None
) -> dict[int, Record]:
    """The records of the defense jobs that exist, by seed."""
    paths = {g.seed: out / g.defense_place(attack, network) / "record.json" for g in chosen}
    return {seed: read_record(path) for seed, path in paths.items() if path.exists()}


def _complete(records: Mapping[int, Record], wanted: Sequence[TwinGroup]) -> bool:
    return len(records) == len(wanted) and all(r.status == "done" for r in records.values())


def _rows(
    suite: Suite,
    records: Mapping[int, Record],
    references: Mapping[int, Record],
    wanted: int,
    network: str | None,
    place: dict[str, str],
) -> list[BenchmarkRow]:
    """The undefended row, then one for each defense."""
    if network is None and records:
        network = next(iter(records.values())).config["network"]
    where: dict[str, Any] = place | {"network": network or ""}
    measured = {seed: record for seed, record in records.items() if record.metrics}
    before = over_seeds([record.metrics for record in measured.values()])
    undefended = BenchmarkRow(
        **where,
        defense="none",
        family=None,
        cells={"done": len(measured), "missing": wanted - len(measured)},
        seeds=list(measured),
        metrics=before,
    )
    rows = [undefended]
    for name in suite.defenses_of(place["setting"]):
        outcomes, clean = (
            {s: r.defenses[name] for s, r in each.items() if name in r.defenses}
            for each in (records, references)
        )
        rows.append(defense_row(where, name, outcomes, clean, wanted, before))
    return rows


def defense_row(
    where: dict[str, Any],
    name: str,
    outcomes: Mapping[int, Outcome],
    clean: Mapping[int, Outcome],
    wanted: int,
    before: Metrics,
) -> BenchmarkRow:
    """The row of one defense.

    where: setting, attack and network. outcomes: by seed. clean: the outcomes on the sets that were
    made for calibration. wanted: how many seeds were asked for. before: the metrics without a
    defense.
    """
    done = {seed: outcome for seed, outcome in outcomes.items() if outcome.status == "done"}
    each = [outcome.metrics for outcome in done.values()]
    references = [outcome.metrics for outcome in clean.values() if outcome.status == "done"]
    metrics = over_seeds(each)
    metrics |= detection_of_sets(each, references) | detection_of_models(each, references)
    return BenchmarkRow(
        **where,
        defense=name,
        family=next((outcome.family for outcome in outcomes.values()), None),
        cells=_cells(outcomes.values(), wanted),
        reason=next((o.reason for o in outcomes.values() if o.reason), None),
        caution=next((o.caution for o in done.values() if o.caution), None),
        seeds=list(done),
        clean_sets=len(references),
        seconds=sum(outcome.seconds for outcome in done.values()) / max(1, len(done)),
        metrics=metrics,
        holds=verdict([*done.values()], metrics, before),
    )


def _cells(outcomes: Collection[Outcome], wanted: int) -> dict[CellStatus, int]:
    """The number of cells in each status that occurs."""
    cells: dict[CellStatus, int] = {"missing": wanted - len(outcomes)}
    for outcome in outcomes:
        cells[outcome.status] = cells.get(outcome.status, 0) + 1
    return {status: count for status, count in cells.items() if count}
