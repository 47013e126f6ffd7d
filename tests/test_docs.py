"""What docs/own.md shows runs as it is: a user's own network, and the code of the examples."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from distillsec.cli import main

ROOT = Path(__file__).resolve().parents[1]
OWN = (ROOT / "docs" / "own.md").read_text("utf-8")
CODE = re.findall(r"(?ms)^```python\n(.*?)^```", OWN)


def test_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(CODE[0])
    monkeypatch.chdir(tmp_path)
    words = ["attack", "--preset", "digits-naive", "--ipc", "1", "--iterations", "1"]
    words += ["--network", "own_network:Tiny", "--set", "width=null", "--set", "depth=null"]
    words += ["--victims", "1", "--victim-epochs", "1", "--threads", "1", "--quiet", "--out", "run"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    record = json.loads(Path("run/record.json").read_text())
    assert (record["status"], record["config"]["network"]) == ("done", "own_network:Tiny")


@pytest.mark.parametrize(("number", "name"), [(1, "own_attack"), (2, "own_defense")])
def test_the_code_of_an_example_is_the_files(number: int, name: str) -> None:
    """The examples themselves are run by test_examples."""
    text = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    head = ast.parse(text).body[0]
    after = text.splitlines(keepends=True)[head.end_lineno or 0 :]
    assert CODE[number].strip() == "".join(after).strip()
    assert len(CODE) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_named_with_its_commands(path: Path) -> None:
    assert f"[examples/{path.name}](../examples/{path.name})" in OWN
    head = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    commands = [line for line in head.splitlines() if line.startswith("    distillsec ")]
    assert commands
    if "npz:" not in commands[-1]:
        assert all(command in OWN for command in commands)
