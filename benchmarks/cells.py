"""What the tables of runs share: a cell that is run once, and the finished records of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distillsec.eval.config.schema import Config
from distillsec.eval.results.metrics import kind_of, summarise
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.progress import Reporter


def run_once(config: Config, folder: Path, control_run: Path | None = None) -> None:
    """Run ``config`` in ``folder``, or go on with it; nothing where it is finished."""
    quiet = Reporter(quiet=True)
    run_cell(config, folder, resume=folder.exists(), control_run=control_run, reporter=quiet)


def finished(folders: Mapping[int, Path]) -> dict[int, Record]:
    """The records of the finished ones of ``folders``, by seed."""
    paths = {seed: folder / "record.json" for seed, folder in folders.items()}
    records = {seed: read_record(path) for seed, path in paths.items() if path.exists()}
    return {seed: record for seed, record in records.items() if record.status == "done"}


def over_seeds(records: Mapping[int, Record], metrics: Iterable[str]) -> dict[str, Any]:
    """Each metric's mean over victims, summarised over seeds."""
    return {
        name: summarise([r.mean(name) for r in records.values()], kind_of(name)).model_dump()
        for name in metrics
    }
