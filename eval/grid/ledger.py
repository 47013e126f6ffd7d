"""The ledger of a sweep or a suite: a log of every attempt at a job."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, final, get_args

from ...distill.files.safe import append_json_line, read_json_lines

Event = Literal["done", "failed", "again", "lost"]

_LONGEST = 1e9  # seconds: 30 years


@final
class Ledger:
    """``ledger.jsonl`` in the folder of a sweep or a suite; lines are only appended.

    Events of a place: ``done`` with the seconds; ``again`` with the reason of a failure that is
    retried; ``failed`` with the reason of the last failure; ``lost`` where the worker died.
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
        append_json_line(self._path, row)

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines; one without an event, a place and the seconds is skipped."""
        return [row for row in read_json_lines(self._path) if _is_row(row)]

    def seconds(self) -> dict[str, float]:
        """The total time of each finished place, with that of failed attempts."""
        spent: dict[str, float] = {}
        finished = set()
        for row in self.rows():
            spent[row["place"]] = spent.get(row["place"], 0.0) + row["seconds"]
            if row["event"] == "done":
                finished.add(row["place"])
        return {place: spent[place] for place in finished}


def _is_row(row: Mapping[str, Any]) -> bool:
    place, seconds = row.get("place"), row.get("seconds")
    return (
        row.get("event") in get_args(Event)
        and isinstance(place, str)
        and isinstance(seconds, (int, float))
        and 0 <= seconds < _LONGEST
        and isinstance(row.get("reason", ""), str)
    )
