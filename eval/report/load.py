"""Reads the runs, sweeps and suites of a report from their records and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

from ...attacks import labels_of
from ...distill.files.safe import fault, read_json
from ...distill.types import RequestError
from ..grid.suite import TwinGroup
from ..results.ablation import ABLATION_VERSION, Ablation, AblationRow
from ..results.benchmark import BENCHMARK_VERSION, Benchmark, BenchmarkRow
from ..results.record import Metrics, Outcome, Record, RecordKind, read_record, record_from
from ..results.record_parts import table_from
from ..results.subject import subject
from ..run.folder import last_active, path_inside
from .model import ABOUT, Experiment, PicturedRun, ResultRow

_NOTHING_FINISHED: Final = "No run has finished yet."
_RECORD, _TABLE = "record.json", "table.json"
_PLANS: Final = ("sweep.json", "suite.json")
# What benchmarks/collect.py adds to a record.
_COLLECTED: Final = {"by_seed", "curve"}


def load_experiment(path: Path) -> Experiment:
    """The run, sweep or suite in the folder ``path``, complete or not; or a table's JSON file.

    A table or record under another name than its own is read without the runs' other files.
    The status of one that is not finished says when it was last active.
    Errors: ``RequestError`` of one line, where there is none or where its record is damaged.
    """
    found = _load(path)
    active = last_active(found.path) if found.status == "running" else ""
    return replace(found, status=f"running, last active {active}") if active else found


def _load(path: Path) -> Experiment:
    try:
        if path.name in (_RECORD, _TABLE) and path.is_file():
            path = path.parent
        if path.suffix == ".json" and path.is_file():
            return replace(_from_json(path, path.with_suffix("").absolute()), pictured=())
        if not path.is_dir():
            raise fault(path, "is a file, expected a folder" if path.exists() else "no such folder")
        present = {name for name in (_RECORD, _TABLE, *_PLANS) if (path / name).is_file()}
        seeds = sorted(path.glob("seed-*/record.json"), key=lambda file: _number(file.parent.name))
    except OSError as error:
        raise fault(path, f"cannot be read: {error.strerror}") from None
    path = path.absolute()
    if _TABLE in present:
        return _from_json(path / _TABLE, path)
    if _RECORD in present:
        return _from_record(path, read_record(path / _RECORD))
    if present:  # no run of the sweep or suite has finished
        return _from_plan(path / min(present, key=_PLANS.index))
    if seeds:  # the first of several seeds is still running
        note = f"the first of several seeds ({seeds[0].parent.name}): there is no summary yet"
        first = _from_record(seeds[0].parent, read_record(seeds[0]))
        return replace(first, notes=[note, *first.notes])
    raise fault(path, f"holds neither {_RECORD} nor {_TABLE}: no run, sweep or suite")


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0


def _from_plan(file: Path) -> Experiment:
    found = read_json(file)
    plan = found.get(file.stem) if isinstance(found, dict) else None
    config = plan if isinstance(plan, dict) else {}
    sweep = file.stem == "sweep"
    return Experiment(
        path=file.parent,
        shape="sweep" if sweep else "suite",
        kind="ablation" if sweep else "benchmark",
        status="running",
        title=_title(config, file.parent),
        config=config,
        runs=0,
        notes=[_NOTHING_FINISHED],
    )


def _title(plan: Mapping[str, Any], path: Path) -> str:
    return str(plan.get("description") or path.name)


def _from_json(file: Path, folder: Path) -> Experiment:
    found = read_json(file)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind == "ablation":
        return _from_sweep(folder, table_from(Ablation, ABLATION_VERSION, file, found))
    if kind == "benchmark":
        return _from_suite(folder, table_from(Benchmark, BENCHMARK_VERSION, file, found))
    if kind in get_args(RecordKind):
        parts = {key: value for key, value in found.items() if key not in _COLLECTED}
        return _from_record(folder, record_from(file, parts))
    raise fault(file, f"is no table of a sweep or a suite, and no record (kind {kind!r:.40})")


def _run_in(root: Path, place: str) -> Path:
    """``root / place``; where that leads out of ``root``, a path that does not exist."""
    return path_inside(root, root / place) or root / ".outside"


def _pictured(title: str, folder: Path, root: Path) -> PicturedRun:
    """A run to show pictures of, with its record where that can be read."""
    try:
        record, problem = read_record(folder / _RECORD), ""
    except RequestError as error:
        record, problem = None, str(error)
    return PicturedRun(title=title, folder=folder, root=root, record=record, problem=problem)


# Runs ---------------------------------------------------------------------------------------------


def _from_record(path: Path, record: Record) -> Experiment:
    what = subject(record)
    folders = [path]
    if record.kind == "seeds":
        folders = [path / f"seed-{seed}" for seed in record.seeds or ()]
    return Experiment(
        path=path,
        shape="run",
        kind=record.kind,
        status=record.status,
        title=f"{record.kind}: {what}",
        error=record.error or "",
        rows=_rows_of_record(record, folders),
        pictured=[_pictured(what, folder, path) for folder in folders[:1]],
        runs=len(folders),
        budget=str(record.bench.get("budget") or ""),
        command=record.command,
        environment=record.environment,
        config=record.config,
    )


def _rows_of_record(record: Record, folders: Sequence[Path]) -> list[ResultRow]:
    """A run's undefended figures by the victims' network, then its defenses'."""
    config = record.config
    networks = config.get("victim_network") or [config.get("network", "")]
    seeds = (record.seeds if record.kind == "seeds" else [config.get("seed", 0)]) or []
    first = ResultRow(
        varied={},
        key=(),
        network=str(networks[0]),
        seeds=seeds,
        seeds_wanted=len(seeds),
        conditional=record.conditional_on_set,
        labels=record.labels,
        folders=folders,
        about=_about(config),
        metrics=record.metrics,
    )
    others = [
        replace(first, network=network, primary=False, metrics=metrics)
        for network, metrics in record.metrics_by_network.items()
    ]
    defended = [
        replace(
            first,
            key=(name,),
            defense=name,
            family=outcome.family,
            state=outcome.status,
            note=_note(outcome),
            metrics=outcome.metrics,
        )
        for name, outcome in record.defenses.items()
    ]
    return [first, *others, *defended]


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ABOUT if key in config}


