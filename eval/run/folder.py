"""A run's folder: its files, its checkpoint, and what may be resumed in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch
from pydantic import BaseModel, ConfigDict, Field

from ...distill.core.resume import LoopState
from ...distill.files.safe import (
    append_json_line,
    fault,
    read_json,
    read_json_lines,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from ...distill.types import DistillsecError, RequestError
from ..results.metrics import Scores, is_scores
from ..results.record import Record, RunStatus, read_record
from .checks import check_same_run
from .lock import locked

# A run that is killed loses about this much work, or one iteration.
_SECONDS_BETWEEN_CHECKPOINTS = 1.0

# What is written while work goes on, and where the runs of seeds, sweeps and suites are.
_WRITTEN = ("*.json*", "checkpoint/*.*")
_RUNS_BELOW = ("", "control/", "seed-*/", "seed-*/control/", "cells/*/", "*/seed-*/*/")


def fresh_folder(name: str, base: Path = Path("runs")) -> Path:
    """A path under ``base`` that doesn't exist yet, named by ``name`` and the time."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = base / f"{name}-{stamp}"
    count = 2
    while path.exists():
        path, count = base / f"{name}-{stamp}-{count}", count + 1
    return path


def last_active(path: Path) -> str:
    """When a run, sweep or suite in ``path`` last wrote one of its files; empty where none is
    there. A process that was killed leaves the status ``running``."""
    times = [
        file.stat().st_mtime
        for below in _RUNS_BELOW
        for name in _WRITTEN
        for file in path.glob(f"{below}{name}")
    ]
    if not times:
        return ""
    return f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC"


def path_inside(root: Path, place: Path) -> Path | None:
    """``place``; ``None`` where it leads out of ``root``, through a link too.

    For places that a record names, which may be another person's.
    """
    try:
        return place if place.resolve().is_relative_to(root.resolve()) else None
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte in a name
        return None


@final
class _StateInfo(BaseModel):
    """The metadata of a checkpoint. seconds: of work on the run so far, less than 30 years."""

    model_config = ConfigDict(strict=True)

    iteration: int = Field(ge=0)
    key: str
    seconds: float = Field(ge=0, le=1e9)


