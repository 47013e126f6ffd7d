"""The files in ``sweeps/``: each is valid, and names its command."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillsec.eval.config.layers import read_yaml
from distillsec.eval.grid.suite import read_suite
from distillsec.eval.grid.sweep import read_sweep

FILES = sorted((Path(__file__).parents[3] / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_valid_and_names_its_command(file: Path) -> None:
    suite = "settings" in read_yaml(file)
    command = f"# distillsec {'benchmark' if suite else 'ablate'} sweeps/{file.name} --"
    assert any(line.startswith(command) for line in file.read_text().splitlines())
    (read_suite if suite else read_sweep)(file)
