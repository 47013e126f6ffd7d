"""A sweep's table: for every point what its seeds measured together, from the cells' records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from ..results.metrics import over_seeds
from ..results.record import Failure, Metrics, Record, command_line, environment, read_record
from .ledger import Ledger
from .sweep import Point, Sweep, cell_of, defended_of

ABLATION_VERSION = 1


@final
class AblationRow(BaseModel):
    """One point of a sweep, one victims' architecture, over distillation seeds.

    axis: the one axis that leaves the base, where the point comes from ``each``. values: the swept
    values by axis. config: the flat configuration but the seed. network: the victims'
    architecture; primary: whether it is the first of several. seeds: those with figures; wanted:
    those asked for. folders: the cells of ``seeds``, below the sweep's folder. seconds: mean over
    cells, the clean twin's apart. metrics: as in a run's record, each seed the mean over its
    victims. defenses: the same for each defense that gave figures.
    """

    model_config = ConfigDict(extra="forbid")

    axis: str | None = None
    values: dict[str, Any]
    config: dict[str, Any]
    network: str
    primary: bool = True
    seeds: list[int] = Field(default_factory=list)
    wanted: list[int]
    folders: list[str] = Field(default_factory=list)
    seconds: float | None = None
    reason: str | None = None
    labels: list[str] = Field(default_factory=list)
    metrics: Metrics = Field(default_factory=dict)
    defenses: dict[str, Metrics] = Field(default_factory=dict)


@final
class Ablation(BaseModel):
    """All rows of a sweep. axes: the names of what is swept, in the order of its file."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = ABLATION_VERSION
    kind: Literal["ablation"] = "ablation"
    status: Literal["running", "done"]
    sweep: dict[str, Any]
    axes: list[str]
    environment: dict[str, Any]
    command: str
    rows: list[AblationRow]
    failures: list[Failure]

    @property
    def one_at_a_time(self) -> bool:
        """Whether every row leaves the base along one axis: two columns say which and where."""
        return bool(self.rows) and all(
            row.axis is not None and len(row.values) == 1 for row in self.rows
        )


def summarise_sweep(sweep: Sweep, out: Path, failures: Sequence[Failure]) -> Ablation:
    """The table of what is finished under ``out``."""
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
    sweep: Sweep, point: Point, out: Path, seconds: Mapping[str, float], reasons: Mapping[str, str]
) -> list[AblationRow]:
    """A point's rows: one for each architecture of its victims."""
    configs = {seed: sweep.config(point, seed) for seed in sweep.seed_range()}
    records: dict[int, Record] = {}
    defended: list[Record] = []
    for seed, config in configs.items():
        found = _finished(out / cell_of(config))
        if found is not None:
            records[seed] = found
        bench = _finished(out / defended_of(sweep, config)) if sweep.defenses else None
        if bench is not None:
            defended.append(bench)
    places = [cell_of(config) for config in configs.values()]
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
            folders=[cell_of(configs[seed]) for seed in records],
            seconds=sum(timed) / len(timed) if timed else None,
            reason=next((reasons[place] for place in places if place in reasons), None),
            labels=list(dict.fromkeys(text for r in records.values() for text in r.labels)),
            metrics=over_seeds([_metrics(record, name) for record in records.values()])
            if records
            else {},
            defenses=_of_defenses(defended) if number == 0 else {},
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


def _of_defenses(records: Sequence[Record]) -> dict[str, Metrics]:
    names = dict.fromkeys(name for record in records for name in record.defenses)
    each = {
        name: [r.defenses[name].metrics for r in records if name in r.defenses] for name in names
    }
    done = {name: [metrics for metrics in found if metrics] for name, found in each.items()}
    return {name: over_seeds(found) for name, found in done.items() if found}


COLUMNS: Mapping[str, str] = {
    "clean_test_accuracy": "CTA",
    "control_clean_test_accuracy": "CTA, clean twin",
    "attack_success_rate": "ASR",
    "control_attack_success_rate": "ASR, control",
    "backdoor_gain": "backdoor gain",
}


def as_markdown(found: Ablation) -> str:
    """One table of the points; another of what defenses left, where there are any."""
    swept = found.sweep
    lines = [
        f"# {swept['description'] or 'Ablation'}",
        "",
        "Figures: mean over distillation seeds [95 % interval]; each seed is the mean over its "
        "victims.",
        "",
    ]
    shown = {key: title for key, title in COLUMNS.items() if _any(found.rows, key)}
    several = len({row.network for row in found.rows}) > 1
    place = ["axis", "value"] if found.one_at_a_time else found.axes
    heads = [*place, *(["victims"] if several else []), *shown.values(), "seeds", "note"]
    lines += _head(heads)
    for row in found.rows:
        where = [*_place(found, row), *([row.network] if several else [])]
        figures = [told(row.metrics, key) for key in shown]
        note = "; ".join([*row.labels, *([row.reason] if row.reason else [])])
        lines.append(_line([*where, *figures, f"{len(row.seeds)}/{len(row.wanted)}", note]))
    defended = [row for row in found.rows if row.defenses]
    if defended:
        lines += ["", "## After each defense", ""]
        lines += _head([*place, "defense", "ASR", "CTA", "AUROC"])
    for row in defended:
        for name, metrics in row.defenses.items():
            figures = [told(metrics, k) for k in ("attack_success_rate", "clean_test_accuracy")]
            auroc = next((told(metrics, k) for k in ("row_auroc", "auroc") if k in metrics), "–")
            lines.append(_line([*_place(found, row), name, *figures, auroc]))
    if found.failures:
        lines += ["", "## Failures", ""]
        lines += [f"- `{failure.place}`: {failure.reason}" for failure in found.failures]
    return "\n".join(lines) + "\n"


def told(metrics: Metrics, name: str) -> str:
    """``mean [low, high]``, an en dash where there is nothing."""
    summary = metrics.get(name)
    if summary is None or summary.mean is None:
        return "–"
    text = f"{summary.mean:.3f}"
    return (
        text if summary.ci95 is None else (f"{text} [{summary.ci95[0]:.2f}, {summary.ci95[1]:.2f}]")
    )


def _any(rows: Sequence[AblationRow], key: str) -> bool:
    return any(key in row.metrics for row in rows)


def _place(found: Ablation, row: AblationRow) -> list[str]:
    if found.one_at_a_time:
        return [str(row.axis), *map(str, row.values.values())]
    return [str(row.values.get(axis, "")) for axis in found.axes]


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "| --- " * len(names) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
