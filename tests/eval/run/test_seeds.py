"""Several distillation seeds: a folder each, and a summary of means over them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.seeds import run_seeds

Tiny = Callable[..., Config]
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, 3 and 4, without control; read-only."""
    out = tmp_path_factory.mktemp("seeds") / "runs"
    run_seeds(tiny(seed=3, control=False), 2, out, given=("seed",), reporter=QUIET)
    return out


def parts(runs: Path) -> list[Record]:
    return [read_record(runs / name / "record.json") for name in ("seed-3", "seed-4")]


def test_each_seed_has_its_own_finished_run(runs: Path) -> None:
    assert sorted(path.name for path in runs.iterdir()) == ["record.json", "seed-3", "seed-4"]
    for seed, record in enumerate(parts(runs), start=3):
        assert (record.kind, record.status, record.config["seed"]) == ("attack", "done", seed)
        assert record.conditional_on_set
    sets = [(runs / f"seed-{seed}" / "distilled.safetensors").read_bytes() for seed in (3, 4)]
    assert sets[0] != sets[1]


def test_the_summary_is_over_the_means_of_the_seeds(runs: Path) -> None:
    summary = read_record(runs / "record.json")
    assert (summary.kind, summary.status, summary.seeds) == ("seeds", "done", [3, 4])
    assert not summary.conditional_on_set
    assert summary.metrics.keys() == parts(runs)[0].metrics.keys()
    for name, found in summary.metrics.items():
        means = [record.mean(name) for record in parts(runs)]
        assert found.values == pytest.approx(means)
        assert found.mean == pytest.approx(np.mean([m for m in means if m is not None]))
    times = [record.timings["distil_seconds"] for record in parts(runs)]
    assert summary.timings["distil_seconds"] == pytest.approx(sum(times))
    assert summary.hooks == parts(runs)[0].hooks
    assert (summary.trigger, summary.distilled, summary.control) == (None, {}, None)


def test_resuming_skips_finished_seeds_and_adds_new_ones(
    runs: Path, tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(runs, out)
    shutil.rmtree(out / "seed-4")
    times = {path: path.stat().st_mtime_ns for path in (out / "seed-3").rglob("*")}
    again = run_seeds(tiny(seed=3, control=False), 2, out, resume=True, reporter=QUIET)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.metrics == read_record(runs / "record.json").metrics
    with pytest.raises(RequestError, match="is not empty"):
        run_seeds(tiny(seed=3, control=False), 2, out, reporter=QUIET)


def test_other_requests_in_the_same_folder_are_refused(
    runs: Path, finished: Path, tiny: Tiny
) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with pytest.raises(RequestError, match=r"ipc 2 \(was 1\)"):
        run_seeds(tiny(seed=3, control=False, ipc=2), 2, runs, resume=True, reporter=QUIET)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    with pytest.raises(RequestError, match="holds one run"):
        run_seeds(tiny(), 2, finished, resume=True, reporter=QUIET)


def test_several_seeds_on_the_command_line(
    runs: Path, cli: Callable[..., Result], tiny_options: Callable[..., list[str]]
) -> None:
    words = ["attack", *tiny_options(seed=3), "--no-control", "--out", runs, "--resume"]
    done = cli(*words, "--seeds", 2)
    assert done.exit_code == 0, done.stderr
    assert "over distillation seeds" in done.stdout and str(runs / "record.json") in done.stdout
    lost = cli(*words)
    assert lost.exit_code == 2 and "kind seeds, not attack: resume it with --seeds" in lost.stderr
    shown = cli("evaluate", runs, "--out", runs / "new")
    assert shown.exit_code == 2 and "evaluate one of them" in shown.stderr


def test_a_wrong_configuration_writes_nothing_for_any_seed(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(RequestError, match="poison rate"):
        run_seeds(tiny(poison_rate=0.95), 2, tmp_path / "runs", reporter=QUIET)
    assert not (tmp_path / "runs").exists()
