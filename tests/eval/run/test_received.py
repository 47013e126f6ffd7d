"""Run folders and files of other people: their records are data, and are shown as what they are."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distillsec.distill.files.artifact import load_set
from distillsec.distill.files.safe import read_json, write_json
from distillsec.eval.config.received import received_keys
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import read_record
from distillsec.eval.run.evaluate import evaluate
from distillsec.eval.run.progress import Reporter

Cli = Callable[..., Result]
Options = Callable[..., list[str]]
Received = Callable[..., Path]
FEW = ("--victims", 1, "--victim-epochs", 1, "--quiet")


@pytest.fixture
def received(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Received:
    """A copy of a finished run in the current folder, with changes to its record; the folder holds
    a module, which leaves a file behind when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Thing: pass\n")

    def make(config: dict[str, Any] | None = None, **changes: Any) -> Path:
        folder = tmp_path / "theirs"
        shutil.copytree(finished, folder)
        record = read_json(folder / "record.json")
        record |= changes | {"config": record["config"] | (config or {})}
        write_json(folder / "record.json", record)
        return folder

    return make


def refused(done: Result, *expected: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("distillsec: ") and done.stderr.count("\n") == 1
    for text in expected:
        assert text in done.stderr
    assert not Path("ran").exists() and not Path("out").exists()


# What a record names -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["attack", "backend"])
def test_no_class_of_a_record_is_imported(key: str, received: Received, cli: Cli) -> None:
    folder = received({key: "evil:Thing"})
    done = cli("evaluate", folder, *FEW, "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert not Path("ran").exists()
    record = read_record("out/record.json")
    assert "evil:Thing" in record.distilled["origin"] and key not in record.config
    for words in (("--set", f"{key}=evil:Thing"), ("--trust",)):
        named = cli("evaluate", folder, *FEW, "--out", "other", *words)
        assert named.exit_code == 2 and "not a subclass" in named.stderr
        assert Path("ran").exists()  # the user's own request


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"network": "evil:Thing"}, "network evil:Thing"),
        ({"victim_network": ["mlp", "evil:Thing"]}, "victim_network mlp evil:Thing"),
        ({"dataset": "folder:/etc"}, "name the data with --dataset"),
        ({"dataset": "npz:x.npz"}, "name the data with --dataset"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "defend", "shadows"])
def test_what_measuring_needs_must_be_named(
    command: str, config: dict[str, Any], expected: str, received: Received, cli: Cli
) -> None:
    done = cli(command, received(config), "--quiet", "--out", "out")
    refused(done, expected, "--trust", "theirs")


