"""Executors: here, in processes, on a Ray cluster; workers and drivers that are killed."""

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
from distillsec.eval.grid.executors import Executor, Here, Lost, Processes
from distillsec.eval.grid.ledger import Ledger
from distillsec.eval.grid.machine import executor_for
from distillsec.eval.grid.on_ray import OnRay
from distillsec.eval.grid.scheduler import conduct

# Work that other processes can import.
WORK = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from distillsec.eval.plan import Piece

@dataclass(frozen=True, kw_only=True, eq=False)
class Nothing(Piece):
    needs = None
    def run(self, out, data_dir):
        return None

def double(number):
    if number < 0:
        raise ValueError("negative")
    return 2 * number

def seen():
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

def slow_seen():
    time.sleep(0.5)
    return seen()

def die_once(path):
    if not Path(path).exists():
        Path(path).write_text("here")
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"

def linger(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of pieces of work."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "work_of_executors.py").write_text(WORK)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("work_of_executors")
    sys.path.remove(str(folder))
    del sys.modules["work_of_executors"]


def here() -> Executor:
    return Here()


def processes() -> Executor:
    return Processes(2)


def on_ray() -> Executor:
    pytest.importorskip("ray")
    return OnRay("local", workers=2)


@pytest.fixture(
    scope="module", params=[here, processes, pytest.param(on_ray, marks=pytest.mark.slow)]
)
def executor(request: pytest.FixtureRequest, work: Any) -> Iterator[Executor]:
    """Each kind of executor, started once: a process takes seconds to import torch."""
    with request.param() as started:
        yield started


def run_all(executor: Executor, pieces: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(pieces)
    for ticket, piece in enumerate(pieces):
        executor.submit(ticket, piece)
    for _ in pieces:
        ticket, result = executor.ended()
        results[ticket] = result
    return results


def test_results_come_back_under_their_tickets(executor: Executor, work: Any) -> None:
    assert executor.room >= 1
    assert run_all(executor, [partial(work.double, n) for n in range(5)]) == [0, 2, 4, 6, 8]


def test_what_work_raises_is_raised(executor: Executor, work: Any) -> None:
    with pytest.raises(ValueError, match="negative"):
        run_all(executor, [partial(work.double, -1)])
    assert run_all(executor, [partial(work.double, 3)]) == [6]  # and the next is taken


def test_a_killed_worker_loses_its_piece_and_the_next_attempt_is_taken(
    executor: Executor, work: Any, tmp_path: Path
) -> None:
    if isinstance(executor, Here):
        pytest.skip("it is its own worker")
    piece = partial(work.die_once, str(tmp_path / "mark"))
    executor.submit(0, piece)
    ticket, answer = executor.ended()
    assert ticket == 0 and isinstance(answer, Lost)
    executor.submit(0, piece)
    assert executor.ended() == (0, "alive")


@pytest.mark.slow
def test_processes_take_turns_at_the_gpus(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seen, expected in ((None, {"0", "1"}), ("5,7,9", {"5", "7"})):
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        with Processes(2, gpus=2) as executor:
            found = dict(run_all(executor, [work.slow_seen] * 8))
        assert set(found.values()) == expected


def test_whoever_leaves_stops_what_is_running(work: Any, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt), Processes(1) as executor:
        executor.submit(0, partial(work.linger, str(mark)))
        wait_for(mark.exists)
        raise KeyboardInterrupt
    wait_for(lambda: gone(int(mark.read_text())))


DRIVER = """
import sys
from functools import partial
sys.path.insert(0, sys.argv[2])
import work_of_executors as work
from distillsec.eval.executors import Processes
from distillsec.eval.on_ray import OnRay

if __name__ == "__main__":
    with Processes(1) if sys.argv[1] == "processes" else OnRay("local", workers=1) as executor:
        executor.submit(0, partial(work.linger, sys.argv[3]))
        executor.ended()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_a_killed_driver_leaves_no_worker(kind: str, work: Any, tmp_path: Path) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
    script, mark = tmp_path / "driver.py", tmp_path / "pid"
    script.write_text(DRIVER)
    folder = str(Path(work.__file__).parent)
    with subprocess.Popen([sys.executable, str(script), kind, folder, str(mark)]) as driver:
        try:
            wait_for(lambda: mark.exists() and mark.read_text() != "")
            worker = int(mark.read_text())
            assert not gone(worker)
        finally:
            driver.kill()
    wait_for(lambda: gone(worker))


def wait_for(ready: Callable[[], bool], seconds: float = 150.0) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# Which one ---------------------------------------------------------------------------------------


def test_the_executor_fits_the_cells_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunSection(device="cpu", threads=1)
    monkeypatch.setattr("distillsec.eval.grid.machine._cores", lambda: 6)
    assert executor_for(run).room == 6
    assert executor_for(run.model_copy(update={"threads": 3})).room == 2
    assert isinstance(executor_for(run.model_copy(update={"threads": 6})), Here)
    assert isinstance(executor_for(run, jobs=1), Here)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert executor_for(run.model_copy(update={"device": "cuda"})).room == 4
    wishes: list[dict[str, Any]] = [{"gpus": 0.5}, {"memory": 2.0}]
    for wish in wishes:
        with pytest.raises(RequestError, match="--ray"):
            executor_for(run, **wish)


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunSection(device="cpu", threads=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'distillsec\[ray\]'"):
        executor_for(run, ray="local")


def test_a_share_of_a_gpu_is_for_cells_on_a_gpu() -> None:
    pytest.importorskip("ray")
    with pytest.raises(RequestError, match=r"--gpus 0.25: the cells run on the CPU"):
        executor_for(RunSection(device="cpu", threads=1), ray="local", gpus=0.25)


# Overhead ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_cells_that_do_nothing_take_less_than_20_seconds(
    executor: Executor, work: Any, tmp_path: Path
) -> None:
    config = configure(threads=1, device="cpu")
    cells = [work.Nothing(place=f"cells/{number}", config=config) for number in range(200)]
    began = time.monotonic()
    ended = list(conduct(cells, tmp_path, executor))
    assert time.monotonic() - began < 20
    assert [each.reason for each in ended] == [None] * 200
    assert len(Ledger(tmp_path).rows()) == 200
