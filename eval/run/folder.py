"""A run's folder: its files, its checkpoint, and what may be resumed in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch

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
from ..results.record import Record, RunStatus, read_record
from .checks import check_same_run

# A run that is killed loses about this much work, or one iteration.
_SECONDS_BETWEEN_CHECKPOINTS = 1.0


def fresh_folder(name: str, base: Path = Path("runs")) -> Path:
    """A path under ``base`` that doesn't exist yet, named by ``name`` and the time."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = base / f"{name}-{stamp}"
    count = 2
    while path.exists():
        path, count = base / f"{name}-{stamp}-{count}", count + 1
    return path


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

    def enter(self, record: Record, *, resume: bool) -> Record | None:
        """As ``look``; also check that ``record`` is of the same run, and make the folder."""
        earlier = self.look(resume=resume)
        if earlier is not None:
            check_same_run(earlier, record, self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for half_written in self.path.rglob(".*.tmp"):
                half_written.unlink()
        except OSError as error:
            raise RequestError(f"cannot use {self.path}: {error.strerror}") from error
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
        """Append one line to progress.jsonl."""
        append_json_line(self._log, row)

    def logged(self) -> list[dict[str, Any]]:
        """The complete lines of progress.jsonl."""
        return read_json_lines(self._log)

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
            state = LoopState.from_tensors(int(info["iteration"]), tensors)
            return state, str(info["key"]), float(info["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise fault(self._state, f"is no checkpoint of this suite ({error!r})") from error

    def _cut_log(self, iteration: int) -> None:
        """Drop the lines after ``iteration``, which the resumed run writes again."""
        rows = [row for row in self.logged() if row["iteration"] <= iteration]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(self._log, text)

    # Measured victims ---------------------------------------------------------------------------

    def scores(self) -> dict[str, dict[str, float | None]]:
        """The scores of the victims that are measured already, by name."""
        found = read_json(self._scores) if self._scores.exists() else {}
        if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
            raise fault(self._scores, "holds no scores of victims")
        return found

    def keep_score(self, name: str, scores: Mapping[str, float | None]) -> None:
        """Save one victim's scores."""
        self._scores.parent.mkdir(exist_ok=True)
        write_json(self._scores, {**self.scores(), name: dict(scores)})
