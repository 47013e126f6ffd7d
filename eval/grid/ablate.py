"""Run a sweep: every cell once, with its clean twin, its experts and its defenses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...distill.files.safe import read_json, write_json, write_text
from ..results.ablation import Ablation, ablation_markdown
from ..results.record import Failure
from ..run.progress import Reporter
from .executors import Executor
from .folder import opened
from .jobs import Job
from .scheduler import run_jobs
from .summarise_ablation import summarise_sweep
from .sweep import Sweep, sweep_jobs

_SWEEP = "sweep.json"


def ablate(
    sweep: Sweep,
    out: Path,
    executor: Executor,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    retries: int = 1,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Ablation:
    """Run ``sweep`` in the folder ``out``, and return the table that is also written there.

    A cell's folder is named by the hash of its configuration: with ``resume`` finished cells are
    not run again, even if the sweep has changed. limit: the largest number of jobs to run now.
    A cell that fails is retried; the table gives the reason of the last failure.
    Errors: ``RequestError`` for a folder with other content.
    """

    def refresh(failures: Sequence[Failure]) -> None:
        table = summarise_sweep(sweep, out, failures)
        write_json(out / "table.json", table.model_dump(mode="json"))
        write_text(out / "table.md", ablation_markdown(table))

    with opened(out, _SWEEP, "sweep", resume=resume):
        write_json(out / _SWEEP, {"sweep": sweep.model_dump(mode="json")})
        jobs = sweep_jobs(sweep)
        run_jobs(
            jobs if limit is None else _limited(jobs, out, limit),
            out,
            executor,
            title="ablation",
            refresh=refresh,
            data_dir=data_dir,
            retries=retries,
            reporter=reporter or Reporter(),
        )
    return Ablation.model_validate(read_json(out / "table.json"))


def _limited(jobs: Sequence[Job], out: Path, limit: int) -> list[Job]:
    """The finished jobs, and the first ``limit`` of the others; dependencies come first anyway."""
    chosen, left = [], limit
    for job in jobs:
        done = job.done(out)
        if done or left > 0:
            chosen.append(job)
            left -= not done
    return chosen
