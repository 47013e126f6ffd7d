"""What docs/own.md shows runs as it stands: a user's own network, attack and defense."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from distillsec.cli import main

OWN = Path(__file__).resolve().parents[1] / "docs" / "own.md"
SMALL = ["--preset", "digits-naive", "--ipc", "1", "--iterations", "1", "--set", "outer_loop=1"]
SMALL += ["--victims", "1", "--victim-epochs", "1", "--threads", "1", "--quiet"]


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (0, ["--network", "own_network:Tiny", "--set", "width=null", "--set", "depth=null"]),
        (1, ["--attack", "own_attack:Grey", "--set", "shade=0.8"]),
    ],
    ids=["network", "attack"],
)
def test_the_users_own(
    number: int, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"(?ms)^```python\n(.*?)^```", OWN.read_text("utf-8"))[number]
    module = options[1].partition(":")[0]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["attack", *SMALL, *options, "--out", "run"])
    assert done.exit_code == 0, done.stderr
    record = json.loads(Path("run/record.json").read_text())
    assert record["status"] == "done"
    assert options[1] in (record["config"]["network"], record["config"]["attack"])
    if number == 1:
        assert record["config"]["shade"] == 0.8
        assert record["trigger"]["max"] == pytest.approx(0.8)


def test_the_users_own_defense(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"(?ms)^```python\n(.*?)^```", OWN.read_text("utf-8"))[2]
    (tmp_path / "own_defense.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    options = ["--defense", "own_defense:Sure", "--option", "own_defense:Sure.limit=0.99"]
    done = CliRunner().invoke(main, ["defend", str(finished), *options, "--quiet", "--out", "run"])
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(Path("run/record.json").read_text())["defenses"]["own_defense:Sure"]
    assert outcome["status"] == "done" and outcome["options"] == {"limit": 0.99}
    assert 0 <= outcome["metrics"]["auroc"]["mean"] <= 1
