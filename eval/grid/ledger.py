"""The ledger of a plan, a line for whatever happened, and the lock that lets one driver in."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, final

from ...distill.files.safe import read_json
from ...distill.types import RequestError

Event = Literal["done", "failed", "again", "lost"]
_LOCK = ".lock"


@final
class Ledger:
    """``ledger.jsonl`` in a plan's folder; only ever appended to.

    Events of a place: ``done`` with its seconds, ``failed`` with the reason for the last time,
    ``again`` with the reason before another attempt, ``lost`` with a worker.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / "ledger.jsonl"

    def write(self, event: Event, place: str, *, seconds: float = 0.0, reason: str = "") -> None:
        """Append one line."""
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "event": event,
            "place": place,
            "seconds": round(seconds, 3),
            **({"reason": reason} if reason else {}),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All lines; one cut off by a kill is left out."""
        if not self._path.exists():
            return []
        rows = []
        for line in self._path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def seconds(self) -> dict[str, float]:
        """How long each finished place took in all, attempts that failed or were lost included."""
        spent: dict[str, float] = {}
        finished = set()
        for row in self.rows():
            spent[row["place"]] = spent.get(row["place"], 0.0) + row["seconds"]
            if row["event"] == "done":
                finished.add(row["place"])
        return {place: spent[place] for place in finished}


@contextmanager
def alone(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold ``folder``, which exists, against other processes; a killed one lets go by itself.

    patience: seconds to wait for it. Errors: ``RequestError`` where another process holds it.
    """
    until = time.monotonic() + patience
    with (folder / _LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise RequestError(f"another process is at work in {folder}") from None
                time.sleep(0.2)
        yield


@contextmanager
def entered(out: Path, file: str, what: str, *, resume: bool) -> Iterator[Any]:
    """Hold a plan's folder, fresh or with ``resume`` one that ``file`` marks as this kind's.

    Gives what the file held, ``None`` in a fresh folder. what: its kind, for people.
    Errors: ``RequestError`` for a folder that is neither, or that another process holds.
    """
    kept = out / file
    try:
        out.mkdir(parents=True, exist_ok=True)
        used = any(not entry.name.startswith(".") for entry in out.iterdir())
    except OSError as error:
        raise RequestError(f"cannot use {out}: {error.strerror}") from error
    if used and not kept.exists():
        raise RequestError(f"{out} is not empty, and holds no {what}: choose another --out")
    if used and not resume:
        raise RequestError(f"{out} holds a {what}: choose another --out, or go on with --resume")
    with alone(out):
        yield read_json(kept) if used else None