def _note(outcome: Outcome) -> str:
    if outcome.status != "done":
        return f"{outcome.status}: {outcome.reason or 'no reason given'}"
    return outcome.caution or ""


# Sweeps -------------------------------------------------------------------------------------------


def _from_sweep(path: Path, table: Ablation) -> Experiment:
    """A row for each point and victims' network, and for each defense of it."""
    rows = [_row_of_point(path, row) for row in table.rows]
    points = {row.key: row for row in rows if row.primary and row.folders}
    defended = [each for row in table.rows for each in _defended(path, row)]
    return Experiment(
        path=path,
        shape="sweep",
        kind=table.kind,
        status=table.status,
        title=_title(table.sweep, path),
        varied=table.axes,
        axes=table.axes,
        one_at_a_time=table.one_at_a_time,
        rows=[*rows, *defended],
        pictured=[
            _pictured(row.point or "the base", row.folders[0], path) for row in points.values()
        ],
        runs=len({folder for row in rows for folder in row.folders}),
        budget=str(table.sweep.get("budget") or ""),
        failures=table.failures,
        command=table.command,
        environment=table.environment,
        config=table.sweep,
        notes=[] if any(row.seeds for row in rows) else [_NOTHING_FINISHED],
    )


def _row_of_point(path: Path, row: AblationRow) -> ResultRow:
    return ResultRow(
        varied=row.values,
        key=(row.axis or "", *(f"{name}={row.values[name]}" for name in sorted(row.values))),
        network=row.network,
        axis=row.axis,
        primary=row.primary,
        seeds=row.seeds,
        seeds_wanted=len(row.wanted),
        labels=row.labels,
        note=row.reason or "",
        folders=[_run_in(path, place) for place in row.folders],
        about=_about(row.config),
        metrics=row.metrics,
    )


