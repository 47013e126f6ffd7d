"""Experts on the command line: shared folders, kills during their training, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from distillsec.distill.files.safe import read_json, read_tensors
from distillsec.eval.run import cell

Cli = Callable[..., Result]
Options = Callable[..., list[str]]

MTT = ["backend=mtt", "experts=3", "experts_per_file=2", "train_epochs=2", "expert_lr=0.05"]
MTT += ["max_start_epoch=2", "expert_epochs=1", "student_steps=2", "lr_img=10", "lr_rate=1e-4"]
MOVING = {"attack": "doorping", "objective": "target-logit"}


def settings(*more: str) -> list[str]:
    """``MTT`` with ``more`` in place of the settings of the same keys."""
    chosen = {setting.partition("=")[0]: setting for setting in (*MTT, *more)}
    return [word for setting in chosen.values() for word in ("--set", setting)]


def words(options: Options, *more: str, **changes: Any) -> list[str]:
    keys = {"backend": None, "victims": 1, "victim_epochs": 1, **changes}
    return [*options(**keys), *settings(*more), "--quiet"]


def clean(options: Options, *more: str, **changes: Any) -> list[str]:
    return ["distill", *words(options, *more, attack=None, poison_rate=None, **changes)]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# Sharing -----------------------------------------------------------------------------------------


def test_a_buffer_is_shared_by_runs_that_only_differ_in_their_students(
    cli: Cli, tiny_options: Options, tmp_path: Path
) -> None:
    buffer = tmp_path / "experts"
    first = cli(*clean(tiny_options), "--buffer", buffer, "--out", tmp_path / "a")
    assert first.exit_code == 0, first.stderr
    assert sorted(p.name for p in (buffer / "clean" / "round-0").iterdir()) == [
        "experts-000.safetensors",
        "experts-001.safetensors",
        "manifest.json",
    ]
    before = snapshot(buffer)
    for name, more in {"b": ("student_steps=3",), "c": ("ipc=2", "lr_img=20")}.items():
        out = tmp_path / name
        done = cli(*clean(tiny_options, *more, ipc=None), "--buffer", buffer, "--out", out)
        assert done.exit_code == 0, done.stderr
        assert not (out / "experts").exists()
    assert snapshot(buffer) == before
    alone = cli(*clean(tiny_options), "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.stderr
    own, shared = (tmp_path / name / "distilled.safetensors" for name in ("alone", "a"))
    assert own.read_bytes() == shared.read_bytes()
    for path in (buffer / "clean").rglob("*.*"):
        twin = tmp_path / "alone" / "experts" / path.relative_to(buffer / "clean")
        assert twin.read_bytes() == path.read_bytes()


def test_an_attack_and_its_twin_have_separate_folders(
    cli: Cli, tiny_options: Options, tmp_path: Path
) -> None:
    buffer = tmp_path / "experts"
    done = cli("attack", *words(tiny_options), "--buffer", buffer, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in buffer.iterdir()) == ["clean", "naive"]
    before = snapshot(buffer)
    again = cli(*clean(tiny_options), "--buffer", buffer, "--out", tmp_path / "b")
    assert again.exit_code == 0, again.stderr
    assert snapshot(buffer) == before
    twin, plain = (tmp_path / name / "distilled.safetensors" for name in ("a/control", "b"))
    assert twin.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize(
    ("more", "changes", "expected"),
    [
        (["expert_lr=0.06"], {}, "expert_lr is 0.05, not 0.06"),
        ([], {"seed": 1}, "expert_seed is 0, not 1"),
        ([], {"width": 5}, "width is 4, not 5"),
        ([], {"threads": 2}, "threads is 1, not 2"),
        (["zca=true"], {}, "expert_zca is None, not "),
    ],
)
def test_experts_of_another_configuration_are_refused(
    cli: Cli,
    tiny_options: Options,
    tmp_path: Path,
    more: list[str],
    changes: dict[str, Any],
    expected: str,
) -> None:
    buffer = tmp_path / "experts"
    done = cli(*clean(tiny_options), "--buffer", buffer, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    before = snapshot(buffer)
    out = tmp_path / "b"
    refused = cli(*clean(tiny_options, *more, **changes), "--buffer", buffer, "--out", out)
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("distillsec: ")
    assert f"{buffer / 'clean' / 'round-0'} holds other experts" in refused.stderr
    assert expected in refused.stderr
    assert snapshot(buffer) == before
    if out.exists():  # the run had begun: its record holds the failure
        assert read_json(out / "record.json")["status"] == "error"
        assert not (out / "distilled.safetensors").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b""])
def test_a_damaged_buffer_is_named(
    cli: Cli, tiny_options: Options, tmp_path: Path, content: bytes
) -> None:
    manifest = tmp_path / "experts" / "clean" / "round-0" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(content)
    place = ("--buffer", tmp_path / "experts", "--out", tmp_path / "run")
    refused = cli(*clean(tiny_options), *place)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert str(manifest) in refused.stderr


def test_experts_that_diverge_fail_the_run(cli: Cli, tiny_options: Options, tmp_path: Path) -> None:
    failed = cli(*clean(tiny_options, "expert_lr=1e30"), "--out", tmp_path / "run")
    assert failed.exit_code == 1 and failed.stderr.count("\n") == 1
    assert "the run failed: an expert diverged in epoch" in failed.stderr
    assert read_json(tmp_path / "run" / "record.json")["status"] == "error"


# Killed ------------------------------------------------------------------------------------------

# One forked child for each kill, because importing torch costs more than all of them. A child
# raises SIGKILL against itself after the n-th call of a function.
FORKS = """
import json, os, signal, sys
import sklearn.datasets, sklearn.model_selection
from distillsec.cli import main
from distillsec.commands import runs
from distillsec.distill.backends import experts
from distillsec.eval.run import folder

