"""Killed or stopped, then resumed: the same bits, and no half-written file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from distillsec.distill.files.safe import read_json, read_tensors
from distillsec.distill.types import RequestError
from distillsec.eval.results.record import read_record
from distillsec.eval.run.folder import RunFolder, fresh_folder

Cli = Callable[..., Result]
Options = Callable[..., list[str]]

# A process that forks one child for each input line, because importing torch costs more than all
# the runs. A child raises a signal against itself at the n-th call of a function: no test races.
FORKS = """
import json, os, signal, sys
import sklearn.datasets, sklearn.model_selection
from distillsec.cli import main
from distillsec.commands import runs
from distillsec.eval.run import folder

folder._SECONDS_BETWEEN_CHECKPOINTS = 0
# A shell that runs the tests in the background leaves Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def arm(owner, name, count, kind, first):
    original, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(name)
        if first and len(calls) == count:
            os.kill(os.getpid(), kind)
        answer = original(*args, **kwargs)
        if len(calls) == count:
            os.kill(os.getpid(), kind)
        return answer
    setattr(owner, name, counted)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        owner = os if job["name"] == "fsync" else folder.RunFolder
        arm(owner, job["name"], job["count"], job["signal"], owner is os)
        main(job["words"])
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# Doorping has state of its own; the victims for the learning curve must not change anything.
ATTACK = {"attack": "doorping", "iterations": 4}
MORE = ["--set", "curve_every=2", "--quiet"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Runs the command line until its n-th call of a function; returns the exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "log"
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=log.parent,
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None
        assert forks.stdout.readline() == "ready\n"

        def interrupt(name: str, count: int, kind: signal.Signals, *words: object) -> int:
            assert forks.stdin is not None and forks.stdout is not None
            job = {"name": name, "count": count, "signal": kind, "log": str(log)}
            forks.stdin.write(json.dumps({**job, "words": [str(word) for word in words]}) + "\n")
            forks.stdin.flush()
            code = int(forks.stdout.readline())
            assert code in (-kind, 1), log.read_text()
            return code

        interrupt.log = log  # type: ignore[attr-defined]
        yield interrupt
        forks.stdin.close()


@pytest.fixture(scope="module")
def whole(cli: Cli, tiny_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = cli("attack", *tiny_options(**ATTACK), *MORE, "--out", out)
    assert done.exit_code == 0, done.stderr
    return out


def same(one: Path, other: Path) -> None:
    """Two runs agree to the bit in all but their times, and neither has a temporary file left."""
    for name in ("distilled.safetensors", "trigger.safetensors", "control/distilled.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    records = [read_json(run / "record.json") for run in (one, other)]
    for key in ("status", "metrics", "trigger", "attack_counters", "distilled", "config_key"):
        assert records[0][key] == records[1][key], key
    for log in ("progress.jsonl", "control/progress.jsonl"):
        rows = [
            [json.loads(x) for x in (run / log).read_text().splitlines()] for run in (one, other)
        ]
        assert [row.pop("seconds") for half in rows for row in half]
        assert rows[0] == rows[1]
        assert [row["iteration"] for row in rows[0]] == [1, 2, 3, 4]
    names = [{p.relative_to(run).as_posix() for p in run.rglob("*")} for run in (one, other)]
    assert names[0] == names[1]


def check_files(out: Path) -> None:
    """Every file under its final name is complete."""
    for path in out.rglob("*"):
        if path.name.startswith("."):
            assert path.name.endswith(".tmp") or path.name == ".lock"
        elif path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            read_tensors(path)


@pytest.mark.parametrize(
    ("name", "count", "left"),
    [
        ("log", 3, "checkpoint/state.safetensors"),  # one line more than the checkpoint has
        ("log", 6, "control/checkpoint/state.safetensors"),  # in the clean twin
        ("keep_score", 1, "checkpoint/victims.json"),
        ("keep_score", 3, "trigger.safetensors"),  # a victim of the twin
        ("fsync", 1, ""),  # half-way through writing the first record
        ("close", 1, "control/record.json"),  # all done but the record
    ],
)
def test_killed_and_resumed(
    name: str,
    count: int,
    left: str,
    interrupted: Callable[..., int],
    whole: Path,
    cli: Cli,
    tiny_options: Options,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    words = ("attack", *tiny_options(**ATTACK), *MORE, "--out", out)
    assert interrupted(name, count, signal.SIGKILL, *words) == -signal.SIGKILL
    assert (out / left).exists()
    check_files(out)
    if (out / "record.json").exists():
        assert read_json(out / "record.json")["status"] == "running"
    if name == "log" and count == 3:
        assert read_tensors(out / left)[1]["iteration"] == 2
        assert len((out / "progress.jsonl").read_text().splitlines()) == 3
    if name == "keep_score":
        assert len(read_json(out / "checkpoint" / "victims.json")) == count
    done = cli(*words, "--resume")
    assert done.exit_code == 0, done.stderr
    same(out, whole)


def test_control_c_leaves_a_run_that_can_be_resumed(
    interrupted: Callable[..., int],
    whole: Path,
    cli: Cli,
    tiny_options: Options,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    words = ("attack", *tiny_options(**ATTACK), *MORE, "--out", out)
    assert interrupted("log", 2, signal.SIGINT, *words) == 1
    said = interrupted.log.read_text()  # type: ignore[attr-defined]
    assert said.count("\n") == 1 and f"command and --out {out} --resume" in said
    check_files(out)
    record = read_json(out / "record.json")
    assert (record["status"], record["error"]) == ("interrupted", "stopped by the user")
    assert [path.name for path in out.rglob(".*")] == [".lock"]
    # The configuration is in the record, without the machine's part.
    refused = cli("attack", "--resume", "--out", out, "--threads", 3)
    assert "threads 3 (was 1)" in refused.stderr
    done = cli("attack", "--resume", "--out", out, "--threads", 1, "--quiet")
    assert done.exit_code == 0, done.stderr
    same(out, whole)


def test_several_seeds_killed_in_the_first_one(
    interrupted: Callable[..., int], cli: Cli, tiny_options: Options, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    words = ("attack", *tiny_options(control=None), "--no-control", "--seeds", 2, "--quiet")
    assert interrupted("log", 2, signal.SIGKILL, *words, "--out", out) == -signal.SIGKILL
    assert not (out / "record.json").exists()
    done = cli(*words, "--out", out, "--resume")
    assert done.exit_code == 0, done.stderr
    assert read_json(out / "record.json")["seeds"] == [0, 1]


@pytest.mark.parametrize(("name", "count"), [("log", 2), ("keep_score", 3)])
def test_an_interceptors_attack_killed_and_resumed(
    name: str,
    count: int,
    interrupted: Callable[..., int],
    finished: Path,
    cli: Cli,
    tmp_path: Path,
) -> None:
    quick = (
        "poison_steps=4",
        "archetypes=3",
        "archetype_steps=2",
        "unroll_warmup=3",
        "unroll_least=1",
    )
    words = (
        *("attack", "--on", finished / "control", "--attack", "poisoned-set", "--threads", 1),
        *(part for setting in quick for part in ("--set", setting)),
        *("--victims", 2, "--victim-epochs", 3, "--set", "linf=0.3", *MORE),
    )
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert cli(*words, "--out", whole).exit_code == 0
    assert interrupted(name, count, signal.SIGKILL, *words, "--out", out) == -signal.SIGKILL
    check_files(out)
    assert read_json(out / "record.json")["status"] == "running"
    alone = cli("attack", "--resume", "--out", out, "--threads", 1)
    assert alone.exit_code == 2 and "name it with --on" in alone.stderr
    done = cli(*words, "--out", out, "--resume")
    assert done.exit_code == 0, done.stderr
    for file in ("distilled.safetensors", "trigger.safetensors", "control/distilled.safetensors"):
        assert (whole / file).read_bytes() == (out / file).read_bytes(), file
    records = [read_json(run / "record.json") for run in (whole, out)]
    for key in ("status", "metrics", "trigger", "attack_counters", "distilled", "config_key"):
        assert records[0][key] == records[1][key], key


# What may be resumed -----------------------------------------------------------------------------


def snapshot(out: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ipc": 2}, "ipc 2 (was 1)"),
        ({"threads": 2}, "threads 2 (was 1)"),
        ({"trigger_size": 3}, "trigger_size 3 (was 2)"),
        ({"victims": 3}, "victims 3 (was 2)"),
        ({"attack": None, "poison_rate": None}, "kind attack, not distill"),
    ],
)
def test_another_configuration_is_refused(
    finished: Path, cli: Cli, tiny_options: Options, changes: dict[str, Any], expected: str
) -> None:
    before = snapshot(finished)
    command = "attack" if changes.get("attack", "naive") else "distill"
    refused = cli(command, *tiny_options(**changes), "--out", finished, "--resume", "--quiet")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert expected in refused.stderr and str(finished) in refused.stderr
    assert snapshot(finished) == before


def test_a_finished_run_returns_its_record(finished: Path, cli: Cli, tiny_options: Options) -> None:
    before = snapshot(finished)
    for words in (["attack", "--resume"], ["attack", *tiny_options(), "--resume"]):
        done = cli(*words, "--out", finished, "--json")
        assert done.exit_code == 0, done.stderr
        assert done.stdout == (finished / "record.json").read_text()
        assert snapshot(finished) == before


def test_a_used_folder_needs_resume(finished: Path, cli: Cli, tiny_options: Options) -> None:
    before = snapshot(finished)
    refused = cli("attack", *tiny_options(), "--out", finished)
    assert refused.exit_code == 2
    assert "is not empty: choose another --out, or resume the run with --resume" in refused.stderr
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("record.json", b"{", "truncated or not JSON"),
        ("record.json", b"", "is empty"),
        ("record.json", b"[]", "no record of schema 1"),
        ("record.json", b'{"schema_version": 99}', "schema 1 (found 99)"),
        ("record.json", b'{"schema_version": 1, "kind": "x"}', "is damaged: kind"),
        ("checkpoint/state.safetensors", b"x" * 99, "not a safetensors file"),
        ("control/checkpoint/state.safetensors", b"", "not a safetensors file"),
        ("checkpoint/state.safetensors", "trigger.safetensors", "is no checkpoint"),
        ("checkpoint/victims.json", b"[1]", "holds no scores"),
        ("checkpoint/victims.json", b"{", "truncated or not JSON"),
        ("checkpoint/victims.json", b'{"convnet/0": {"zz": 1}}', "holds no scores"),
        ("checkpoint/victims.json", b'{"convnet/0": {"clean_test_accuracy": 7}}', "no scores"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(
    finished: Path, cli: Cli, tmp_path: Path, name: str, content: bytes | str, expected: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    wrong = content if isinstance(content, bytes) else (out / content).read_bytes()
    (out / name).write_bytes(wrong)
    before = snapshot(out)
    refused = cli("attack", "--resume", "--out", out, "--quiet")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert str(out / name) in refused.stderr and expected in refused.stderr
    assert snapshot(out) == before


def test_fresh_folders_are_distinct(tmp_path: Path) -> None:
    made = [fresh_folder("a", tmp_path) for _ in range(3)]
    assert len(set(made)) == 1  # asking makes no folder
    for _ in range(3):
        fresh = fresh_folder("a", tmp_path)
        fresh.mkdir()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_torn_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for iteration in (1, 2):
        folder.log({"iteration": iteration, "loss": 0.1 + iteration})
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"iteration": 3, "lo')
    assert [row["iteration"] for row in folder.logged()] == [1, 2]
    with pytest.raises(ValueError, match="JSON"):
        folder.log({"iteration": 3, "loss": float("nan")})


def test_looking_does_not_make_the_folder(finished: Path, tmp_path: Path) -> None:
    record, folder = read_record(finished / "record.json"), RunFolder(tmp_path / "deep" / "run")
    assert folder.look(resume=True) is None
    assert not (tmp_path / "deep").exists()
    with folder.entered(record, resume=False) as earlier:
        assert earlier is None and (tmp_path / "deep" / "run").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"cannot use .*file"):
        RunFolder(tmp_path / "file").entered(record, resume=False).__enter__()


def test_a_folder_takes_one_run_at_a_time(
    finished: Path, cli: Cli, tiny_options: Options, tmp_path: Path
) -> None:
    record, out = read_record(finished / "record.json"), tmp_path / "run"
    with RunFolder(out).entered(record, resume=False):
        second = cli("attack", *tiny_options(), "--out", out, "--quiet")
        assert second.exit_code == 2
        assert f"another process is using {out}" in second.stderr
    assert [path.name for path in out.iterdir()] == [".lock"]
