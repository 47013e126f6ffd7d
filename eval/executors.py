"""Where independent pieces of work run: here one after the other, or in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], jobs: int
) -> Iterator[tuple[Piece, Result]]:
    """``work`` on each of ``pieces``, as they finish; ``jobs`` processes, none for one.

    ``work``, the pieces and the results must be picklable where there are several. An exception
    of ``work``, a Ctrl-C among them, ends all: pieces that have not begun never do, and running
    ones are stopped.
    """
    if jobs == 1 or len(pieces) < 2:
        for piece in pieces:
            yield piece, work(piece)
        return
    # A fork would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(pieces)), mp_context=context)
    try:
        futures = {pool.submit(work, piece): piece for piece in pieces}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
