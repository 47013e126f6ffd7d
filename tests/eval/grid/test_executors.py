"""Executors: serial, in processes, on a Ray cluster; killed workers and killed parents."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import RunSection, configure
from distillsec.eval.grid.choose_executor import choose_executor
from distillsec.eval.grid.executors import Executor, ProcessExecutor, SerialExecutor, WorkerDied
from distillsec.eval.grid.ledger import Ledger
from distillsec.eval.grid.ray_executor import RayExecutor
from distillsec.eval.grid.scheduler import schedule

# Work that other processes can import.
WORK = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from distillsec.eval.grid.jobs import Job

@dataclass(frozen=True, kw_only=True, eq=False)
class EmptyJob(Job):
    needs = None
    def run(self, out, data_dir):
        return None

def double(number):
    if number < 0:
        raise ValueError("negative")
    return 2 * number

def process_and_gpus():
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

def slow_process_and_gpus():
    time.sleep(0.5)
    return process_and_gpus()

def die_once(path):
    if not Path(path).exists():
        Path(path).write_text("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"

def write_pid_and_sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module of functions that workers can import."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "work_of_executors.py").write_text(WORK)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("work_of_executors")
    sys.path.remove(str(folder))
    del sys.modules["work_of_executors"]


def serial() -> Executor:
    return SerialExecutor()


def processes() -> Executor:
    return ProcessExecutor(2)


def on_ray() -> Executor:
    pytest.importorskip("ray")
    return RayExecutor("local", workers=2)


@pytest.fixture(
    scope="module", params=[serial, processes, pytest.param(on_ray, marks=pytest.mark.slow)]
)
def executor(request: pytest.FixtureRequest, work: Any) -> Iterator[Executor]:
    """Each executor, started once: a process takes seconds to import torch."""
    with request.param() as started:
        yield started


def run_all(executor: Executor, calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)
    for ticket, call in enumerate(calls):
        executor.submit(ticket, call)
    for _ in calls:
        ticket, result = executor.next_result()
        results[ticket] = result
    return results


def test_results_have_the_tickets_of_their_work(executor: Executor, work: Any) -> None:
    assert executor.slots >= 1
    assert run_all(executor, [partial(work.double, n) for n in range(5)]) == [0, 2, 4, 6, 8]


def test_an_error_of_the_work_is_raised(executor: Executor, work: Any) -> None:
    with pytest.raises(ValueError, match="negative"):
        run_all(executor, [partial(work.double, -1)])
    assert run_all(executor, [partial(work.double, 3)]) == [6]  # and the executor still works


def test_work_of_a_killed_worker_can_be_submitted_again(
    executor: Executor, work: Any, tmp_path: Path
) -> None:
    if isinstance(executor, SerialExecutor):
        pytest.skip("it has no worker process")
    call = partial(work.die_once, str(tmp_path / "mark"))
    executor.submit(0, call)
    ticket, result = executor.next_result()
    assert ticket == 0 and isinstance(result, WorkerDied)
    executor.submit(0, call)
    assert executor.next_result() == (0, "alive")


@pytest.mark.slow
def test_processes_get_the_gpus_in_turn(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, expected in ((None, {"0", "1"}), ("5,7,9", {"5", "7"})):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with ProcessExecutor(2, gpus=2) as executor:
            found = dict(run_all(executor, [work.slow_process_and_gpus] * 8))
        assert set(found.values()) == expected


def test_leaving_the_executor_stops_running_work(work: Any, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt), ProcessExecutor(1) as executor:
        executor.submit(0, partial(work.write_pid_and_sleep, str(mark)))
        wait_until(mark.exists)
        raise KeyboardInterrupt
    wait_until(lambda: ended(int(mark.read_text())))


PARENT = """
import sys
from functools import partial
sys.path.insert(0, sys.argv[2])
import work_of_executors as work
from distillsec.eval.grid.executors import ProcessExecutor
from distillsec.eval.grid.ray_executor import RayExecutor

if __name__ == "__main__":
    with ProcessExecutor(1) if sys.argv[1] == "processes" else RayExecutor("local") as executor:
        executor.submit(0, partial(work.write_pid_and_sleep, sys.argv[3]))
        executor.next_result()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_workers_end_with_a_killed_parent(kind: str, work: Any, tmp_path: Path) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
    script, mark = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    folder = str(Path(work.__file__).parent)
    with subprocess.Popen([sys.executable, str(script), kind, folder, str(mark)]) as parent:
        try:
            wait_until(lambda: mark.exists() and mark.read_text() != "")
            worker = int(mark.read_text())
            assert not ended(worker)
        finally:
            parent.kill()
    wait_until(lambda: ended(worker))


def wait_until(ready: Callable[[], bool], seconds: float = 150.0) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# The choice --------------------------------------------------------------------------------------


def test_the_number_of_processes_follows_threads_cores_and_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunSection(device="cpu", threads=1)
    monkeypatch.setattr("distillsec.eval.grid.choose_executor.cpu_count", lambda: 6)
    assert choose_executor(run).slots == 6
    assert choose_executor(run.model_copy(update={"threads": 3})).slots == 2
    assert isinstance(choose_executor(run.model_copy(update={"threads": 6})), SerialExecutor)
    assert isinstance(choose_executor(run, jobs=1), SerialExecutor)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert choose_executor(run.model_copy(update={"device": "cuda"})).slots == 4
    options: list[dict[str, Any]] = [{"gpus": 0.5}, {"memory": 2.0}]
    for given in options:
        with pytest.raises(RequestError, match="--ray"):
            choose_executor(run, **given)


def test_without_ray_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunSection(device="cpu", threads=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'distillsec\[ray\]'"):
        choose_executor(run, ray="local")


def test_gpus_are_refused_for_cells_on_the_cpu() -> None:
    pytest.importorskip("ray")
    with pytest.raises(RequestError, match=r"--gpus 0.25: the cells run on the CPU"):
        choose_executor(RunSection(device="cpu", threads=1), ray="local", gpus=0.25)


# Overhead ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_empty_jobs_take_less_than_20_seconds(
    executor: Executor, work: Any, tmp_path: Path
) -> None:
    config = configure(threads=1, device="cpu")
    jobs = [work.EmptyJob(place=f"cells/{number}", config=config) for number in range(200)]
    began = time.monotonic()
    finished = list(schedule(jobs, tmp_path, executor))
    assert time.monotonic() - began < 20
    assert [each.reason for each in finished] == [None] * 200
    assert len(Ledger(tmp_path).rows()) == 200


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:1", "no Ray cluster at localhost:1"),
        ("ray://127.0.0.1:1", "no Ray cluster at ray://127.0.0.1:1"),
        ("nowhere", "expected auto, local, HOST:PORT"),
        ("localhost:99999", "expected auto, local, HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, expected: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(RequestError, match=expected):
        RayExecutor(address)
