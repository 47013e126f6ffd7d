"""Executors: where independent work runs, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self, final

Work = Callable[[], Any]


class WorkerDied(Exception):
    """The result of work whose worker died before it answered."""


class Executor(ABC):
    """Runs work, and returns results in the order in which the work ends.

    A context manager, which stops running work at its exit. Work and results must be picklable
    where they go to another process.
    """

    @property
    @abstractmethod
    def slots(self) -> int:
        """How much work to submit at once."""

    @abstractmethod
    def submit(self, ticket: int, work: Work) -> None:
        """Start ``work``; ``next_result`` returns its result with ``ticket``."""

    @abstractmethod
    def next_result(self) -> tuple[int, Any]:
        """Wait for any work to end; returns its ticket, and its result or a ``WorkerDied``.

        An error of the work is raised here.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:  # noqa: B027 (not every executor has something to stop)
        """Stop running work."""


@final
class SerialExecutor(Executor):
    """Runs work in this process, one after the other."""

    slots = 1

    def __init__(self) -> None:
        self._submitted: deque[tuple[int, Work]] = deque()

    def submit(self, ticket: int, work: Work) -> None:
        self._submitted.append((ticket, work))

    def next_result(self) -> tuple[int, Any]:
        ticket, work = self._submitted.popleft()
        return ticket, work()


@final
class ProcessExecutor(Executor):
    """Runs work in several spawned processes on this machine.

    gpus: the number of GPUs; process k sees only GPU k modulo ``gpus``. A process that dies
    (killed, out of memory) ends all processes of its pool: the result of their work is
    ``WorkerDied``, and a new pool is started.
    """

    def __init__(self, jobs: int, *, gpus: int = 0) -> None:
        # A fork would copy torch's threads in an undefined state.
        self._context = multiprocessing.get_context("spawn")
        self._jobs, self._gpus = jobs, gpus
        self._pool = self._new_pool()
        self._tickets: dict[Future[Any], int] = {}

    @property
    def slots(self) -> int:
        return self._jobs

    def submit(self, ticket: int, work: Work) -> None:
        try:
            future = self._pool.submit(work)
        except BrokenProcessPool:
            self._pool = self._new_pool()
            future = self._pool.submit(work)
        self._tickets[future] = ticket

    def next_result(self) -> tuple[int, Any]:
        done, _ = wait(self._tickets, return_when=FIRST_COMPLETED)
        future = done.pop()
        ticket = self._tickets.pop(future)
        try:
            return ticket, future.result()
        except BrokenProcessPool:
            return ticket, WorkerDied("the worker process died")

    def stop(self) -> None:
        processes = list((self._pool._processes or {}).values())
        busy = bool(self._tickets)
        self._pool.shutdown(wait=not busy, cancel_futures=True)
        for process in processes if busy else ():
            process.terminate()

    def _new_pool(self) -> ProcessPoolExecutor:
        count = self._context.Value("i", 0)
        return ProcessPoolExecutor(
            self._jobs,
            mp_context=self._context,
            initializer=_start_worker,
            initargs=(count, self._gpus),
        )


def _start_worker(count: Any, gpus: int) -> None:
    """Run at the start of a worker process: choose its GPU, and watch its parent.

    count: a shared counter of started workers.
    """
    with count.get_lock():
        number = count.value
        count.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = _nth_gpu(number % gpus)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _nth_gpu(number: int) -> str:
    """GPU ``number`` of those that are visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[number] if visible else str(number)


def _exit_with_parent() -> None:
    """End this worker when its parent ends: a resumed command may write to the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
