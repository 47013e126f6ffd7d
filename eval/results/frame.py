"""Records and tables of sweeps as data frames: one row for each measured value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...distill.types import RequestError
from .ablation import Ablation
from .metrics import Summary
from .record import Record

if TYPE_CHECKING:
    from pandas import DataFrame

# The keys that say what a row is about; the others follow.
_FIRST = ("dataset", "backend", "attack", "ipc")
_CONTROL = "control_"

Row = dict[str, Any]


def record_frame(record: Record) -> DataFrame:
    """A row for each value: of each victim, or with several seeds of each seed.

    Columns: the configuration's keys (``dataset``, ``backend``, ``attack``, ``ipc`` first; the
    distilling network is ``network``), then ``seed``, ``victim`` (empty over seeds),
    ``victim_network``, ``defense`` (empty for none), ``on`` (``attacked set`` or ``clean twin``),
    ``metric``, ``value``.
    Errors: ``RequestError`` where pandas is not installed.
    """
    config = dict(record.config)
    networks = config.pop("victim_network", None) or [config.get("network")]
    seeds = record.seeds if record.kind == "seeds" else None
    own = {"seed": config.pop("seed", None)}
    rows: list[Row] = []

    def add(metrics: Mapping[str, Summary], network: object, defense: str | None) -> None:
        about = {**_identity(config), **own, "victim_network": network, "defense": defense}
        rows.extend(_rows(about, metrics, seeds))

    add(record.metrics, networks[0], None)
    for name, metrics in record.metrics_by_network.items():
        add(metrics, name, None)
    for name, outcome in record.defenses.items():
        add(outcome.metrics, networks[0], name)
    return _frame(rows)


def sweep_frame(table: Ablation) -> DataFrame:
    """A row for each value of a sweep, that is of each seed; columns as of ``record_frame``, with
    every swept axis among the keys."""
    rows: list[Row] = []
    for row in table.rows:
        config = {key: value for key, value in row.config.items() if key != "victim_network"}
        about = {**_identity(config), **row.values, "seed": None, "victim_network": row.network}
        rows += _rows({**about, "defense": None}, row.metrics, row.seeds)
        for name, metrics in row.defenses.items():
            rows += _rows({**about, "defense": name}, metrics, row.seeds)
    return _frame(rows)


def _identity(config: Mapping[str, Any]) -> Row:
    first = {key: config.get(key) for key in _FIRST}
    return {**first, **{key: value for key, value in config.items() if key not in first}}


def _rows(
    about: Mapping[str, Any], metrics: Mapping[str, Summary], seeds: Iterable[int] | None
) -> list[Row]:
    """seeds: those of the values; ``None`` where each value is a victim's."""
    rows = []
    for name, summary in metrics.items():
        numbers: list[int | None] = [*(range(len(summary.values)) if seeds is None else seeds)]
        if len(numbers) != len(summary.values):  # some seeds have no value: unknown which
            numbers = [None] * len(summary.values)
        for number, value in zip(numbers, summary.values, strict=True):
            victim = number if seeds is None else None
            seed = about["seed"] if seeds is None else number
            what = {
                "on": "clean twin" if name.startswith(_CONTROL) else "attacked set",
                "metric": name.removeprefix(_CONTROL),
                "value": value,
            }
            rows.append({**about, "seed": seed, "victim": victim, **what})
    return rows


def _frame(rows: list[Row]) -> DataFrame:
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise RequestError("to_frame needs pandas: pip install 'distillsec[pandas]'") from error
    return DataFrame(rows)
