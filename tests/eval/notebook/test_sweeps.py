"""Sweeps from Python, with classes of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distillsec
from distillsec import ext


class Dot(ext.FixedTriggerAttack):
    """A white dot."""

    name, Options = "dot", ext.PoisoningOptions

    def make_trigger(self) -> ext.Trigger:
        mask = torch.zeros(1, *self.data.image_shape[1:])
        mask[0, 0, 0] = 1
        return ext.PatchTrigger(pattern=torch.ones(self.data.image_shape), mask=mask)


BASE: dict[str, Any] = {
    "preset": "digits-naive",
    "width": 4,
    "iterations": 1,
    "inner_loop": 1,
    "ipc": 1,
}
BASE |= {"victims": 1, "victim_epochs": 1}


def test_a_sweep_with_a_class(tmp_path: Path) -> None:
    sweep = {"base": BASE, "grid": {"attack": ["naive", Dot]}}
    table = distillsec.run_ablate(sweep, seeds=2, out=tmp_path / "a", quiet=True, poison_rate=0.2)
    assert (table.status, table.failures) == ("done", [])
    assert [row.values["attack"] for row in table.rows] == ["naive", f"{__name__}:Dot"]
    assert all(row.config["poison_rate"] == 0.2 for row in table.rows)
    assert distillsec.read_sweep(tmp_path / "a") == table
    for jobs in ({"jobs": 2}, {"ray": "local"}):
        with pytest.raises(distillsec.RequestError, match="objects stay in this process"):
            distillsec.run_ablate(sweep, out=tmp_path / "b", **jobs)


def test_the_frame_of_a_sweep(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    sweep = {"base": BASE, "grid": {"trigger_size": [2, 3]}}
    table = distillsec.run_ablate(sweep, seeds=2, out=tmp_path / "a", jobs=1, quiet=True)
    frame = table.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    rates = frame[(frame.metric == "attack_success_rate") & (frame.on == "attacked set")]
    assert list(zip(rates.trigger_size, rates.seed, strict=True)) == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    expected = [v for row in table.rows for v in row.metrics["attack_success_rate"].values]
    assert list(rates.value) == expected and None not in expected


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"grid": {"attack": [3.5]}}, "attack"),
        ({"grid": {"width": [object()]}}, "width"),
        ({"base": {"attack": object}}, "expected a name or a subclass of Attack"),
        ({"girds": {}}, "sweep has no option girds"),
    ],
)
def test_a_wrong_sweep(sweep: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(distillsec.RequestError, match=message):
        distillsec.run_ablate(sweep, out=tmp_path / "a")
    with pytest.raises(distillsec.RequestError, match=r"table\.json"):
        distillsec.read_sweep(tmp_path)
