"""Plans carried out: order, retries, losses, failures and what they take along, resume, locks."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distillsec.distill.types import RequestError, RunError
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.grid.executors import Executor, Here, Lost, Work
from distillsec.eval.grid.jobs import Piece
from distillsec.eval.grid.ledger import Ledger, alone, entered
from distillsec.eval.grid.scheduler import carry_out, conduct
from distillsec.eval.results.record import Failure
from distillsec.eval.run.progress import Reporter

CONFIG: Config = configure(threads=1, device="cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class Note(Piece):
    """Writes its place down; raises what it is told to for its first attempts."""

    need: str | None = None
    errors: tuple[Exception, ...] = ()

    @property
    def needs(self) -> str | None:
        return self.need

    def run(self, out: Path, data_dir: Path | None) -> None:
        with (out / "order").open("a") as file:
            file.write(f"{self.place}\n")
        attempts = (out / "order").read_text().split().count(self.place)
        if attempts <= len(self.errors):
            raise self.errors[attempts - 1]

    def done(self, out: Path) -> bool:
        order = out / "order"
        return order.exists() and self.place in order.read_text().split()


def note(place: str, *after: str, need: str | None = None, errors: Any = ()) -> Note:
    return Note(place=place, config=CONFIG, after=after, need=need, errors=tuple(errors))


def run(pieces: list[Note], out: Path, **how: Any) -> dict[str, str | None]:
    return {e.piece.place: e.reason for e in conduct(pieces, out, Here(), **how)}


def order(out: Path) -> list[str]:
    return (out / "order").read_text().split()


def test_pieces_come_after_what_they_name_and_else_in_their_order(tmp_path: Path) -> None:
    pieces = [note("d", "c", "b"), note("a"), note("c", "a"), note("b"), note("e", "elsewhere")]
    assert run(pieces, tmp_path) == dict.fromkeys("abcde")
    assert order(tmp_path) == ["a", "c", "b", "d", "e"]


def test_a_failure_is_tried_again_and_then_told(tmp_path: Path) -> None:
    errors = [RunError("first"), ValueError("second\nline")]
    found = run([note("a", errors=errors), note("b", errors=errors[:1])], tmp_path, retries=1)
    assert found == {"a": "ValueError('second\\nline')", "b": None}
    assert order(tmp_path) == ["a", "a", "b", "b"]
    told = [(row["event"], row["place"], row.get("reason")) for row in Ledger(tmp_path).rows()]
    assert told == [
        ("again", "a", "first"),
        ("failed", "a", "ValueError('second\\nline')"),
        ("again", "b", "first"),
        ("done", "b", None),
    ]


def test_a_wrong_request_is_not_tried_again(tmp_path: Path) -> None:
    found = run([note("a", errors=[RequestError("no such thing")])], tmp_path, retries=5)
    assert found == {"a": "no such thing"} and order(tmp_path) == ["a"]


def test_what_needs_a_failed_piece_fails_with_it_and_the_others_go_on(tmp_path: Path) -> None:
    pieces = [
        note("a", errors=[RequestError("broken")]),
        note("b", "a", need="a"),
        note("c", "b", "a", need="b"),
        note("d", "a"),
    ]
    assert run(pieces, tmp_path) == {
        "a": "broken",
        "b": "a, which it needs, failed",
        "c": "b, which it needs, failed",
        "d": None,
    }
    assert order(tmp_path) == ["a", "d"]


def test_one_that_is_stranded_is_not_run_when_others_let_it_go(tmp_path: Path) -> None:
    pieces = [
        note("a", errors=[RequestError("broken")]),
        note("slow"),
        note("b", "a", "slow", need="a"),
    ]
    assert run(pieces, tmp_path)["b"] == "a, which it needs, failed"
    assert order(tmp_path) == ["a", "slow"]


class Careless(Executor):
    """Loses every piece as often as it is told to, before it runs it."""

    room = 2

    def __init__(self, losses: int) -> None:
        self._losses, self._taken = losses, deque[tuple[int, Work]]()
        self._seen: dict[int, int] = {}

    def submit(self, ticket: int, work: Work) -> None:
        self._taken.append((ticket, work))

    def ended(self) -> tuple[int, Any]:
        ticket, work = self._taken.popleft()
        self._seen[ticket] = self._seen.get(ticket, 0) + 1
        return ticket, Lost() if self._seen[ticket] <= self._losses else work()


def test_what_is_lost_is_done_again_and_given_up_after_three_times(tmp_path: Path) -> None:
    pieces = [note("a"), note("b", "a", need="a")]
    for losses, reason in ((2, None), (3, "its worker died 3 times")):
        out = tmp_path / str(losses)
        out.mkdir()
        found = {e.piece.place: e.reason for e in conduct(pieces, out, Careless(losses))}
        assert found["a"] == reason
        assert (found["b"] is None) == (reason is None)
        events = [row["event"] for row in Ledger(out).rows() if row["place"] == "a"]
        assert events == ["lost"] * losses + (["done"] if reason is None else ["failed"])


def test_what_is_done_is_left_alone_and_failures_are_handed_to_the_tables(tmp_path: Path) -> None:
    first, second = note("a"), note("b", "a", errors=[RequestError("broken")])
    told: list[list[Failure]] = []
    (tmp_path / "order").write_text("a\n")
    carry_out(
        [first, second],
        tmp_path,
        Here(),
        title="test",
        refresh=lambda failures: told.append(list(failures)),
        reporter=Reporter(quiet=True),
    )
    assert order(tmp_path) == ["a", "b"]
    assert told == [[Failure(place="b", reason="broken")]]


def test_the_ledger_adds_up_attempts_and_survives_a_kill(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("again", "a", seconds=1.5, reason="x")
    ledger.write("done", "a", seconds=2.0)
    ledger.write("lost", "b")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "do')
    assert ledger.seconds() == {"a": 3.5}
    assert [row["event"] for row in ledger.rows()] == ["again", "done", "lost"]


def test_a_folder_has_one_driver(tmp_path: Path) -> None:
    with alone(tmp_path):
        began = time.monotonic()
        for patience in (0.0, 0.3):
            with pytest.raises(RequestError, match="another process is at work"):
                alone(tmp_path, patience=patience).__enter__()
        assert time.monotonic() - began >= 0.3
    with alone(tmp_path):
        pass


def test_a_folder_is_entered_fresh_or_where_it_is_of_the_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with entered(out, "sweep.json", "sweep", resume=False) as earlier:
        assert earlier is None
        (out / "sweep.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(RequestError, match=r"holds a sweep: .* go on with --resume"):
        entered(out, "sweep.json", "sweep", resume=False).__enter__()
    with entered(out, "sweep.json", "sweep", resume=True) as earlier:
        assert earlier == {"a": 1}
    with pytest.raises(RequestError, match="not empty, and holds no suite"):
        entered(out, "suite.json", "suite", resume=True).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot use"):
        entered(tmp_path / "file", "sweep.json", "sweep", resume=False).__enter__()
