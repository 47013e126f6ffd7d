"""Every file in examples/ runs by the commands in its head, with fewer steps."""

from __future__ import annotations

import ast
import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from distillsec.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
LESS = ["--iterations", "2", "--ipc", "1", "--victims", "1", "--victim-epochs", "1"]
LESS += ["--threads", "1", "--quiet"]


def commands(path: Path) -> list[list[str]]:
    """The commands in the head of an example, after ``cd examples``."""
    head = ast.get_docstring(ast.parse(path.read_text("utf-8")), clean=False) or ""
    lines = [line.strip() for line in head.splitlines() if line.startswith("    ")]
    assert lines[0] == "cd examples"
    return [shlex.split(line) for line in lines[1:]]


def run(words: list[str]) -> None:
    """One command, in the current folder."""
    program, *arguments = words
    if program == "python":
        script, *rest = arguments
        sys.argv = [script, *rest]
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return
    assert program == "distillsec"
    less = LESS if arguments[0] == "attack" else ["--quiet", "--victims", "1"]
    out = [] if "--out" in arguments else ["--out", "runs/last"]
    done = CliRunner().invoke(main, [*arguments, *less, *out])
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = commands(path)
    for each in words:
        run(each)
    record = json.loads(Path("runs/last/record.json").read_text())
    assert record["status"] == "done"
    own = [word for word in words[-1] if path.stem in word or word.startswith("npz:")]
    assert len(own) == 1
    used = [record["config"][key] for key in ("attack", "backend", "dataset")]
    assert own[0] in (*used, *record["defenses"])
    assert all(outcome["status"] == "done" for outcome in record["defenses"].values())


def test_there_is_an_example_of_everything_that_can_be_added() -> None:
    found = [path.stem for path in FILES]
    assert found == ["own_attack", "own_backend", "own_data", "own_defense"]
