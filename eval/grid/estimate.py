"""An estimate of a sweep: how many jobs there are, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ..results.formatting import duration
from .jobs import DefenseJob, DistillationJob, Job
from .ledger import Ledger
from .sweep import Sweep, cell_place, sweep_jobs


@final
@dataclass(frozen=True)
class SweepEstimate:
    """The jobs of a sweep, and the time that is left.

    cells: points × seeds, each configuration once. twins: clean runs besides. defended: runs of
    defenses. done, left: finished and other jobs. seconds: for one worker and all that is left,
    from the measured cells; ``None`` where none was measured.
    """

    points: int
    seeds: int
    cells: int
    twins: int
    defended: int
    done: int
    left: int
    seconds: float | None

    def lines(self, workers: int) -> list[str]:
        """The estimate as text, for so many workers."""
        lines = [
            f"{self.points} points × {self.seeds} seeds: {self.cells} cells, "
            f"{self.twins} clean twins, {self.defended} runs of defenses",
            f"{self.done} of {self.done + self.left} are done",
        ]
        if not self.left:
            return lines
        if self.seconds is None:
            return [*lines, "no cell was measured yet: --limit 2 runs two, for an estimate"]
        noun = f"{workers} worker" + "s" * (workers > 1)
        return [*lines, f"about {duration(self.seconds / workers)} left on {noun}"]


def estimate_sweep(sweep: Sweep, out: Path | None) -> SweepEstimate:
    """The estimate for running ``sweep`` in ``out``; writes nothing."""
    jobs, points = sweep_jobs(sweep), sweep.points()
    cells = {cell_place(sweep.config(p, s)) for p in points for s in sweep.seed_range()}
    distilled = [job for job in jobs if isinstance(job, DistillationJob)]
    left = [job for job in jobs if out is None or not job.done(out)]
    return SweepEstimate(
        points=len(points),
        seeds=sweep.seeds,
        cells=len(cells),
        twins=sum(job.place not in cells for job in distilled),
        defended=sum(isinstance(job, DefenseJob) for job in jobs),
        done=len(jobs) - len(left),
        left=len(left),
        seconds=None if out is None else _seconds(jobs, left, Ledger(out).seconds()),
    )


def _seconds(
    jobs: Sequence[Job], left: Sequence[Job], measured: Mapping[str, float]
) -> float | None:
    """The time of ``left``: the mean of other seeds of the same point, else of the same kind."""
    by_point: dict[str, list[float]] = {}
    by_kind: dict[str, list[float]] = {}
    for job in jobs:
        if job.place in measured:
            by_point.setdefault(_without_seed(job), []).append(measured[job.place])
            by_kind.setdefault(_kind(job), []).append(measured[job.place])
    every = [seconds for known in by_kind.values() for seconds in known]
    if not every:
        return None
    total = 0.0
    for job in left:
        known = by_point.get(_without_seed(job)) or by_kind.get(_kind(job)) or every
        total += sum(known) / len(known)
    return total


def _kind(job: Job) -> str:
    return f"{type(job).__name__} {'attacked' if job.config.attack else 'clean'}"


def _without_seed(job: Job) -> str:
    run = job.config.run.model_copy(update={"seed": 0})
    return f"{type(job).__name__} {job.config.model_copy(update={'run': run}).key()}"
