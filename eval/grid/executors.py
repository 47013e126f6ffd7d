"""Where independent pieces of work run: here one after the other, or in several processes."""

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


class Lost(Exception):
    """A worker died with a piece of work in its hands: nobody knows what became of it."""


class Executor(ABC):
    """Takes pieces of work and gives back what each came to, in the order in which they end.

    A context manager: whoever leaves it stops what is still running. Work and results must be
    picklable where they go to another process.
    """

    @property
    @abstractmethod
    def room(self) -> int:
        """How many pieces to have under way at once."""

    @abstractmethod
    def submit(self, ticket: int, work: Work) -> None:
        """Take ``work``; ``ticket`` is how ``ended`` will call it."""

    @abstractmethod
    def ended(self) -> tuple[int, Any]:
        """Wait for any piece to end: its ticket, and its result or a ``Lost``.

        What ``work`` raises is raised here.
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

    def stop(self) -> None:  # noqa: B027 (some have nothing to stop)
        """Stop what is still running."""


@final
class Here(Executor):
    """In this process, one piece after the other."""

    room = 1

    def __init__(self) -> None:
        self._taken: deque[tuple[int, Work]] = deque()

    def submit(self, ticket: int, work: Work) -> None:
        self._taken.append((ticket, work))

    def ended(self) -> tuple[int, Any]:
        ticket, work = self._taken.popleft()
        return ticket, work()


@final
class Processes(Executor):
    """Several processes on this machine, started afresh (spawned), each with its own GPU.

    gpus: how many GPUs there are to hand out; process k sees GPU k modulo ``gpus`` as its only one.
    A process that dies (killed, out of memory) takes the others of its pool down: what they had in
    hand comes back as ``Lost``, and a new pool takes over.
    """

    def __init__(self, jobs: int, *, gpus: int = 0) -> None:
        # A fork would inherit torch's threads in whatever state they are.
        self._context = multiprocessing.get_context("spawn")
        self._jobs, self._gpus = jobs, gpus
        self._pool = self._fresh()
        self._tickets: dict[Future[Any], int] = {}

    @property
    def room(self) -> int:
        return self._jobs

    def submit(self, ticket: int, work: Work) -> None:
        try:
            future = self._pool.submit(work)
        except BrokenProcessPool:
            self._pool = self._fresh()
            future = self._pool.submit(work)
        self._tickets[future] = ticket

    def ended(self) -> tuple[int, Any]:
        done, _ = wait(self._tickets, return_when=FIRST_COMPLETED)
        future = done.pop()
        ticket = self._tickets.pop(future)
        try:
            return ticket, future.result()
        except BrokenProcessPool:
            return ticket, Lost("the worker process died")

    def stop(self) -> None:
        processes = list((self._pool._processes or {}).values())
        busy = bool(self._tickets)
        self._pool.shutdown(wait=not busy, cancel_futures=True)
        for process in processes if busy else ():
            process.terminate()

    def _fresh(self) -> ProcessPoolExecutor:
        turns = self._context.Value("i", 0)
        return ProcessPoolExecutor(
            self._jobs, mp_context=self._context, initializer=_begin, initargs=(turns, self._gpus)
        )


def _begin(turns: Any, gpus: int) -> None:
    """What a worker process does first: take its GPU, and be ready to die with its parent."""
    with turns.get_lock():
        turn = turns.value
        turns.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = _nth_gpu(turn % gpus)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _nth_gpu(number: int) -> str:
    """GPU ``number`` of those that this process may see."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return seen.split(",")[number] if seen else str(number)


def _die_with_parent() -> None:
    """A driver that is killed leaves no worker behind, to write where the next one writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
