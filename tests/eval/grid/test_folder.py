"""The folder of a sweep or a suite: its ledger, its lock, and what may be opened."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from distillsec.distill.types import RequestError
from distillsec.eval.grid.folder import opened
from distillsec.eval.grid.ledger import Ledger
from distillsec.eval.run.lock import locked


def test_the_ledger_sums_attempts_and_skips_a_line_cut_off_by_a_kill(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.rows() == []
    ledger.write("again", "a", seconds=1.5, reason="x")
    ledger.write("done", "a", seconds=2.0)
    ledger.write("lost", "b")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "do\n')
    ledger.write("done", "b", seconds=1.0)
    assert ledger.seconds() == {"a": 3.5, "b": 1.0}
    assert [row["event"] for row in ledger.rows()] == ["again", "done", "lost", "done"]


def test_a_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    with locked(tmp_path):
        began = time.monotonic()
        for timeout in (0.0, 0.3):
            with pytest.raises(RequestError, match="another process is using"):
                locked(tmp_path, timeout=timeout).__enter__()
        assert time.monotonic() - began >= 0.3
    with locked(tmp_path):
        pass


def test_a_folder_is_new_or_of_the_same_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out, "sweep.json", "sweep", resume=False) as earlier:
        assert earlier is None
        (out / "sweep.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(RequestError, match=r"holds a sweep: .* continue with --resume"):
        opened(out, "sweep.json", "sweep", resume=False).__enter__()
    with opened(out, "sweep.json", "sweep", resume=True) as earlier:
        assert earlier == {"a": 1}
    with pytest.raises(RequestError, match="not empty, and holds no suite"):
        opened(out, "suite.json", "suite", resume=True).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot use"):
        opened(tmp_path / "file", "sweep.json", "sweep", resume=False).__enter__()
