"""The package as a library: the code in its documentation runs unchanged."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import distillsec
from distillsec.eval.config import layers as request
from distillsec.eval.config.presets import load_preset

README = Path(__file__).resolve().parents[1] / "README.md"


def snippets() -> dict[str, str]:
    """Python code in the README and in the package's docstring."""
    text = README.read_text("utf-8")
    found = {
        f"README {number}": code
        for number, code in enumerate(re.findall(r"(?ms)^```python\n(.*?)^```", text))
    }
    shown = (inspect.getdoc(distillsec) or "").split("::\n", 1)[1]
    return {**found, "docstring": textwrap.dedent(shown).strip()}


@pytest.mark.parametrize("code", snippets().values(), ids=snippets())
def test_the_lines_shown_to_users_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_preset
    small = {"iterations": 1, "victims": 1, "victim_epochs": 1, "ipc": 1, "width": 4}

    def smaller(name: str) -> dict[str, Any]:
        preset = load(name)
        return {**preset, "config": {**preset["config"], **small}}

    monkeypatch.setattr(request, "load_preset", smaller)
    monkeypatch.chdir(tmp_path)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    (run,) = (tmp_path / "runs").iterdir()
    record = distillsec.read_record(run / "record.json")
    assert record.status == "done"
    rates = [record.mean(f"{part}attack_success_rate") for part in ("", "control_")]
    assert said.getvalue() == " ".join(str(rate) for rate in rates) + "\n"
    assert len(distillsec.load_set(run / "distilled.safetensors").batch) == 10


def test_every_public_name_can_be_imported() -> None:
    assert sorted(distillsec.__all__, key=str.lower) == sorted(
        set(distillsec.__all__), key=str.lower
    )
    for name in distillsec.__all__:
        assert inspect.getdoc(getattr(distillsec, name)), name


@pytest.mark.parametrize("name", ["run_cell", "run_seeds", "evaluate"])
def test_folders_may_be_given_as_text(name: str, tmp_path: Path) -> None:
    run = getattr(importlib.import_module("distillsec"), name)
    config = distillsec.configure(ipc=1, poison_rate=0.95, attack="naive")
    before = [config, 1] if name == "run_seeds" else [config]
    words = [str(tmp_path / "absent"), config] if name == "evaluate" else before
    with pytest.raises(distillsec.RequestError):
        run(*words, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
