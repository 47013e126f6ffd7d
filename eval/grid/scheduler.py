"""Carry out a plan: every piece after those it needs, lost ones again, failed ones recorded."""

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
from ..run.progress import Reporter
from .executors import Executor, Lost
from .jobs import Piece
from .ledger import Event, Ledger, alone

_MOST_LOSSES = 3
_PATIENCE = 60.0  # seconds in which a worker whose driver died must have gone
_BETWEEN_TABLES = 20.0  # seconds, and ten times what a table takes


@final
@dataclass(frozen=True)
class Ended:
    """What became of a piece: ``reason`` is ``None`` when it is done."""

    piece: Piece
    reason: str | None


@final
@dataclass(frozen=True)
class _Attempt:
    """One attempt's answer, from whichever process. hopeless: another would end the same way."""

    reason: str | None
    seconds: float
    hopeless: bool = False


class Refresh(Protocol):
    """Writes the tables of what is finished so far."""

    def __call__(self, failures: Sequence[Failure]) -> None:
        """failures: what came to nothing until now."""


def carry_out(
    pieces: Sequence[Piece],
    out: Path,
    executor: Executor,
    *,
    title: str,
    refresh: Refresh,
    data_dir: Path | None = None,
    retries: int = 1,
    reporter: Reporter,
) -> None:
    """``conduct`` what is not done yet of ``pieces``, telling and tabulating on the way."""
    left = [piece for piece in pieces if not piece.done(out)]
    done, failures = len(pieces) - len(left), list[Failure]()
    if done:
        reporter.say(f"{title}: {done} of {len(pieces)} are there already")
    refreshed, cost = time.monotonic(), 0.0
    with executor, reporter.phase(title, len(pieces), done) as phase:
        for ended in conduct(left, out, executor, data_dir=data_dir, retries=retries):
            done += 1
            if ended.reason is not None:
                failures.append(Failure(place=ended.piece.place, reason=ended.reason))
                reporter.say(f"{ended.piece.place}: {ended.reason}")
            began = time.monotonic()
            if began - refreshed > max(_BETWEEN_TABLES, 10 * cost):
                refresh(failures)
                refreshed = time.monotonic()
                cost = refreshed - began
            phase.reach(done)
    refresh(failures)


def conduct(
    pieces: Sequence[Piece],
    out: Path,
    executor: Executor,
    *,
    data_dir: Path | None = None,
    retries: int = 1,
) -> Iterator[Ended]:
    """Run ``pieces`` in folders below ``out``, and give each as it ends.

    The order is that of ``pieces``, as far as ``after`` allows; a place that is not among them is
    taken to be there. A piece that fails is tried again ``retries`` times, unless the request
    itself was wrong; one whose worker died three times; then it is over, with the reason. What
    needs a failed piece fails with it. Everything that happens is a line of the ledger.
    """
    ledger = Ledger(out)
    queue = _Queue(pieces)
    tries = [0] * len(pieces)
    losses = [0] * len(pieces)
    while queue.unfinished:
        while queue.under_way < executor.room and (number := queue.next()) is not None:
            executor.submit(number, partial(_attempt, pieces[number], out, data_dir))
        number, answer = executor.ended()
        piece = pieces[number]
        if isinstance(answer, Lost):
            losses[number] += 1
            ledger.write("lost", piece.place)
            if losses[number] < _MOST_LOSSES:
                queue.again(number)
                continue
            answer = _Attempt(f"its worker died {_MOST_LOSSES} times", 0.0)
        elif answer.reason is not None and not answer.hopeless and tries[number] < retries:
            tries[number] += 1
            ledger.write("again", piece.place, seconds=answer.seconds, reason=answer.reason)
            queue.again(number)
            continue
        event: Event = "done" if answer.reason is None else "failed"
        ledger.write(event, piece.place, seconds=answer.seconds, reason=answer.reason or "")
        yield Ended(piece, answer.reason)
        for stranded in queue.over(number, failed=answer.reason is not None):
            reason = f"{pieces[stranded].needs}, which it needs, failed"
            yield Ended(pieces[stranded], reason)


def _attempt(piece: Piece, out: Path, data_dir: Path | None) -> _Attempt:
    """Run in the worker: one attempt, its time, and what it failed of."""
    began = time.monotonic()
    try:
        place = out / piece.place
        place.mkdir(parents=True, exist_ok=True)
        with alone(place, patience=_PATIENCE):
            piece.run(out, data_dir)
    except Exception as error:  # a user's attack runs here too
        text = str(error) if isinstance(error, DistillsecError) else repr(error)
        if out_of_memory(error):
            text = f"out of memory: {text}"
        hopeless = isinstance(error, RequestError)
        return _Attempt(" ".join(text.split()), time.monotonic() - began, hopeless)
    return _Attempt(None, time.monotonic() - began)


@final
class _Queue:
    """Which pieces may run now, by number, the first first."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        places = {piece.place: number for number, piece in enumerate(pieces)}
        self._waiting = [{places[p] for p in piece.after if p in places} for piece in pieces]
        self._followers: list[list[int]] = [[] for _ in pieces]
        for number, others in enumerate(self._waiting):
            for other in others:
                self._followers[other].append(number)
        self._ready = [number for number, others in enumerate(self._waiting) if not others]
        self._stranded: set[int] = set()
        self.unfinished, self.under_way = len(pieces), 0

    def next(self) -> int | None:
        """The next piece to begin; ``None`` where all others wait for those under way."""
        if not self._ready:
            return None
        self.under_way += 1
        return heapq.heappop(self._ready)

    def again(self, number: int) -> None:
        """Put a piece that was under way back."""
        self.under_way -= 1
        heapq.heappush(self._ready, number)

    def over(self, number: int, *, failed: bool) -> list[int]:
        """Let go of those who waited for ``number``; returns those that can't be any more."""
        self.under_way -= 1
        return self._leave(number, failed=failed)

    def _leave(self, number: int, *, failed: bool) -> list[int]:
        self.unfinished -= 1
        stranded = []
        for follower in self._followers[number]:
            self._waiting[follower].discard(number)
            if failed and self._pieces[follower].needs == self._pieces[number].place:
                self._stranded.add(follower)
                stranded += [follower, *self._leave(follower, failed=True)]
            elif not self._waiting[follower] and follower not in self._stranded:
                heapq.heappush(self._ready, follower)
        return stranded
