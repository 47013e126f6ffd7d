"""The ledger: what is written is read, and damaged lines do not block it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distillsec.eval.grid.ledger import Ledger


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.rows() == [] and ledger.seconds() == {}
    ledger.write("again", "a", seconds=2, reason="why")
    ledger.write("done", "a", seconds=3)
    ledger.write("failed", "b", seconds=4, reason="why")
    assert [row["event"] for row in ledger.rows()] == ["again", "done", "failed"]
    assert ledger.seconds() == {"a": 5.0}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"event": "done"},
        {"event": "done", "place": "b"},
        {"event": "done", "place": ["b"], "seconds": 1},
        {"event": "done", "place": "b", "seconds": "1"},
        {"event": "done", "place": "b", "seconds": -1},
        {"event": "done", "place": "b", "seconds": 1e300},
        {"event": ["done"], "place": "b", "seconds": 1},
        {"event": "won", "place": "b", "seconds": 1},
        {"event": "failed", "place": "b", "seconds": 1, "reason": {}},
    ],
)
def test_a_row_of_another_form_is_skipped(tmp_path: Path, row: dict[str, Any]) -> None:
    ledger = Ledger(tmp_path)
    (tmp_path / "ledger.jsonl").write_text(json.dumps(row) + "\n" + "[" * 5000 + "\n")
    ledger.write("done", "a", seconds=3)
    assert [each["place"] for each in ledger.rows()] == ["a"]
    assert ledger.seconds() == {"a": 3.0}