folder._SECONDS_BETWEEN_CHECKPOINTS = experts._SECONDS_BETWEEN_CHECKPOINTS = 0
experts._WRITING_SHARE = 1e9

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        owner = {"experts": experts, "folder": folder.RunFolder}[job["owner"]]
        original, calls = getattr(owner, job["name"]), []
        def counted(*args, **kwargs):
            answer = original(*args, **kwargs)
            calls.append(1)
            if len(calls) == job["count"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer
        setattr(owner, job["name"], counted)
        main(job["words"])
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# Each with the files there then; a round writes 6 times: each of its 2 files two times in part,
# then whole.
KILLS = {
    "half of a file": ("experts", "write_tensors", 1, "experts/round-0/partial.safetensors"),
    "in the first students": ("folder", "log", 1, "experts/round-0/experts-001.safetensors"),
    "in the second round": (
        "experts",
        "write_tensors",
        9,
        "experts/round-1/experts-000.safetensors",
    ),
    "in the twin": ("experts", "write_tensors", 16, "control/experts/round-0/partial.safetensors"),
}


def course(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def test_killed_during_experts_and_resumed_to_the_bit(
    cli: Cli, tiny_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for picture in ("distilled", "triggered", "trigger", "curves"):  # half of the time
        monkeypatch.setattr(cell, f"{picture}_picture", lambda *_, **__: None)
    options = ["attack", *words(tiny_options, "rounds=2", "trigger_steps=2", **MOVING)]
    whole = tmp_path / "whole"
    assert cli(*options, "--out", whole).exit_code == 0
    jobs = [
        {"owner": owner, "name": name, "count": count, "words": [*options, "--out", str(out)]}
        for kill, (owner, name, count, _) in KILLS.items()
        for out in [tmp_path / kill]
    ]
    killed = subprocess.run(
        [sys.executable, "-c", FORKS],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert killed.stdout.split() == [str(-signal.SIGKILL)] * len(KILLS), killed.stderr
    names = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert len([name for name in names if name.name == "manifest.json"]) == 4
    for kill, (*_, left) in KILLS.items():
        out = tmp_path / kill
        assert (out / left).exists(), kill
        for path in out.rglob("[!.]*.safetensors"):
            read_tensors(path)
        done = cli(*options, "--out", out, "--resume")
        assert done.exit_code == 0, (kill, done.stderr)
        assert sorted(path.relative_to(out) for path in out.rglob("*")) == names, kill
        for path in names:
            bits = path.suffix == ".safetensors" and path.parent.name != "checkpoint"
            if bits or path.name == "manifest.json":
                assert (out / path).read_bytes() == (whole / path).read_bytes(), (kill, path)
        for part in (".", "control"):
            assert course(out / part) == course(whole / part), kill
        ours, theirs = (read_json(run / "record.json") for run in (out, whole))
        for key in ("metrics", "trigger", "attack_counters", "recipe", "distilled"):
            assert ours[key] == theirs[key], (kill, key)