@final
class RunFolder:
    """The files of one run.

    A run begins in a fresh or empty folder or, with ``resume``, in one that holds a run with the
    same configuration. Errors: ``RequestError`` for any other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "record.json"
        self.distilled = path / "distilled.safetensors"
        self.trigger = path / "trigger.safetensors"
        self.control = path / "control"
        self.experts = path / "experts"
        self._log = path / "progress.jsonl"
        self._state = path / "checkpoint" / "state.safetensors"
        self._scores = path / "checkpoint" / "victims.json"
        self._saved_at = 0.0

    def look(self, *, resume: bool) -> Record | None:
        """The record of the run to be resumed; ``None`` where the folder is free. Writes nothing.

        Half-written files, left by a kill before the first record, do not count.
        """
        try:
            used = self.path.exists() and any(
                not entry.name.startswith(".") for entry in self.path.iterdir()
            )
        except OSError as error:
            raise RequestError(f"cannot use {self.path}: {error.strerror}") from error
        if used and not resume:
            raise RequestError(
                f"{self.path} is not empty: choose another --out, or resume the run with --resume"
            )
        if not used:
            return None
        earlier = read_record(self.record)
        self._check()
        return earlier

    @contextmanager
    def entered(self, record: Record, *, resume: bool) -> Iterator[Record | None]:
        """Make the folder and lock it against other processes; yields what ``look`` returns.

        Errors: also ``RequestError`` where the folder holds another run than that of ``record``, or
        where another process holds the lock.
        """
        self._look_for(record, resume=resume)  # a folder that is refused gets no lock
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot use {self.path}: {error.strerror}") from error
        with locked(self.path):
            earlier = self._look_for(record, resume=resume)
            for half_written in self.path.rglob(".*.tmp"):
                half_written.unlink()
            yield earlier

    def _look_for(self, record: Record, *, resume: bool) -> Record | None:
        earlier = self.look(resume=resume)
        if earlier is not None:
            check_same_run(earlier, record, self.path)
        return earlier

    @contextmanager
    def keeping(self, record: Record) -> Iterator[None]:
        """Keep ``record`` here during the work, and then how the work ended."""
        record.write(self.record)
        try:
            yield
        except KeyboardInterrupt:
            self.close(record, "interrupted", "stopped by the user")
            raise
        except Exception as error:
            text = str(error) if isinstance(error, DistillsecError) else repr(error)
            self.close(record, "error", text)
            raise
        self.close(record, "done")

    def close(self, record: Record, status: RunStatus, error: str | None = None) -> None:
        """Write ``record`` with how the work ended."""
        record.status, record.error = status, error
        record.write(self.record)

    # The log -----------------------------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to progress.jsonl, if it can be written: no result depends on it."""
        with suppress(OSError):
            append_json_line(self._log, row)

    def logged(self) -> list[dict[str, Any]]:
        """The lines of progress.jsonl that are complete: an iteration, and other numbers."""
        return [row for row in read_json_lines(self._log) if _is_logged(row)]

    # The checkpoint ----------------------------------------------------------------------------

    def save(
        self, make: Callable[[], LoopState], key: str, seconds: float, *, force: bool = False
    ) -> None:
        """Save the state, unless one was just saved. ``seconds``: of work on this run so far."""
        now = time.monotonic()
        if not force and now - self._saved_at < _SECONDS_BETWEEN_CHECKPOINTS:
            return
        state = make()
        info = {"iteration": state.iteration, "key": key, "seconds": seconds}
        self._state.parent.mkdir(exist_ok=True)
        write_tensors(self._state, state.tensors(), info)
        self._saved_at = now

    def load(self, key: str, device: torch.device) -> tuple[LoopState, float] | None:
        """The saved state and its seconds of work; the log is cut back to the same iteration."""
        if not self._state.exists():
            self._cut_log(0)
            return None
        state, saved_key, seconds = self._read_state(str(device))
        if saved_key != key:
            raise RequestError(f"{self._state} belongs to another configuration")
        self._cut_log(state.iteration)
        return state, seconds

    def _check(self) -> None:
        """Refuse damaged checkpoints, the clean twin's too, before anything is written."""
        for folder in (self, RunFolder(self.control)):
            if folder._state.exists():
                folder._read_state("cpu")
            folder.scores()

    def _read_state(self, device: str) -> tuple[LoopState, str, float]:
        """The saved state, the key of its configuration, its seconds of work."""
        tensors, info = read_tensors(self._state, device=device)
        try:
            known = _StateInfo.model_validate(info)
            return LoopState.from_tensors(known.iteration, tensors), known.key, known.seconds
        except (KeyError, ValueError) as error:
            raise fault(self._state, "is no checkpoint of this suite") from error

    def _cut_log(self, iteration: int) -> None:
        """Drop the lines after ``iteration``, which the resumed run writes again."""
        rows = [row for row in self.logged() if row["iteration"] <= iteration]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(self._log, text)

    # Measured victims ---------------------------------------------------------------------------

    def scores(self) -> dict[str, Scores]:
        """The scores of the victims that are measured already, by name."""
        found = read_json(self._scores) if self._scores.exists() else {}
        if not isinstance(found, dict) or not all(map(is_scores, found.values())):
            raise fault(self._scores, "holds no scores of victims")
        return found

    def keep_score(self, name: str, scores: Scores) -> None:
        """Save one victim's scores."""
        self._scores.parent.mkdir(exist_ok=True)
        write_json(self._scores, {**self.scores(), name: dict(scores)})


def _is_logged(row: Mapping[str, Any]) -> bool:
    numbers = all(value is None or isinstance(value, int | float) for value in row.values())
    return numbers and isinstance(row.get("iteration"), int)
