"""``distillsec ablate``: points, jobs, shared cells, resume, dry runs, both executors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import configure
from distillsec.eval.grid.estimate import estimate_sweep
from distillsec.eval.grid.jobs import DefenseJob, DistillationJob, experts_key, share_experts
from distillsec.eval.grid.ledger import Ledger
from distillsec.eval.grid.sweep import Sweep, SweepPoint, cell_place, read_sweep, sweep_jobs
from distillsec.eval.results.ablation import Ablation
from distillsec.eval.results.record import read_record

Cli = Callable[..., Result]
TINY: dict[str, Any] = {
    "dataset": "digits",
    "backend": "dc",
    "ipc": 1,
    "iterations": 2,
    "network": "convnet",
    "width": 4,
    "depth": 1,
    "attack": "naive",
    "poison_rate": 0.1,
    "victims": 1,
    "victim_epochs": 3,
    "device": "cpu",
}
CLEAN = {key: value for key, value in TINY.items() if key not in ("attack", "poison_rate")}
GRID = {"trigger_size": [2, 3], "ipc": [1, 2]}
MTT = {"backend": "mtt", "experts": 2, "train_epochs": 2, "max_start_epoch": 1, "expert_epochs": 1}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A factory of sweep files that run in seconds."""
    monkeypatch.chdir(tmp_path)

    def make(**changes: Any) -> Path:
        found: dict[str, Any] = {"description": "a tiny sweep", "base": TINY, "seeds": 1}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**found, **changes}, sort_keys=False))
        return path

    return make


def keys(**axes: Any) -> list[dict[str, Any]]:
    return [point.keys for point in Sweep(**axes).points()]


# Points ------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination() -> None:
    assert keys(grid={"a": [1, 2], "b-c": ["x", "y"]}) == [
        {"a": 1, "b_c": "x"},
        {"a": 1, "b_c": "y"},
        {"a": 2, "b_c": "x"},
        {"a": 2, "b_c": "y"},
    ]


def test_zipped_axes_advance_together_and_cross_the_others() -> None:
    assert keys(zip={"a": [1, 2], "b": [3, 4]}, grid={"c": [5, 6]}, list=[{"d": 7}]) == [
        {"d": 7, "a": 1, "b": 3, "c": 5},
        {"d": 7, "a": 1, "b": 3, "c": 6},
        {"d": 7, "a": 2, "b": 4, "c": 5},
        {"d": 7, "a": 2, "b": 4, "c": 6},
    ]


def test_each_varies_one_axis_at_a_time() -> None:
    points = Sweep(each={"a": (1, 2), "b": ({"b": 3, "c": 4}, {"d": 5, "e": 6})}).points()
    assert [point.keys for point in points] == [
        {"a": 1},
        {"a": 2},
        {"b": 3, "c": 4},
        {"d": 5, "e": 6},
    ]
    assert [point.axis for point in points] == ["a", "a", "b", "b"]
    assert [dict(point.values) for point in points] == [
        {"a": 1},
        {"a": 2},
        {"b": 3},
        {"b": "d 5, e 6"},
    ]
    assert len(Sweep(each={"a": (1,)}, grid={"b": (1, 2)}).points()) == 3


