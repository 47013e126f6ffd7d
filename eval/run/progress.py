"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere.

What cannot be written there is dropped: a closed terminal or a full disk ends no run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

from tqdm import tqdm

from ..results.formatting import duration

_SECONDS_BETWEEN_LINES = 15.0
# ValueError: stderr was closed. AttributeError: there is none.
_UNWRITABLE = (OSError, ValueError, AttributeError)
_LONG = 60.0  # seconds from which an estimate is shown beforehand


@final
class _Stderr:
    """The part of stderr that bars use."""

    def write(self, text: str) -> None:
        with suppress(*_UNWRITABLE):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(*_UNWRITABLE):
            sys.stderr.flush()

    def fileno(self) -> int:
        """For the terminal's width."""
        return sys.stderr.fileno()


_STDERR = _Stderr()


@final
@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What one outer iteration of a distillation logged.

    run: the run's folder; the clean twin's is ``control`` in it. phase: what is being made, in
    words. number: of the iteration, from 1. values: ``loss``, the trigger's ``trigger_linf``, the
    rates of a victim where ``curve_every`` asks for them, ``seconds`` so far.
    """

    run: Path
    phase: str
    number: int
    values: Mapping[str, float | None]


OnIteration = Callable[[Iteration], None]
"""Called after each outer iteration; what it raises ends the run, which can be resumed."""


@final
class Phase:
    """One phase of a run; a context manager. resumable: whether a stopped run can continue."""

    def __init__(
        self,
        title: str,
        total: int,
        done: int,
        *,
        silent: bool,
        bar: bool,
        resumable: bool = True,
        on_iteration: OnIteration | None = None,
    ) -> None:
        self._resumable, self._on_iteration = resumable, on_iteration
        self._title, self._total, self._first, self._done = title, total, done, done
        self._silent = silent
        self._started = self._resumed = self._last_line = time.monotonic()
        self._estimated = False
        self._bar = None
        if bar and not silent:
            self._bar = tqdm(total=total, initial=done, desc=title, file=_STDERR, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and error is None:
            took = duration(time.monotonic() - self._started)
            _write_line(f"{self._title}: done in {took}")

    def reach(self, done: int) -> None:
        """Show that ``done`` units are done; after the first, estimate the time of a long run."""
        now = time.monotonic()
        self._done = done
        rate = (now - self._resumed) / max(1, done - self._first)
        left = rate * (self._total - done)
        if not self._estimated:
            self._estimated = True
            if left > _LONG:
                how = "Ctrl-C stops the run" + ", --resume continues it" * self._resumable
                self._note(
                    f"{self._title}: about {duration(left)} at the first step's speed; {how}"
                )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif not self._silent and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            _write_line(f"{self._title}: {done}/{self._total}, about {duration(left)} left")

    def logged(self, run: Path, number: int, values: Mapping[str, float | None]) -> None:
        """Pass what iteration ``number`` of ``run`` logged to the callback."""
        if self._on_iteration is not None:
            self._on_iteration(Iteration(run=run, phase=self._title, number=number, values=values))

    def side(self, title: str, done: int, total: int) -> None:
        """Show work before the phase's next unit; its time does not count for the estimate."""
        now = time.monotonic()
        if done == total:
            self._resumed, self._first = now, self._done
        if self._bar is not None:
            self._bar.set_postfix_str("" if done == total else f"{title} {done}/{total}")
        elif not self._silent and (
            done == total or now - self._last_line >= _SECONDS_BETWEEN_LINES
        ):
            self._last_line = now
            _write_line(f"{self._title}: {title}, {done}/{total}")

    def _note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=_STDERR)
        elif not self._silent:
            _write_line(text)


@final
class Reporter:
    """Reports to stderr; with ``quiet`` it writes nothing.

    on_iteration: called after each outer iteration of a distillation.
    """

    def __init__(self, *, quiet: bool = False, on_iteration: OnIteration | None = None) -> None:
        self._quiet, self._on_iteration = quiet, on_iteration

    def say(self, text: str) -> None:
        """Write one line."""
        if not self._quiet:
            _write_line(text)

    @property
    def bars(self) -> bool:
        """Whether to show progress bars: on a terminal, unless quiet."""
        with suppress(*_UNWRITABLE):
            return not self._quiet and sys.stderr.isatty()
        return False

    def phase(self, title: str, total: int, done: int = 0, *, resumable: bool = True) -> Phase:
        """Start a phase of ``total`` units, ``done`` of which are done.

        resumable: whether the run can be continued after a stop, which a long one's user is told.
        """
        return Phase(
            title,
            total,
            done,
            silent=self._quiet,
            bar=self.bars,
            resumable=resumable,
            on_iteration=self._on_iteration,
        )


def _write_line(text: str) -> None:
    _STDERR.write(f"{text}\n")
    _STDERR.flush()
