"""The scheduler: order, retries, dead workers, failed dependencies, and finished jobs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distillsec.distill.types import RequestError, RunError
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.grid.executors import Executor, SerialExecutor, Work, WorkerDied
from distillsec.eval.grid.jobs import Job
from distillsec.eval.grid.ledger import Ledger
from distillsec.eval.grid.scheduler import run_jobs, schedule
from distillsec.eval.results.record import Failure
from distillsec.eval.run.progress import Reporter

CONFIG: Config = configure(threads=1, device="cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoggedJob(Job):
    """Appends its place to a file; its first attempts raise ``errors``."""

    need: str | None = None
    errors: tuple[Exception, ...] = ()

    @property
    def needs(self) -> str | None:
        return self.need

    def run(self, out: Path, data_dir: Path | None) -> None:
        with (out / "order").open("a") as file:
            file.write(f"{self.place}\n")
        attempts = order(out).count(self.place)
        if attempts <= len(self.errors):
            raise self.errors[attempts - 1]

    def done(self, out: Path) -> bool:
        return (out / "order").exists() and self.place in order(out)


def order(out: Path) -> list[str]:
    return (out / "order").read_text().split()


def job(place: str, *after: str, need: str | None = None, errors: Any = ()) -> LoggedJob:
    return LoggedJob(place=place, config=CONFIG, after=after, need=need, errors=tuple(errors))


def run(jobs: list[LoggedJob], out: Path, **options: Any) -> dict[str, str | None]:
    finished = schedule(jobs, out, SerialExecutor(), **options)
    return {each.job.place: each.reason for each in finished}


def test_jobs_run_after_their_dependencies_and_otherwise_in_order(tmp_path: Path) -> None:
    jobs = [job("d", "c", "b"), job("a"), job("c", need="a"), job("b"), job("e", "elsewhere")]
    assert run(jobs, tmp_path) == dict.fromkeys("abcde")
    assert order(tmp_path) == ["a", "c", "b", "d", "e"]


def test_a_failure_is_retried_and_then_reported(tmp_path: Path) -> None:
    errors = [RunError("first"), ValueError("second\nline")]
    found = run([job("a", errors=errors), job("b", errors=errors[:1])], tmp_path, retries=1)
    assert found == {"a": "ValueError('second\\nline')", "b": None}
    assert order(tmp_path) == ["a", "a", "b", "b"]
    events = [(row["event"], row["place"], row.get("reason")) for row in Ledger(tmp_path).rows()]
    assert events == [
        ("again", "a", "first"),
        ("failed", "a", "ValueError('second\\nline')"),
        ("again", "b", "first"),
        ("done", "b", None),
    ]


def test_a_wrong_request_is_not_retried(tmp_path: Path) -> None:
    found = run([job("a", errors=[RequestError("no such thing")])], tmp_path, retries=5)
    assert found == {"a": "no such thing"} and order(tmp_path) == ["a"]


def test_a_failed_dependency_fails_its_dependents_and_no_others(tmp_path: Path) -> None:
    jobs = [
        job("a", errors=[RequestError("broken")]),
        job("b", need="a"),
        job("c", "a", need="b"),
        job("d", "a"),
    ]
    assert run(jobs, tmp_path) == {
        "a": "broken",
        "b": "failed dependency: a",
        "c": "failed dependency: b",
        "d": None,
    }
    assert order(tmp_path) == ["a", "d"]


def test_a_failed_dependent_does_not_run_after_its_other_dependencies(tmp_path: Path) -> None:
    jobs = [job("a", errors=[RequestError("broken")]), job("slow"), job("b", "slow", need="a")]
    assert run(jobs, tmp_path)["b"] == "failed dependency: a"
    assert order(tmp_path) == ["a", "slow"]


class DyingExecutor(Executor):
    """Its workers die ``deaths`` times before each work runs."""

    slots = 2

    def __init__(self, deaths: int) -> None:
        self._deaths, self._submitted = deaths, deque[tuple[int, Work]]()
        self._attempts: dict[int, int] = {}

    def submit(self, ticket: int, work: Work) -> None:
        self._submitted.append((ticket, work))

    def next_result(self) -> tuple[int, Any]:
        ticket, work = self._submitted.popleft()
        self._attempts[ticket] = self._attempts.get(ticket, 0) + 1
        return ticket, WorkerDied() if self._attempts[ticket] <= self._deaths else work()


@pytest.mark.parametrize(("deaths", "reason"), [(2, None), (3, "its worker died 3 times")])
def test_a_job_fails_when_its_worker_dies_three_times(
    tmp_path: Path, deaths: int, reason: str | None
) -> None:
    jobs = [job("a"), job("b", need="a")]
    finished = schedule(jobs, tmp_path, DyingExecutor(deaths))
    found = {each.job.place: each.reason for each in finished}
    assert found["a"] == reason
    assert (found["b"] is None) == (reason is None)
    events = [row["event"] for row in Ledger(tmp_path).rows() if row["place"] == "a"]
    assert events == ["lost"] * deaths + (["done"] if reason is None else ["failed"])


def test_finished_jobs_do_not_run_and_the_tables_get_the_failures(tmp_path: Path) -> None:
    jobs = [job("a"), job("b", need="a", errors=[RequestError("broken")])]
    tables: list[list[Failure]] = []
    (tmp_path / "order").write_text("a\n")
    run_jobs(
        jobs,
        tmp_path,
        SerialExecutor(),
        title="test",
        refresh=lambda failures: tables.append(list(failures)),
        reporter=Reporter(quiet=True),
    )
    assert order(tmp_path) == ["a", "b"]
    assert tables == [[Failure(place="b", reason="broken")]]
