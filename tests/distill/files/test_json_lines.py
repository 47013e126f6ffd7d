"""JSON Lines: what is appended is read; damaged lines are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillsec.distill.files.safe import append_json_line, read_json_lines


def test_appended_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"a": 1})
    append_json_line(path, {"b": [None, "ü"]})
    assert read_json_lines(path) == [{"a": 1}, {"b": [None, "ü"]}]
    with pytest.raises(ValueError, match="JSON"):
        append_json_line(path, {"a": float("nan")})


@pytest.mark.parametrize("damage", [b'{"a": ', b"\xff\xfe", b"3", b"\x00\x00"])
def test_damaged_lines_are_skipped(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"a": 2}\n' + damage)
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
