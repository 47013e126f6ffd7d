"""What README and docs show: code that runs as it is, and commands that can be given."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from distillsec.cli import _Deferred, main
from distillsec.eval.config.presets import preset_names

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


# Commands ----------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?ms)^```[a-z]*\n(.*?)^```|((?:^    .*\n)+)")
COMMAND = re.compile(r"^ *(?:entrypoint: |\S*/bin/)?distillsec ((?:.*\\\n)*.*)$", re.M)
IN_LINE = re.compile(r"`distillsec ([a-z]+ [^`]+)`")
STANDS_FOR = {"BACKEND": "dm", "SWEEP.yaml": "sweeps/x.yaml", "SUITE.yaml": "sweeps/x.yaml"}


def commands() -> list[tuple[str, list[str]]]:
    """Every command of the pages, with its page, as words; placeholders are replaced."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        blocks = ["".join(filter(None, groups)) for groups in BLOCK.findall(text)]
        lines = [line for block in blocks for line in COMMAND.findall(block)]
        for line in [*lines, *IN_LINE.findall(text)]:
            for name, value in STANDS_FOR.items():
                line = line.replace(name, value)
            words = shlex.split(line.replace("\\\n", " "), comments=True)
            found.append((page.name, words))
    return found


COMMANDS = commands()
IDS = [f"{page}: {' '.join(words)}" for page, words in COMMANDS]


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 70 and len({page for page, _ in COMMANDS}) >= 11
    assert ["attack", "--preset", "digits-naive", "--out", "runs/a"] in [w for _, w in COMMANDS]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=IDS)
def test_a_command_can_be_given(page: str, words: list[str]) -> None:
    deferred = main.commands[words[0]]
    assert isinstance(deferred, _Deferred)
    context = deferred.load().make_context(words[0], words[1:])
    preset = context.params.get("preset")
    assert preset is None or preset in preset_names()
    for word in words:
        if word.startswith(("sweeps/", "benchmarks/")) and word != "sweeps/x.yaml":
            assert (ROOT / word).is_file(), f"{page}: there is no {word}"


def test_a_run_that_a_command_takes_is_made_by_another() -> None:
    made = {option(words, "--out") for _, words in COMMANDS}
    takers = {"evaluate", "defend", "shadows", "report"}
    taken = {
        word
        for _, words in COMMANDS
        if words[0] in takers or "--on" in words
        for word in [*words[1:]]
        if word.startswith("runs/")
    }
    assert taken <= made


QUICK = [
    (page, words)
    for page, words in COMMANDS
    if words[0] == "list"
    or (words[0] in ("attack", "distill") and not {"--resume", "--on"} & set(words))
]


@pytest.mark.parametrize(("page", "words"), QUICK, ids=[f"{p}: {' '.join(w)}" for p, w in QUICK])
def test_a_quick_command_runs(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists in full; of the others the configuration, which checks every key and name."""
    for example in (ROOT / "examples").glob("own_*.py"):
        (tmp_path / example.name).write_text(example.read_text("utf-8"))
    (tmp_path / "mine.py").write_text(CODE[0])
    for picture in ("logo.png", "photo.jpg"):
        Image.new("RGB", (40, 30), "orange").save(tmp_path / picture)
    monkeypatch.chdir(tmp_path)
    if words[0] != "list":
        machine = [] if "--device" in words else ["--device", "cpu"]
        words = [*words, "--print-config", *machine]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout


def test_the_estimate_of_a_sweep_runs(tmp_path: Path) -> None:
    words = [w for _, w in COMMANDS if "--dry-run" in w]
    assert words
    for each in words:
        given = [str(ROOT / word) if word.startswith("sweeps/") else word for word in each]
        done = CliRunner().invoke(main, given)
        assert done.exit_code == 0, done.stderr
        assert "cells" in done.stdout
