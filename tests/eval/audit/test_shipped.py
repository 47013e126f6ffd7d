"""The shipped calibration on sets that it has not seen: one attacked, one clean."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillsec.eval.audit.audit import audit
from distillsec.eval.config.layers import gather
from distillsec.eval.config.schema import configure
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.progress import Reporter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TARGET = 5
QUIET = Reporter(quiet=True)


@pytest.mark.parametrize("attacked", [True, False])
def test_a_digits_set_is_judged_rightly(attacked: bool, tmp_path: Path) -> None:
    options = {"attack": "naive", "target": TARGET, "control": False} if attacked else {}
    keys = gather(preset="digits-dm", options=options)
    made = configure(**keys, seed=110, victims=1, device="cpu")
    run_cell(made, tmp_path / "set", reporter=QUIET)
    config = configure(dataset="digits", device="cpu", threads=1)
    record = audit(tmp_path / "set", config, tmp_path / "audit", reporter=QUIET)
    assert record.verdict == ("backdoored" if attacked else "no evidence")
    assert record.suspect == TARGET or not attacked
    assert record.seconds < 300
