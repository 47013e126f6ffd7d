"""Completion in a shell: what it offers, that it is fast to make, and that its table is fresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from click.shell_completion import ShellComplete

from distillsec.attacks import ATTACKS
from distillsec.cli import loaded_commands, main
from distillsec.commands.completion import VARIABLE
from distillsec.commands.table import KINDS, TABLE, entries
from distillsec.commands.table_maker import make_table
from distillsec.defenses import DEFENSES, GROUPS
from distillsec.eval.config.catalogue import CATALOGUES
from distillsec.eval.config.presets import preset_names


def offered(*words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TAB offers after the last of ``words``, which is incomplete."""
    monkeypatch.setenv(VARIABLE, "bash_complete")
    shell = ShellComplete(main, {}, "distillsec", VARIABLE)
    return [item.value for item in shell.get_completions([*words[:-1]], words[-1])]


def test_the_table_is_that_of_the_commands() -> None:
    """Otherwise: make table."""
    assert json.loads(TABLE.read_text("utf-8")) == make_table(loaded_commands())


def test_the_table_has_the_catalogues() -> None:
    assert list(KINDS) == list(CATALOGUES)
    for kind, rows in CATALOGUES.items():
        found = {name: entry["description"] for name, entry in entries(kind).items()}
        assert found == {name: row["description"] for name, row in rows().items()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("attack", "--preset", ""), list(preset_names())),
        (("attack", "--preset", "digits-d"), [n for n in preset_names() if "digits-d" in n]),
        (("attack", "--attack", ""), list(ATTACKS)),
        (("defend", "runs/a", "--defense", ""), [*GROUPS, *DEFENSES]),
        (("defend", "runs/a", "--budget", ""), ["quick", "paper", "tuned"]),
        (("distill", "--dataset", "f"), ["fashion-mnist", "folder:"]),
        (("distill", "--norm", "i"), ["instance"]),
        (("attack", "--attack", "doorping", "--objective", "target"), ["target-logit"]),
        (("evaluate", "runs/a", "--victim-network", "conv"), ["convnet", "convnet-baadd"]),
        (("list", "atta"), ["attacks"]),
        (("list", "defenses", "neural"), ["neural-cleanse"]),
        (("attack", "--no-con"), ["--no-control"]),
        (("report", "--format", "par"), ["parquet"]),
        (("abl",), ["ablate"]),
    ],
)
def test_what_is_offered(
    words: tuple[str, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered(*words, monkeypatch=monkeypatch) == expected


def test_every_option_of_every_command_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in loaded_commands().items():
        flags = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
        long = {flag for flag in flags if flag.startswith("--")}
        assert long <= set(offered(name, "--", monkeypatch=monkeypatch)), name


def test_installed_packages_are_offered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"distillsec.attacks": [SimpleNamespace(name="mine", value="a:B")]}
    monkeypatch.setattr(metadata, "entry_points", lambda group: points.get(group, []))
    assert offered("attack", "--attack", "m", monkeypatch=monkeypatch) == ["mine"]
    assert offered("list", "attacks", "m", monkeypatch=monkeypatch) == ["mine"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_values_without_torch(shell: str) -> None:
    code = (
        "import sys; from distillsec.cli import main\n"
        "try: main(prog_name='distillsec')\n"
        "except SystemExit: print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    words = "distillsec attack --attack door"
    variables = {VARIABLE: f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": "3"}
    if shell == "fish":
        variables = {**variables, "COMP_CWORD": "door"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert "doorping" in done.stdout and done.stdout.endswith("False False\n"), done.stderr
