"""What a report says, gathered from records and tables and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from ...distill.files.safe import fault, read_json
from ..results.ablation import ABLATION_VERSION, Ablation
from ..results.benchmark import BENCHMARK_VERSION, Benchmark
from ..results.record import Outcome, Record, read_record
from .model import NO_CELL, Row, Source, described, shown_run
from .plans import of_suite, of_sweep

_MARKS: Final = ("record.json", "table.json", "sweep.json", "suite.json")
_Table = TypeVar("_Table", bound=BaseModel)


def gather_source(path: Path) -> Source:
    """The run, sweep or suite in the folder ``path``, however far it came.

    Errors: ``RequestError`` of one line, where there is none or where its record is damaged.
    """
    try:
        if path.name in ("record.json", "table.json") and path.is_file():
            path = path.parent
        if not path.is_dir():
            raise fault(path, "is a file, expected a folder" if path.exists() else "no such folder")
        here = {file for file in _MARKS if (path / file).is_file()}
        begun = sorted(path.glob("seed-*/record.json"), key=lambda file: _number(file.parent.name))
    except OSError as error:
        raise fault(path, f"cannot be read: {error.strerror}") from None
    path = path.absolute()
    if "table.json" in here:
        return _of_table(path)
    if "record.json" in here:
        return _of_record(path)
    if here:  # a plan whose first cell is still at work
        file = "sweep.json" if "sweep.json" in here else "suite.json"
        return _begun(path, file)
    if begun:  # several seeds, the first still at work
        note = f"the first of several seeds ({begun[0].parent.name}): there is no summary yet"
        return replace(_of_record(begun[0].parent.absolute()), notes=[note])
    raise fault(path, "holds neither record.json nor table.json: no run, sweep or suite")


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0


def _begun(path: Path, file: str) -> Source:
    found = read_json(path / file)
    what = file.partition(".")[0]
    plan = found.get(what, {}) if isinstance(found, dict) else {}
    return Source(
        path=path,
        shape="sweep" if what == "sweep" else "suite",
        kind="ablation" if what == "sweep" else "benchmark",
        status="running",
        title=described(plan) or path.name,
        config=plan if isinstance(plan, dict) else {},
        cells=0,
        notes=[NO_CELL],
    )


def _of_table(path: Path) -> Source:
    file = path / "table.json"
    found = read_json(file)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind == "ablation":
        return of_sweep(path, _valid(Ablation, file, found, ABLATION_VERSION))
    if kind == "benchmark":
        return of_suite(path, _valid(Benchmark, file, found, BENCHMARK_VERSION))
    raise fault(file, f"is no table of a sweep or a suite (kind {kind!r:.40})")


def _valid(model: type[_Table], file: Path, found: Any, version: int) -> _Table:
    if found.get("schema_version") != version:
        have = found.get("schema_version")
        raise fault(file, f"is no table of schema {version} (found {have!r:.40})")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise fault(file, f"is damaged: {place}: {first['msg']}") from None


# Runs ---------------------------------------------------------------------------------------------


def _of_record(path: Path) -> Source:
    record = read_record(path / "record.json")
    config = record.config
    parts = [config.get(key) for key in ("dataset", "backend")]
    parts += [f"IPC {config['ipc']}" if "ipc" in config else None, config.get("network")]
    what = " · ".join(str(part) for part in [*parts, config.get("attack") or "clean"] if part)
    folders = [path]
    if record.kind == "seeds":
        folders = [path / f"seed-{seed}" for seed in record.seeds or ()]
    return Source(
        path=path,
        shape="run",
        kind=record.kind,
        status=record.status,
        title=f"{record.kind}: {what}",
        error=record.error or "",
        rows=_rows_of(record, folders),
        shown=[shown_run(what, folder) for folder in folders[:1]],
        cells=len(folders),
        budget=str(record.bench.get("budget") or ""),
        command=record.command,
        environment=record.environment,
        config=config,
    )


def _rows_of(record: Record, folders: Sequence[Path]) -> list[Row]:
    """A run's undefended figures by the victims' architecture, then its defenses'."""
    config = record.config
    names = config.get("victim_network") or [config.get("network", "")]
    seeds = record.seeds if record.kind == "seeds" else [config.get("seed", 0)]
    common: dict[str, Any] = {
        "place": {},
        "seeds": seeds or [],
        "wanted": len(seeds or []),
        "conditional": record.conditional_on_set,
        "labels": record.labels,
        "folders": folders,
    }
    first = str(names[0])
    measured = {first: record.metrics, **record.metrics_by_network}
    rows = [
        Row(key=(), network=name, primary=name == first, metrics=metrics, **common)
        for name, metrics in measured.items()
    ]
    for name, outcome in record.defenses.items():
        rows.append(
            Row(
                key=(name,),
                network=first,
                defense=name,
                family=outcome.family,
                state=outcome.status,
                note=_why(outcome),
                metrics=outcome.metrics,
                **common,
            )
        )
    return rows


def _why(outcome: Outcome) -> str:
    if outcome.status != "done":
        return f"{outcome.status}: {outcome.reason or 'no reason given'}"
    return outcome.caution or ""