def test_what_is_named_again_is_used(received: Received, cli: Cli) -> None:
    folder = received({"network": "evil:Thing", "dataset": "folder:/etc"})
    words = ("--dataset", "digits", "--victim-network", "mlp")
    done = cli("evaluate", folder, *FEW, *words, "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert not Path("ran").exists()


def test_resuming_needs_every_name_again(received: Received, cli: Cli) -> None:
    folder = received({"attack": "evil:Thing"}, status="interrupted")
    refused(cli("attack", "--out", folder, "--resume"), "attack evil:Thing", "--trust")


def test_a_finished_run_is_shown_without_using_its_record(received: Received, cli: Cli) -> None:
    folder = received({"attack": "evil:Thing", "dataset": "folder:/etc"})
    done = cli("attack", "--out", folder, "--resume")
    assert done.exit_code == 0 and "evil:Thing" in done.stdout
    assert not Path("ran").exists()


def test_the_machine_of_a_record_is_not_used(received: Received, cli: Cli) -> None:
    folder = received({"threads": 1024, "device": "cuda:7"})
    done = cli("evaluate", folder, *FEW, "--out", "mine", "--threads", 1)
    assert done.exit_code == 0, done.stderr
    config = read_record("mine/record.json").config
    assert (config["threads"], config["device"]) == (1, "cpu")
    refused(cli("evaluate", folder, *FEW, "--trust", "--out", "other"), "cuda:7")


def test_a_resumed_run_has_the_threads_it_began_with(
    received: Received, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillsec.eval.config.schema.cpu_count", lambda: 2)
    folder = received(status="running")
    done = cli("attack", "--out", folder, "--resume", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert read_record(folder / "record.json").config["threads"] == 1


def test_a_resumed_run_takes_no_more_threads_than_cores(received: Received, cli: Cli) -> None:
    folder = received({"threads": 1024}, status="running")
    done = cli("attack", "--out", folder, "--resume")
    assert done.exit_code == 2 and "threads" in done.stderr and "was 1024" in done.stderr


def test_a_twin_outside_of_the_run_must_be_given(received: Received, cli: Cli) -> None:
    folder = received(control={"folder": "../twin", "key": "x", "reused": True})
    (folder / "control").rename("twin")
    measured = {}
    for name, words in {
        "none": (),
        "given": ("--control-run", "twin"),
        "trusted": ("--trust", "--threads", 1),
    }.items():
        done = cli("evaluate", folder, *FEW, "--threads", 1, *words, "--out", name)
        assert done.exit_code == 0, done.stderr
        record = read_record(Path(name, "record.json"))
        measured[name] = record.mean("control_attack_success_rate")
        assert any("no control" in label for label in record.labels) == (name == "none")
    assert measured["none"] is None
    assert measured["given"] is not None and measured["given"] == measured["trusted"]


def test_another_runs_twin_is_refused(received: Received, cli: Cli) -> None:
    folder = received(control_key="another")
    refused(
        cli("evaluate", folder, "--control-run", folder / "control", "--out", "out"),
        "is no clean twin of",
    )


def test_experts_of_a_record_are_not_used(
    received: Received, cli: Cli, tiny_options: Options
) -> None:
    folder = received(buffer="/somewhere", status="interrupted")
    done = cli("attack", *tiny_options(), "--out", folder, "--resume")
    refused(done, "--buffer /somewhere", "--trust")


def test_what_is_taken_from_a_record() -> None:
    config = {"dataset": "digits", "attack": "own:A", "opacity": 0.3, "width": 4, "threads": 3}
    found = received_keys(config, {})
    assert (found.keys, found.refused) == ({"dataset": "digits", "width": 4}, {"attack": "own:A"})
    config |= {"network": "own:N", "victim_network": ["own:N"]}
    found = received_keys(config, {"victim_network": ("own:N",)})
    assert found.keys == {"dataset": "digits", "victim_network": ["own:N"]}
    assert found.refused.keys() == {"attack", "network"}


IMAGE = "/etc/secret.png@0123456789abcdef"


def test_no_trigger_image_of_a_record_is_read(received: Received, cli: Cli) -> None:
    """Nor is it missed where the set is measured; a stopped run needs it again, or --trust."""
    folder = received({"trigger_image": IMAGE})
    done = cli("evaluate", folder, *FEW, "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "trigger_image" not in read_record("out/record.json").config


def test_resuming_needs_the_trigger_image_again(
    received: Received, cli: Cli, tiny_options: Options
) -> None:
    folder = received({"trigger_image": IMAGE}, status="interrupted")
    resume = ("attack", "--out", folder, "--resume", "--quiet")
    refused(cli(*resume), f"trigger_image {IMAGE}", "name its trigger_image again", "--trust")
    for words in (("--trust",), ("--trigger-image", "/etc/secret.png")):
        named = cli(*resume, *tiny_options(), *words)
        assert named.exit_code == 2 and "/etc/secret.png" in named.stderr
        assert "not trusted" not in named.stderr


def test_a_trigger_image_is_taken_where_the_user_names_it() -> None:
    config = {"attack": "naive", "trigger_image": IMAGE}
    assert received_keys(config, {}).refused == {"trigger_image": IMAGE}
    assert received_keys(config, {"trigger_image": IMAGE}).keys == config
    none = {"attack": "naive", "trigger_image": None}
    assert (received_keys(none, {}).keys, received_keys(none, {}).refused) == (none, {})


# Records of a wrong structure --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"control": {"folder": 3}}, "control: folder: "),
        ({"control": {}, "kind": "evaluate", "distilled": {}}, "is itself an evaluation"),
        ({"config": {"attack": 5}}, "config: attack: "),
        ({"config": {"victims": "many"}}, "config: victims: "),
        ({"config": {"network": "mlp", "width": 4096, "depth": 100}}, "parameters"),
        ({"trigger": {"kind": "patch"}}, "trigger: min: "),
        ({"distilled": {"pixel_range": "x"}}, "distilled: pixel_range: "),
        ({"bench": {"budget": "all"}}, "bench: budget: "),
        ({"hooks": [1]}, "hooks.0: "),
        ({"metrics": {"clean_test_accuracy": 1}}, "metrics.clean_test_accuracy: "),
    ],
)
def test_wrong_records_are_one_line(
    changes: dict[str, Any], expected: str, received: Received, cli: Cli
) -> None:
    refused(cli("evaluate", received(**changes), *FEW, "--out", "out"), "theirs", expected)


@pytest.mark.parametrize(
    ("key", "value"), [("victims", 10**9), ("width", 10**9), ("seed", 10**30), ("image_size", 1e9)]
)
def test_numbers_of_a_record_have_bounds(
    key: str, value: float, received: Received, cli: Cli
) -> None:
    refused(cli("evaluate", received({key: value}), "--quiet", "--out", "out"), f"{key}: ")


def test_rows_of_a_log_that_are_none_are_left_out(
    received: Received, cli: Cli, tiny_options: Options
) -> None:
    folder = received(status="interrupted")
    log = folder / "progress.jsonl"
    log.write_text('5\n"x"\n{"loss": 1}\n{"iteration": 1, "loss": "x"}\n' + log.read_text())
    done = cli("attack", *tiny_options(), "--out", folder, "--resume", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert [json.loads(row)["iteration"] for row in log.read_text().splitlines()] == [1, 2, 3]


# What a file says of itself ----------------------------------------------------------------------


def renamed(good: Path, path: Path, network: dict[str, Any] | None) -> Path:
    """The set in ``good`` with another network in its metadata."""
    with safe_open(good, framework="pt") as file:
        info: dict[str, Any] = json.loads(file.metadata()["distillsec"])
    info["recipe"].pop("network")
    info["recipe"] |= {"network": network} if network else {}
    save_file(load_file(good), path, metadata={"distillsec": json.dumps(info)})
    return path


def test_victims_have_the_network_of_the_set(
    finished: Path, cli: Cli, tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    file, out = finished / "distilled.safetensors", tmp_path / "out"
    assert load_set(file).recipe.network == {"network": "convnet", "width": 4, "depth": 1}
    words = ("--dataset", "digits", "--threads", 1, "--victims", 2)
    done = cli("evaluate", file, *words, "--quiet", "--out", out)
    assert done.exit_code == 0, done.stderr
    record = read_record(out / "record.json")
    wanted = read_record(finished / "record.json").metrics["clean_test_accuracy"]
    assert record.metrics["clean_test_accuracy"] == wanted
    assert (record.config["width"], record.config["depth"], record.labels) == (4, 1, [])
    wide = evaluate(
        file,
        tiny(attack=None, poison_rate=None, width=8),
        tmp_path / "wide",
        reporter=Reporter(quiet=True),
    )
    assert wide.config["width"] == 8


def test_the_header_of_a_received_set_is_honest(finished: Path, cli: Cli, tmp_path: Path) -> None:
    """Nothing is said of how it was made, and nothing that is only a default."""
    file, out = finished / "distilled.safetensors", tmp_path / "out"
    done = cli("evaluate", file, "--dataset", "digits", *FEW, "--out", out)
    head = done.stdout.splitlines()[1:3]
    assert head[0] == (
        f"evaluate: {file} · 10 images, 1 per class · origin unknown · tested on digits"
    )
    assert head[1] == "  victims: convnet, width 4, depth 1"
    assert "clean\n" not in done.stdout and "IPC" not in done.stdout
    assert (
        not {"backend", "ipc", "iterations", "attack"}
        & read_record(out / "record.json").config.keys()
    )
    defended = cli(
        *("defend", file, "--dataset", "digits", "--defense", "strip", "--victims", 1),
        *("--out", tmp_path / "defended", "--quiet"),
    )
    assert "origin unknown" in defended.stdout and " dc " not in defended.stdout
    folder = cli("evaluate", finished, *FEW, "--out", tmp_path / "folder")
    assert "recorded as digits · dc · IPC 1 · convnet · naive · tested on" in folder.stdout
    twin = cli("evaluate", finished / "control", *FEW, "--out", tmp_path / "twin")
    assert "convnet · no attack · tested on" in twin.stdout


def test_an_assumed_network_is_a_label(finished: Path, cli: Cli, tmp_path: Path) -> None:
    old = renamed(finished / "distilled.safetensors", tmp_path / "old.safetensors", None)
    done = cli("evaluate", old, "--dataset", "digits", *FEW, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "! the set's file names no network: convnet assumed, as published" in done.stdout


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({"network": "evil:Thing"}, "not trusted to name one"),
        ({"network": "nothing"}, "unknown network 'nothing'"),
        ({"network": "convnet", "norm": "evil"}, "norm"),
        ({"network": "convnet", "width": 10**9}, "recipe.network.width"),
        ({"network": "mlp", "width": 4096, "depth": 100}, "parameters"),
        ({"network": "convnet", "attack": "naive"}, "recipe.network.attack"),
        ({"width": 4}, "recipe.network.network"),
    ],
)
def test_wrong_networks_of_a_file(
    network: dict[str, Any],
    expected: str,
    finished: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = renamed(finished / "distilled.safetensors", Path("set.safetensors"), network)
    refused(cli("evaluate", file, "--dataset", "digits", *FEW, "--out", "out"), expected)
