"""What a record says of how visible an attack is: distances of the sets, and false triggers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from distillsec.distill.files.artifact import load_set
from distillsec.distill.files.safe import read_json
from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import read_record
from distillsec.eval.results.run_table import run_table
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.seeds import run_seeds

Tiny = Callable[..., Config]
QUIET = Reporter(quiet=True)
CLEAN: dict[str, Any] = {"attack": None, "poison_rate": None}


@pytest.fixture(scope="module")
def several(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds with their clean twins; read-only."""
    out = tmp_path_factory.mktemp("several") / "runs"
    run_seeds(tiny(victims=1), 3, out, reporter=QUIET)
    return out


@pytest.fixture(scope="module")
def reference(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean run of another seed; read-only."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run_cell(tiny(**CLEAN, seed=7, victims=1), out, reporter=QUIET)
    return out


def images(path: Path) -> torch.Tensor:
    return load_set(path / "distilled.safetensors").batch.images.double()


def figures(one: Path, other: Path) -> dict[str, float]:
    """The distances of two sets, by numpy."""
    apart = (images(one) - images(other)).numpy().reshape(10, -1)
    l2 = np.linalg.norm(apart, axis=1).mean()
    return {"linf": np.abs(apart).max(), "l2": l2, "rms": np.sqrt((apart**2).mean())}


def test_the_distance_from_the_twin_is_recorded_and_shown(finished: Path) -> None:
    record = read_record(finished / "record.json")
    expected = figures(finished, finished / "control")
    for norm, value in expected.items():
        assert record.distilled[f"{norm}_from_twin"] == pytest.approx(value, rel=1e-5)
    assert record.distilled["reference_distance"] is None
    text = run_table(record, finished)
    line = f"L∞ {expected['linf']:.3f}, L2 {expected['l2']:.3f} an image, RMS {expected['rms']:.3f}"
    assert f"set from its clean twin: {line}" in text
    assert "two clean sets of other seeds: not measured" in text
    assert re.search(r"triggered images: PSNR \d+\.\d dB, SSIM 0\.\d{3}", text)


def test_false_triggers_are_measured_on_both_sets(finished: Path) -> None:
    record = read_record(finished / "record.json")
    text = run_table(record, finished)
    for name, title in (
        ("false_trigger_rate", "false triggers"),
        ("control_false_trigger_rate", "false, clean twin"),
    ):
        summary = record.metrics[name]
        assert len(summary.values) == 2 and summary.mean is not None
        assert f"  {title:<17}{summary.mean:7.3f}" in text
    values = record.metrics["false_trigger_rate"].values
    assert any(value not in (None, 0.0) for value in values)  # three epochs: many mistakes


def test_another_clean_set_gives_the_reference(
    finished: Path, reference: Path, tiny: Tiny, tmp_path: Path
) -> None:
    record = run_cell(tiny(), tmp_path / "run", reference_run=reference, reporter=QUIET)
    found = dict(record.distilled["reference_distance"])
    assert found.pop("pairs") == 1
    assert found == pytest.approx(figures(finished / "control", reference), rel=1e-5)
    line = f"two clean sets of other seeds: L∞ {found['linf']:.3f}"
    assert line in run_table(record, tmp_path / "run") and "one pair" in run_table(record, tmp_path)
    assert record.metrics == read_record(finished / "record.json").metrics


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": 7}, "has the seed of this run, 7"),
        ({"iterations": 4}, "is no reference: it differs in iterations"),
        ({"control": False}, "a run with an attack and a clean twin"),
        (CLEAN, "a run with an attack and a clean twin"),
    ],
)
def test_a_reference_of_another_kind_is_refused(
    changes: dict[str, Any], problem: str, reference: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=problem):
        run_cell(tiny(**changes), tmp_path / "run", reference_run=reference, reporter=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_reference_on_the_command_line(
    finished: Path,
    reference: Path,
    cli: Callable[..., Result],
    tiny_options: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    words = ["attack", *tiny_options(), "--quiet", "--out", tmp_path / "run"]
    done = cli(*words, "--control-run", finished / "control", "--reference-run", reference)
    assert done.exit_code == 0, done.stderr
    assert "one pair" in done.stdout
    refused = cli(*words, "--reference-run", finished, "--seeds", 2)
    assert refused.exit_code == 2 and "each other's --reference-run" in refused.stderr
    attacked = cli(*words[:-1], tmp_path / "new", "--reference-run", finished)
    assert attacked.exit_code == 2 and "is no finished clean run" in attacked.stderr


def test_the_twins_of_several_seeds_are_each_others_reference(several: Path) -> None:
    record = read_record(several / "record.json")
    places = [several / f"seed-{seed}" for seed in range(3)]
    from_twin = [figures(place, place / "control") for place in places]
    pairs = [figures(a / "control", b / "control") for a, b in combinations(places, 2)]
    reference = record.distilled["reference_distance"]
    assert reference["pairs"] == len(pairs) == 3
    for norm in ("linf", "l2", "rms"):
        ours, theirs = (np.mean([each[norm] for each in found]) for found in (from_twin, pairs))
        assert record.distilled[f"{norm}_from_twin"] == pytest.approx(ours, rel=1e-5)
        assert reference[norm] == pytest.approx(theirs, rel=1e-5)
    assert "mean of 3 pairs" in run_table(record, several)
    assert record.metrics["false_trigger_rate"].ci95 is not None


def test_victims_of_an_earlier_version_are_kept(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Their scores have no false triggers; those of the victims still missing have."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    kept = read_json(out / "checkpoint" / "victims.json")
    del kept["convnet/1"]
    for scores in kept.values():
        del scores["false_trigger_rate"]
    (out / "checkpoint" / "victims.json").write_text(json.dumps(kept))
    record = read_json(out / "record.json")
    (out / "record.json").write_text(json.dumps({**record, "status": "running"}))
    again = run_cell(tiny(), out, resume=True, reporter=QUIET)
    whole = read_record(finished / "record.json").metrics
    assert again.metrics["attack_success_rate"] == whole["attack_success_rate"]
    values = whole["false_trigger_rate"].values
    assert again.metrics["false_trigger_rate"].values == (None, values[1])
    assert "control_false_trigger_rate" not in again.metrics


def test_a_record_of_an_earlier_version_is_read_and_shown(finished: Path, tmp_path: Path) -> None:
    record = read_json(finished / "record.json")
    for name in ("false_trigger_rate", "control_false_trigger_rate"):
        del record["metrics"][name]
    for name in ("linf_from_twin", "l2_from_twin", "reference_distance"):
        del record["distilled"][name]
    (tmp_path / "record.json").write_text(json.dumps(record))
    text = run_table(read_record(tmp_path / "record.json"), finished)
    assert "false" not in text and "from its clean twin" not in text
