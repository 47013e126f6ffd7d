"""A run's folder: its files, its checkpoint, and what may be resumed in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ..distill.files import read_json, read_tensors, write_atomically, write_json, write_tensors
from ..distill.loop import LoopState
from ..distill.types import RequestError
from .record import Record, read_record

# A small run loses at most this much work when it is killed.
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

    A folder is entered once: fresh and empty, or with ``resume`` where an earlier session with the
    same configuration left off. Errors: ``RequestError`` for a folder that is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "record.json"
        self.distilled = path / "distilled.safetensors"
        self.trigger = path / "trigger.safetensors"
        self.control = path / "control"
        self._log = path / "progress.jsonl"
        self._state = path / "checkpoint" / "state.safetensors"
        self._scores = path / "checkpoint" / "victims.json"
        self._saved_at = 0.0

    def enter(self, *, resume: bool) -> Record | None:
        """Make the folder, or return the record of the run that is to be resumed."""
        try:
            used = self.path.exists() and any(self.path.iterdir())
            if used and not resume:
                raise RequestError(
                    f"{self.path} is not empty: choose another --out, or take the run up "
                    "with --resume"
                )
            if resume and used:
                return read_record(self.record)
            (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot use {self.path}: {error.strerror}") from error
        return None

    # The log -----------------------------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to progress.jsonl."""
        with self._log.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def logged(self) -> list[dict[str, Any]]:
        """The lines of progress.jsonl; a line cut off by a kill is left out."""
        if not self._log.exists():
            return []
        rows = []
        for line in self._log.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    # The checkpoint ----------------------------------------------------------------------------

    def save(
        self, make: Callable[[], LoopState], key: str, seconds: float, *, force: bool = False
    ) -> None:
        """Keep the state, unless the last one is young. ``seconds``: the work behind it."""
        now = time.monotonic()
        if not force and now - self._saved_at < _SECONDS_BETWEEN_CHECKPOINTS:
            return
        state = make()
        tensors: dict[str, Tensor] = {"leaf": state.leaf}
        tensors.update({f"optimiser.{name}": value for name, value in state.optimiser.items()})
        for number, hook in enumerate(state.hooks):
            tensors.update({f"hook.{number}.{name}": value for name, value in hook.items()})
        info = {
            "iteration": state.iteration,
            "key": key,
            "hooks": len(state.hooks),
            "seconds": seconds,
        }
        write_tensors(self._state, tensors, info)
        self._saved_at = now

    def load(self, key: str, device: torch.device) -> tuple[LoopState, float] | None:
        """The kept state and the seconds behind it; the log is cut back to the same place."""
        if not self._state.exists():
            self._cut_log(0)
            return None
        tensors, info = read_tensors(self._state, device=str(device))
        if info.get("key") != key:
            raise RequestError(f"{self._state} belongs to another configuration")
        self._cut_log(int(info["iteration"]))
        state = LoopState(
            iteration=int(info["iteration"]),
            leaf=tensors["leaf"],
            optimiser=_under("optimiser.", tensors),
            hooks=[_under(f"hook.{number}.", tensors) for number in range(int(info["hooks"]))],
        )
        return state, float(info["seconds"])

    def _cut_log(self, iteration: int) -> None:
        """Drop the lines of work that the checkpoint doesn't hold: it will be done again."""
        rows = [row for row in self.logged() if row["iteration"] <= iteration]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self._log, lambda path: _write(path, text))

    # Victims already measured -------------------------------------------------------------------

    def scores(self) -> dict[str, dict[str, float | None]]:
        """What victims measured before a kill scored, by their name."""
        found: dict[str, dict[str, float | None]] = (
            read_json(self._scores) if self._scores.exists() else {}
        )
        return found

    def keep_score(self, name: str, scores: Mapping[str, float | None]) -> None:
        """Remember one victim's scores."""
        write_json(self._scores, {**self.scores(), name: dict(scores)})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text)