def _defended(path: Path, row: AblationRow) -> list[ResultRow]:
    """A point's defenses. Without a figure for each seed it is unknown which seed has which."""
    point = _row_of_point(path, row)
    return [
        replace(
            point,
            key=(*point.key, name),
            defense=name,
            seeds=row.seeds if _most_values(metrics) == len(row.seeds) else (),
            note="",
            metrics=metrics,
        )
        for name, metrics in row.defenses.items()
    ]


def _most_values(metrics: Metrics) -> int:
    return max((len(summary.values) for summary in metrics.values()), default=0)


# Suites -------------------------------------------------------------------------------------------

_Point = tuple[str, str]  # setting, attack
# A row is in the first state that any of its runs is in.
_STATES: Final = ("done", "error", "not applicable")


def _from_suite(path: Path, table: Benchmark) -> Experiment:
    """A row for each setting, attack, victims' network and defense."""
    folders: dict[_Point, list[Path]] = {}
    for row in table.rows:
        if row.defense == "none" and row.seeds:
            places = [TwinGroup(row.setting, seed).place(row.attack) for seed in row.seeds]
            found = [_run_in(path, place) for place in places]
            folders.setdefault((row.setting, row.attack), found)
    pictured = {
        point: _pictured(", ".join(point), runs[0], path) for point, runs in folders.items()
    }
    points = dict.fromkeys((row.setting, row.attack) for row in table.rows)
    labels = {point: _labels(table.suite, point, pictured.get(point)) for point in points}
    about = {point: _about_point(table.suite, point, pictured.get(point)) for point in points}
    return Experiment(
        path=path,
        shape="suite",
        kind=table.kind,
        status=table.status,
        title=_title(table.suite, path),
        varied=["setting", "attack"],
        rows=[_row_of_suite(row, folders, labels, about) for row in table.rows],
        pictured=list(pictured.values()),
        runs=sum(len(runs) for runs in folders.values()),
        budget=str(table.suite.get("budget") or ""),
        failures=table.failures,
        command=table.command,
        environment=table.environment,
        config=table.suite,
        notes=[] if folders else [_NOTHING_FINISHED],
    )


def _row_of_suite(
    row: BenchmarkRow,
    folders: Mapping[_Point, Sequence[Path]],
    labels: Mapping[_Point, Sequence[str]],
    about: Mapping[_Point, Mapping[str, Any]],
) -> ResultRow:
    point = (row.setting, row.attack)
    state = next((name for name in _STATES if row.cells.get(name)), "missing")
    note = row.reason or row.caution or ""
    if note and state not in ("done", "missing"):
        note = f"{state}: {note}"
    return ResultRow(
        varied={"setting": row.setting, "attack": row.attack},
        key=(*point, row.defense),
        network=row.network,
        defense=None if row.defense == "none" else row.defense,
        family=row.family,
        state=state,
        holds=row.holds,
        seeds=row.seeds,
        seeds_wanted=sum(row.cells.values()),
        labels=labels[point],
        note=note,
        folders=folders.get(point, ()),
        about=about[point],
        metrics=row.metrics,
    )


def _labels(suite: Mapping[str, Any], point: _Point, run: PicturedRun | None) -> list[str]:
    """What the run's record says; where it is not there, what the suite's own keys say."""
    if run is not None and run.record is not None:
        return run.record.labels
    return labels_of(_suite_keys(suite, point).get("trigger_range"))


def _about_point(
    suite: Mapping[str, Any], point: _Point, run: PicturedRun | None
) -> dict[str, Any]:
    record = None if run is None else run.record
    return _about(_suite_keys(suite, point) if record is None else record.config)


def _suite_keys(suite: Mapping[str, Any], point: _Point) -> dict[str, Any]:
    """The keys of the configuration that the suite itself gives; those of presets are not there."""
    setting, attack = point
    own = _mapping(suite, "settings", setting)
    keys: dict[str, Any] = {}
    for layer in (
        _mapping(own, "keys"),
        _mapping(suite, "attacks", attack),
        _mapping(own, "attacks", attack),
    ):
        keys |= layer
    return keys


def _mapping(found: object, *keys: str) -> Mapping[str, Any]:
    """The mapping under ``keys``, one inside the other; empty where there is none."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
