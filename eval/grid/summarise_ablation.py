"""The table of a sweep, from the records of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..results.ablation import Ablation, AblationRow
from ..results.metrics import over_seeds
from ..results.record import Failure, Metrics, Record, command_line, environment, read_record
from .ledger import Ledger
from .sweep import Sweep, SweepPoint, cell_place, defense_place


def summarise_sweep(sweep: Sweep, out: Path, failures: Sequence[Failure]) -> Ablation:
    """The table of the finished cells under ``out``."""
    seconds = Ledger(out).seconds()
    reasons = {failure.place: failure.reason for failure in failures}
    rows: list[AblationRow] = []
    for point in sweep.points():
        rows += _rows(sweep, point, out, seconds, reasons)
    axes = dict.fromkeys(axis for row in rows for axis in row.values)
    finished = all(row.seeds == row.wanted for row in rows)
    return Ablation(
        status="done" if finished and not failures else "running",
        sweep=sweep.model_dump(mode="json"),
        axes=list(axes),
        environment=environment("cpu"),
        command=command_line(),
        rows=rows,
        failures=list(failures),
    )


def _rows(
    sweep: Sweep,
    point: SweepPoint,
    out: Path,
    seconds: Mapping[str, float],
    reasons: Mapping[str, str],
) -> list[AblationRow]:
    """A row for each victim architecture of a point."""
    configs = {seed: sweep.config(point, seed) for seed in sweep.seed_range()}
    records: dict[int, Record] = {}
    defended: list[Record] = []
    for seed, config in configs.items():
        found = _finished(out / cell_place(config))
        if found is not None:
            records[seed] = found
        bench = _finished(out / defense_place(sweep, config)) if sweep.defenses else None
        if bench is not None:
            defended.append(bench)
    places = [cell_place(config) for config in configs.values()]
    timed = [seconds[place] for place in places if place in seconds]
    first = configs[sweep.first_seed]
    keys = {key: value for key, value in first.flat().items() if key != "seed"}
    names = first.victims.victim_network or (first.network.network,)
    return [
        AblationRow(
            axis=point.axis,
            values=dict(point.values),
            config=keys,
            network=name,
            primary=number == 0,
            seeds=list(records),
            wanted=list(configs),
            folders=[cell_place(configs[seed]) for seed in records],
            seconds=sum(timed) / len(timed) if timed else None,
            reason=next((reasons[place] for place in places if place in reasons), None),
            labels=list(dict.fromkeys(text for r in records.values() for text in r.labels)),
            metrics=over_seeds([_metrics(record, name) for record in records.values()]),
            defenses=_defense_metrics(defended) if number == 0 else {},
        )
        for number, name in enumerate(names)
    ]


def _finished(folder: Path) -> Record | None:
    path = folder / "record.json"
    if not path.exists():
        return None
    record = read_record(path)
    return record if record.status == "done" else None


def _metrics(record: Record, network: str) -> Metrics:
    return record.metrics_by_network.get(network, record.metrics)


def _defense_metrics(records: Sequence[Record]) -> dict[str, Metrics]:
    """Each defense's metrics over the records in which it gave figures."""
    measured: dict[str, list[Metrics]] = {}
    for record in records:
        for name, outcome in record.defenses.items():
            each = measured.setdefault(name, [])
            if outcome.metrics:
                each.append(outcome.metrics)
    return {name: over_seeds(each) for name, each in measured.items() if each}
