"""The scheduler: runs jobs after their dependencies, retries failures, and keeps the ledger."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, final

from ...distill.types import DistillsecError, RequestError
from ..results.record import Failure
from ..run.checks import out_of_memory
from ..run.lock import locked
from ..run.progress import Reporter
from .executors import Executor, WorkerDied
from .jobs import Job
from .ledger import Event, Ledger

_MOST_DEATHS = 3
# A worker whose parent died ends within so many seconds, and its lock with it.
_LOCK_TIMEOUT = 60.0
_BETWEEN_TABLES = 20.0  # seconds, and at least ten times what a table takes


@final
@dataclass(frozen=True)
class FinishedJob:
    """A job that will not run again; ``reason``: why it failed, ``None`` where it succeeded."""

    job: Job
    reason: str | None


@final
@dataclass(frozen=True)
class _Attempt:
    """The result of one attempt. permanent: whether another attempt would fail in the same way."""

    reason: str | None
    seconds: float
    permanent: bool = False


class Refresh(Protocol):
    """Writes the tables of the jobs that are finished."""

    def __call__(self, failures: Sequence[Failure]) -> None:
        """failures: all failures so far."""


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    executor: Executor,
    *,
    title: str,
    refresh: Refresh,
    data_dir: Path | None = None,
    retries: int = 1,
    reporter: Reporter,
) -> None:
    """Run the jobs that are not done yet; report progress, and refresh the tables from time to
    time."""
    left = [job for job in jobs if not job.done(out)]
    done, failures = len(jobs) - len(left), list[Failure]()
    if done:
        reporter.say(f"{title}: {done} of {len(jobs)} are done already")
    refreshed, cost = time.monotonic(), 0.0
    with executor, reporter.phase(title, len(jobs), done) as phase:
        for finished in schedule(left, out, executor, data_dir=data_dir, retries=retries):
            done += 1
            if finished.reason is not None:
                failures.append(Failure(place=finished.job.place, reason=finished.reason))
                reporter.say(f"{finished.job.place}: {finished.reason}")
            began = time.monotonic()
            if began - refreshed > max(_BETWEEN_TABLES, 10 * cost):
                refresh(failures)
                refreshed = time.monotonic()
                cost = refreshed - began
            phase.reach(done)
    refresh(failures)


def schedule(
    jobs: Sequence[Job],
    out: Path,
    executor: Executor,
    *,
    data_dir: Path | None = None,
    retries: int = 1,
) -> Iterator[FinishedJob]:
    """Run ``jobs`` in folders below ``out``, and yield each when it is finished.

    Jobs start in the order of ``jobs``, as far as their dependencies allow; a dependency that is
    not among ``jobs`` counts as done. A failed job is retried ``retries`` times, unless the request
    was wrong; a job whose worker dies is retried twice. A job whose dependency in ``needs`` failed
    fails without an attempt. The ledger gets a line for every attempt.
    """
    ledger = Ledger(out)
    queue = _Queue(jobs)
    tries = [0] * len(jobs)
    deaths = [0] * len(jobs)
    while queue.unfinished:
        while queue.running < executor.slots and (number := queue.next()) is not None:
            executor.submit(number, partial(_attempt, jobs[number], out, data_dir))
        number, result = executor.next_result()
        job = jobs[number]
        if isinstance(result, WorkerDied):
            deaths[number] += 1
            ledger.write("lost", job.place)
            if deaths[number] < _MOST_DEATHS:
                queue.retry(number)
                continue
            result = _Attempt(f"its worker died {_MOST_DEATHS} times", 0.0)
        elif result.reason is not None and not result.permanent and tries[number] < retries:
            tries[number] += 1
            ledger.write("again", job.place, seconds=result.seconds, reason=result.reason)
            queue.retry(number)
            continue
        event: Event = "done" if result.reason is None else "failed"
        ledger.write(event, job.place, seconds=result.seconds, reason=result.reason or "")
        yield FinishedJob(job, result.reason)
        for dependent in queue.finish(number, failed=result.reason is not None):
            yield FinishedJob(jobs[dependent], f"failed dependency: {jobs[dependent].needs}")


def _attempt(job: Job, out: Path, data_dir: Path | None) -> _Attempt:
    """One attempt at a job, in the worker."""
    began = time.monotonic()
    try:
        place = out / job.place
        place.mkdir(parents=True, exist_ok=True)
        with locked(place, timeout=_LOCK_TIMEOUT):
            pass  # the run takes the lock again, and does not wait
        job.run(out, data_dir)
    except Exception as error:  # a user's attack runs here too
        text = str(error) if isinstance(error, DistillsecError) else repr(error)
        if out_of_memory(error):
            text = f"out of memory: {text}"
        permanent = isinstance(error, RequestError)
        return _Attempt(" ".join(text.split()), time.monotonic() - began, permanent)
    return _Attempt(None, time.monotonic() - began)


@final
class _Queue:
    """The jobs that may run now, by number, the lowest first."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        numbers = {job.place: number for number, job in enumerate(jobs)}
        self._waiting_for = [
            {numbers[place] for place in (*job.after, job.needs) if place in numbers}
            for job in jobs
        ]
        self._dependents: list[list[int]] = [[] for _ in jobs]
        for number, dependencies in enumerate(self._waiting_for):
            for dependency in dependencies:
                self._dependents[dependency].append(number)
        self._ready = [number for number, others in enumerate(self._waiting_for) if not others]
        self._failed: set[int] = set()
        self.unfinished, self.running = len(jobs), 0

    def next(self) -> int | None:
        """The next job to start; ``None`` where all others wait for running jobs."""
        if not self._ready:
            return None
        self.running += 1
        return heapq.heappop(self._ready)

    def retry(self, number: int) -> None:
        """Put a running job back."""
        self.running -= 1
        heapq.heappush(self._ready, number)

    def finish(self, number: int, *, failed: bool) -> list[int]:
        """End a running job; returns the jobs that fail with it."""
        self.running -= 1
        return self._release(number, failed=failed)

    def _release(self, number: int, *, failed: bool) -> list[int]:
        self.unfinished -= 1
        failing = []
        for dependent in self._dependents[number]:
            self._waiting_for[dependent].discard(number)
            if failed and self._jobs[dependent].needs == self._jobs[number].place:
                self._failed.add(dependent)
                failing += [dependent, *self._release(dependent, failed=True)]
            elif not self._waiting_for[dependent] and dependent not in self._failed:
                heapq.heappush(self._ready, dependent)
        return failing
