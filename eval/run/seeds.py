"""Several distillation seeds of one configuration, and their summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...distill.files.artifact import load_set
from ...distill.types import RequestError
from ..config.schema import Config
from ..results.metrics import mean_distance, over_seeds
from ..results.record import Record, command_line
from .cell import run_cell
from .folder import RunFolder
from .progress import Reporter
from .records import describe_distance

_NORMS = ("rms", "linf", "l2")


def run_seeds(
    config: Config,
    count: int,
    out: Path | str,
    *,
    given: Sequence[str] = (),
    data_dir: Path | str | None = None,
    resume: bool = False,
    buffer: Path | str | None = None,
    reporter: Reporter | None = None,
) -> Record:
    """``count`` runs with seeds ``seed``, ``seed + 1``, … in ``out/seed-N``, and their summary.

    Victims are nested in a set, so each seed gives one number, the mean over its victims, and the
    interval is over seeds. With ``resume``, finished seeds are not run again.
    buffer: as for ``run_cell``, with a folder for each seed.
    """
    reporter = reporter or Reporter()
    out = Path(out)
    folder = RunFolder(out)
    first = config.run.seed
    if not (resume and (out / f"seed-{first}").is_dir()):  # after a kill, out may lack a summary
        earlier = folder.look(resume=resume)
        if earlier is not None and earlier.kind != "seeds":
            raise RequestError(f"{out} holds one run, not several seeds: resume without --seeds")
    records = []
    for seed in range(first, first + count):
        reporter.say(f"seed {seed} ({seed - first + 1} of {count})")
        one = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        place = out / f"seed-{seed}"
        records.append(
            run_cell(
                one,
                place,
                given=given,
                data_dir=data_dir,
                resume=resume and place.exists(),
                buffer=None if buffer is None else Path(buffer) / f"seed-{seed}",
                reporter=reporter,
            )
        )
        _summary(config, records, given).write(folder.record)
    record = _summary(config, records, given)
    record.distilled = _distances(records, out)
    record.status = "done"
    record.write(folder.record)
    return record


def _distances(records: Sequence[Record], out: Path) -> dict[str, Any]:
    """How far the sets are from their clean twins, mean over the seeds, beside the mean distance of
    two twins; empty where there are no twins."""
    found = [_from_twin(record) for record in records]
    found = [each for each in found if each.keys() == set(_NORMS)]
    if not found:
        return {}
    twins = [RunFolder(out / f"seed-{record.config['seed']}").control for record in records]
    files = [RunFolder(twin).distilled for twin in twins]
    return describe_distance(mean_distance(found), [load_set(f) for f in files if f.exists()])


def _from_twin(record: Record) -> dict[str, float]:
    known = {norm: record.distilled.get(f"{norm}_from_twin") for norm in _NORMS}
    return {norm: value for norm, value in known.items() if value is not None}


def _summary(config: Config, records: Sequence[Record], given: Sequence[str]) -> Record:
    """The record of the finished seeds together."""
    last = records[-1]
    summary = last.model_copy(
        update={
            "kind": "seeds",
            "status": "running",
            "config": config.flat(),
            "config_given": sorted(given),
            "config_key": config.key(),
            "control_key": config.control_key(),
            "command": command_line(),
            "conditional_on_set": False,
            "seeds": [record.config["seed"] for record in records],
            "trigger": None,
            "attack_counters": {},
            "distilled": {},
            "control": None,
            "timings": {
                name: sum(record.timings.get(name, 0.0) for record in records)
                for name in last.timings
            },
            "metrics": over_seeds([record.metrics for record in records]),
            "metrics_by_network": {
                name: over_seeds([record.metrics_by_network[name] for record in records])
                for name in last.metrics_by_network
            },
        }
    )
    return Record.model_validate(summary.model_dump())