def test_without_axes_there_is_only_the_base() -> None:
    assert Sweep().points() == (SweepPoint(),) and str(SweepPoint()) == "the base"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grid": {"ipcc": [1]}}, "ipcc 1: .*did you mean ipc"),
        ({"grid": {"ipc": [1, 0]}}, "ipc 0: ipc: .*greater than or equal to 1"),
        ({"grid": {"ipc": []}}, "axis ipc has no values"),
        ({"grid": {"ipc": 3}}, "grid"),
        ({"zip": {"ipc": [1, 2], "width": [4]}}, "equally many values, got ipc 2, width 1"),
        ({"zip": {"ipc": [1]}, "grid": {"ipc": [2]}}, "the key ipc is given twice"),
        ({"list": [{"ipc": 1}], "grid": {"ipc": [2]}}, "the key ipc is given twice"),
        ({"each": {"batch-real": [1], "batch_real": [2]}}, "the key batch_real is given twice"),
        ({"list": [{"attack": "nope"}]}, "attack nope: unknown attack 'nope'"),
        ({"base": {"preset": "digits-nope"}}, "digits-nope"),
        ({"defenses": ["stripp"]}, "unknown defense 'stripp'"),
        ({"base": CLEAN, "defenses": ["strip"]}, "defenses need an attack"),
        ({"sedes": 3}, "has no option sedes"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_a_wrong_sweep_is_one_line(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    file = sweep(**changes)
    with pytest.raises(RequestError, match=rf"sweep\.yaml.*{text}"):
        read_sweep(file)
    done = cli("ablate", file)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# Jobs --------------------------------------------------------------------------------------------


def test_cells_that_need_the_same_twin_share_it(sweep: Callable[..., Path]) -> None:
    jobs = sweep_jobs(read_sweep(sweep(grid=GRID, seeds=2)))
    twins = [job for job in jobs if job.config.attack is None]
    cells = [job for job in jobs if job.config.attack]
    assert len(twins) == 2 * 2 and len(cells) == 2 * 4  # one twin for an IPC and a seed
    places = [job.place for job in jobs]
    assert len(set(places)) == len(places)
    for cell in cells:
        assert isinstance(cell, DistillationJob) and cell.control is not None
        assert cell.needs == cell.control
        assert cell.config.control_key() == cell.control.removeprefix("cells/")
        assert places.index(cell.control) < places.index(cell.place)


def test_a_configuration_of_two_axes_is_one_cell(sweep: Callable[..., Path]) -> None:
    found = read_sweep(sweep(each={"trigger_size": [2, 3], "ipc": [1, 2]}))
    assert len([job for job in sweep_jobs(found) if job.config.attack]) == 3  # not 4: the base
    assert estimate_sweep(found, None).cells == 3 and estimate_sweep(found, None).points == 4


def test_cells_without_an_attack_or_a_twin(sweep: Callable[..., Path]) -> None:
    (clean,) = sweep_jobs(read_sweep(sweep(base=CLEAN)))
    assert isinstance(clean, DistillationJob) and clean.control is None
    (attacked,) = sweep_jobs(read_sweep(sweep(base={**TINY, "control": False})))
    assert (
        isinstance(attacked, DistillationJob)
        and attacked.control is None
        and attacked.config.attack
    )


def test_defenses_run_after_their_cell(sweep: Callable[..., Path]) -> None:
    twin, cell, bench = sweep_jobs(read_sweep(sweep(defenses=["scan"], holdout=7)))
    assert isinstance(bench, DefenseJob) and bench.needs == cell.place == bench.source
    assert bench.place == f"{cell.place}-defended-quick-7-all"
    assert isinstance(twin, DistillationJob) and twin.keep_victims


def test_experts_are_shared_by_cells_that_differ_in_their_students() -> None:
    clean = configure(**MTT, ipc=1)
    assert experts_key(configure(backend="dc")) is None
    for same in ({"ipc": 2}, {"iterations": 5}, {"lr_img": 3.0}, {"victims": 9}, {"rounds": 2}):
        assert experts_key(configure(**MTT | same)) == experts_key(clean)
    for other in ({"expert_lr": 0.5}, {"seed": 1}, {"width": 8}, {"attack": "naive"}):
        assert experts_key(configure(**MTT | other)) != experts_key(clean)
    seeds = [configure(**MTT, expert_seed=3, seed=seed) for seed in (0, 1)]
    assert experts_key(seeds[0]) == experts_key(seeds[1])
    moving = [configure(**MTT, attack="doorping", ipc=ipc) for ipc in (1, 2)]
    assert experts_key(moving[0]) != experts_key(moving[1])


def test_the_first_job_that_uses_experts_trains_them() -> None:
    cells = [
        DistillationJob(place=f"cells/{ipc}", config=configure(**MTT, ipc=ipc)) for ipc in (1, 2, 3)
    ]
    assert [job.after for job in share_experts([*cells])] == [(), ("cells/1",), ("cells/1",)]


# Runs --------------------------------------------------------------------------------------------


def test_a_sweep_ends_in_a_table_and_its_cells_match_single_runs(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli("ablate", sweep(grid={"trigger_size": [2, 4]}, seeds=2), "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    found = Ablation.model_validate(json.loads(done.stdout))
    assert found == Ablation.model_validate_json((out / "table.json").read_text())
    assert (found.status, found.axes, found.failures) == ("done", ["trigger_size"], [])
    small, big = found.rows
    assert (small.values, big.values) == ({"trigger_size": 2}, {"trigger_size": 4})
    assert small.seeds == [0, 1] and small.seconds is not None and small.seconds > 0
    single = configure(**TINY, trigger_size=4, seed=1, threads=1)
    record = read_record(out / big.folders[1] / "record.json")
    assert record.config == single.flat()
    assert (
        record.metrics["attack_success_rate"].mean == big.metrics["attack_success_rate"].values[1]
    )
    assert (out / cell_place(single) / "trigger.png").exists()
    # Only the twins' victims are kept: no other job uses the attacked ones.
    assert len(list((out / "victims").iterdir())) == 2
    assert not (out / "experts").exists()
    assert "| trigger_size | CTA |" in (out / "table.md").read_text()


def test_a_sweep_grows_and_keeps_its_finished_cells(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = cli("ablate", sweep(grid={"trigger_size": [2]}), "--out", out, "--quiet", "--jobs", 1)
    assert first.exit_code == 0, first.stderr
    again = cli("ablate", sweep(), "--out", out)
    assert again.exit_code == 2 and "continue with --resume" in again.stderr
    file = sweep(grid={"trigger_size": [2, 3]})
    limited = cli("ablate", file, "--out", out, "--resume", "--limit", 1, "--jobs", 1)
    assert limited.exit_code == 0 and "2 of 3 are done already" in limited.stderr
    more = cli("ablate", file, "--seeds", 2, "--out", out, "--resume", "--jobs", 1, "--json")
    rows = Ablation.model_validate(json.loads(more.stdout)).rows
    assert [row.seeds for row in rows] == [[0, 1], [0, 1]]
    events = [(row["event"], row["place"]) for row in Ledger(out).rows()]
    assert len(events) == len(set(events)) == 2 * (1 + 2)


def test_a_failed_cell_is_in_the_table_and_the_others_run(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    file = sweep(grid={"poison_rate": [0.99, 0.1]})
    done = cli("ablate", file, "--out", tmp_path / "out", "--jobs", 1, "--quiet")
    assert done.exit_code == 1 and "1 cells failed" in done.stderr
    found = Ablation.model_validate_json((tmp_path / "out" / "table.json").read_text())
    assert found.status == "running" and [row.seeds for row in found.rows] == [[], [0]]
    assert "poison rate 0.99 asks for" in (found.rows[0].reason or "")


def test_a_dry_run_counts_and_estimates_and_writes_nothing(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    file, out = sweep(grid=GRID, seeds=3), tmp_path / "out"
    dry = cli("ablate", file, "--out", out, "--dry-run", "--jobs", 2)
    assert dry.exit_code == 0 and not out.exists()
    assert "4 points × 3 seeds: 12 cells, 6 clean twins, 0 runs of defenses" in dry.stdout
    assert "no cell was measured yet" in dry.stdout
    found = read_sweep(file)
    jobs = sweep_jobs(found)
    out.mkdir()
    for job, seconds in zip(jobs[:2], (1.0, 5.0), strict=True):
        Ledger(out).write("done", job.place, seconds=seconds)
    expected = 0.0
    for job in jobs:
        point = {**job.config.flat(), "seed": 0}
        if point == {**jobs[0].config.flat(), "seed": 0}:
            expected += 1.0
        else:
            expected += 5.0 if job.config.attack else 1.0
    assert estimate_sweep(found, out).seconds == pytest.approx(expected)
    assert "on 2 workers" in cli("ablate", file, "--out", out, "--dry-run", "--jobs", 2).stdout


def test_defenses_of_a_sweep(sweep: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    file = sweep(defenses=["quantise"], images=40, holdout=20)
    done = cli("ablate", file, "--out", tmp_path / "out", "--jobs", 1)
    assert done.exit_code == 0, done.stderr
    found = Ablation.model_validate_json((tmp_path / "out" / "table.json").read_text())
    assert "attack_success_rate" in found.rows[0].defenses["quantise"]
    assert "## After each defense" in done.stdout


def test_victims_of_several_architectures_are_rows(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    file = sweep(base={**TINY, "victim_network": ["convnet", "mlp"]})
    done = cli("ablate", file, "--out", tmp_path / "out", "--jobs", 1, "--json")
    rows = Ablation.model_validate(json.loads(done.stdout)).rows
    assert [(row.network, row.primary) for row in rows] == [("convnet", True), ("mlp", False)]
    assert rows[0].metrics != rows[1].metrics


# Other processes ---------------------------------------------------------------------------------


def start(*words: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "distillsec.cli", "ablate", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def measured(out: Path) -> list[dict[str, Any]]:
    """The rows of a table without their times."""
    found = Ablation.model_validate_json((out / "table.json").read_text())
    assert found.status == "done"
    return [row.model_dump(exclude={"seconds"}) for row in found.rows]


def cells(out: Path) -> dict[str, bytes]:
    """The bytes of the sets and triggers of all cells."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted((out / "cells").rglob("*.safetensors"))
        if path.parent.name != "checkpoint"
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--jobs", 2], ["--ray", "local", "--jobs", 2]])
def test_a_killed_command_resumes_to_the_same_bits_in_every_executor(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path, how: list[Any]
) -> None:
    if "--ray" in how:
        pytest.importorskip("ray")
    file = sweep(base={**TINY, "iterations": 60}, grid=GRID)
    plain = cli("ablate", file, "--out", tmp_path / "plain", "--jobs", 1, "--quiet")
    assert plain.exit_code == 0, plain.stderr
    out = tmp_path / "out"
    command_process = start(file, "--out", out, *how)
    while not len(Ledger(out).rows()) >= 2:
        assert command_process.poll() is None
        time.sleep(0.1)
    os.kill(command_process.pid, signal.SIGKILL)
    command_process.wait()
    before = {
        row["place"]: (out / row["place"] / "record.json").stat().st_mtime_ns
        for row in Ledger(out).rows()
        if row["event"] == "done"
    }
    resumed = cli("ablate", file, "--out", out, *how, "--resume", "--quiet")
    assert resumed.exit_code == 0, resumed.stderr
    assert measured(out) == measured(tmp_path / "plain")
    assert cells(out) == cells(tmp_path / "plain")
    done = [row["place"] for row in Ledger(out).rows() if row["event"] == "done"]
    assert len(done) == len(set(done))
    for place, stamp in before.items():
        assert (out / place / "record.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--jobs", 2], ["--ray", "local", "--jobs", 2]])
def test_a_killed_worker_changes_no_bit(
    sweep: Callable[..., Path], cli: Cli, tmp_path: Path, how: list[Any]
) -> None:
    if "--ray" in how:
        pytest.importorskip("ray")
    file = sweep(base={**TINY, "iterations": 150}, grid={"trigger_size": [2, 3]}, seeds=2)
    plain = cli("ablate", file, "--out", tmp_path / "plain", "--jobs", 1, "--quiet")
    assert plain.exit_code == 0, plain.stderr
    out = tmp_path / "out"
    command_process = start(file, "--out", out, *how)
    victim = None
    while victim is None:
        assert command_process.poll() is None
        victim = holder(out)
        time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    assert command_process.wait() == 0
    assert measured(out) == measured(tmp_path / "plain")
    assert cells(out) == cells(tmp_path / "plain")
    rows = Ledger(out).rows()
    done = [row["place"] for row in rows if row["event"] == "done"]
    assert len(done) == len(set(done)) == 6
    assert any(row["event"] == "lost" for row in rows)


def holder(out: Path) -> int | None:
    """The process that holds the lock of a cell whose distillation is running."""
    for checkpoint in (out / "cells").glob("*/checkpoint/state.safetensors"):
        folder = checkpoint.parents[1]
        if json.loads((folder / "record.json").read_text())["status"] != "running":
            continue
        lock = (folder / ".lock").stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[5].rpartition(":")[2] == str(lock):
                return int(words[4])
    return None


def test_points_are_counted_before_they_are_made(tmp_path: Path) -> None:
    """Nine axes of ten values; and a million seeds."""
    axes = "\n".join(f"  a{number}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" for number in range(9))
    path = tmp_path / "sweep.yaml"
    path.write_text(f"grid:\n{axes}\n")
    with pytest.raises(RequestError, match="1000000000 points with 5 seeds are 5000000000 runs"):
        read_sweep(path)
    path.write_text("grid: {ipc: [1, 2]}\nseeds: 1000000\n")
    with pytest.raises(RequestError, match="2 points with 1000000 seeds are 2000000 runs"):
        read_sweep(path)
