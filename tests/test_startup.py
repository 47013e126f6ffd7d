"""Start-up: which libraries the command line and ``import distillsec`` load."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys

import click
import pytest

import distillsec
from distillsec.cli import main

SLOW = {"torchvision", "kornia", "sklearn", "scipy", "matplotlib"}
COMMAND = "import sys; sys.argv = {}; from distillsec.cli import main; main(standalone_mode=False)"


def loaded(code: str) -> set[str]:
    """The top-level modules in a fresh process after ``code``."""
    code += (
        "\nimport json, sys; print(json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_neither_torch_nor_its_users(option: str) -> None:
    assert not loaded(COMMAND.format(["distillsec", option])) & {"torch", "pydantic", *SLOW}


def test_importing_the_package_loads_neither_torch_nor_its_users() -> None:
    assert not loaded("import distillsec; dir(distillsec)") & {"torch", "pydantic", *SLOW}


def test_listing_loads_neither_torch_nor_its_users() -> None:
    found = loaded(COMMAND.format(["distillsec", "list"]))
    assert not found & {"torch", "pydantic", *SLOW}


def test_the_details_of_an_entry_load_torch_but_not_its_users() -> None:
    found = loaded(COMMAND.format(["distillsec", "list", "attacks", "naive"]))
    assert "torch" in found and not found & SLOW


@pytest.mark.parametrize("name", main.commands)
def test_a_deferred_command_has_the_help_of_its_docstring(name: str) -> None:
    deferred = main.commands[name]
    with deferred.make_context(name, ["--help"], resilient_parsing=True) as context:
        command = context.command
    assert type(command) is click.Command and command.name == name
    assert deferred.short_help == (command.help or "").splitlines()[0]


def test_a_public_name_is_imported_when_it_is_used() -> None:
    assert set(distillsec.__all__) <= set(dir(distillsec))
    assert set(distillsec.__all__) == set(distillsec._MODULE_OF)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        distillsec.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported() -> None:
    tree = ast.parse(inspect.getsource(distillsec))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distillsec.")
        for alias in node.names
    }
    homes = {name: f"distillsec.{module}" for name, module in distillsec._MODULE_OF.items()}
    assert seen == homes
