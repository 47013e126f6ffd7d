"""The command line: what it prints, where, and which layer of the configuration wins."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from distillsec import cli as module
from distillsec.attacks import ATTACKS
from distillsec.commands import runs
from distillsec.commands.exits import printable
from distillsec.defenses import DEFENSES
from distillsec.distill.backends import BACKENDS
from distillsec.distill.data.datasets import DATASETS
from distillsec.distill.files.formats import FORMATS
from distillsec.distill.files.spaces import SPACES
from distillsec.distill.networks.architectures import NETWORKS
from distillsec.distill.types import RunError
from distillsec.eval.config.catalogue import CATALOGUES
from distillsec.eval.config.presets import load_preset, preset_names
from distillsec.eval.results.record import read_record
from distillsec.eval.run.progress import Reporter

Cli = Callable[..., Result]
Options = Callable[..., list[str]]
COMMANDS = sorted(module.main.commands)


def test_json_is_the_record_and_nothing_else(finished: Path) -> None:
    said = (finished.parent / "stdout").read_text()
    assert json.loads(said) == json.loads((finished / "record.json").read_text())
    assert said.endswith("}\n") and said.count("\n") == said.rstrip().count("\n") + 1


def test_a_table_shows_the_rates_with_their_control_and_the_files(finished: Path, cli: Cli) -> None:
    done = cli("attack", "--resume", "--out", finished)
    assert done.exit_code == 0 and done.stderr == ""
    metrics = read_record(finished / "record.json").metrics
    rows = {
        "CTA": "clean_test_accuracy",
        "CTA, clean twin": "control_clean_test_accuracy",
        "ASR": "attack_success_rate",
        "ASR, control": "control_attack_success_rate",
        "backdoor gain": "backdoor_gain",
    }
    for title, name in rows.items():
        # Two victims: a mean, and no interval.
        assert re.search(rf"(?m)^  {title} +{metrics[name].mean:.3f}  (?!\[)", done.stdout)
    for name in ("record.json", "distilled.png", "trigger.png", "triggered.png", "curves.png"):
        assert str(finished / name) in done.stdout


def test_progress_goes_to_stderr_in_plain_lines_and_quiet_silences_it(
    cli: Cli, tiny_options: Options, tmp_path: Path
) -> None:
    words = ["attack", *tiny_options(victims=1)]
    loud = cli(*words, "--out", tmp_path / "loud")
    assert loud.exit_code == 0
    phases = ("distilling", "distilling the clean twin", "victims: convnet")
    assert all(f"{phase}: done in " in loud.stderr for phase in phases)
    assert "\r" not in loud.stderr and "done in" not in loud.stdout
    quiet = cli(*words, "--no-control", "--out", tmp_path / "quiet", "--quiet")
    assert quiet.stderr == "" and "ASR" in quiet.stdout


def test_the_default_folder_is_a_fresh_one_under_runs(
    cli: Cli, tiny_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("distill", *tiny_options(attack=None, poison_rate=None), "--json")
    assert done.exit_code == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"dc-clean-\d{8}-\d{6}", folder.name)
    assert json.loads(done.stdout) == json.loads((folder / "record.json").read_text())


def test_distill_is_clean_even_with_an_attacks_preset(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    few = ["--ipc", 1, "--iterations", 1, "--victims", 1, "--victim-epochs", 1, "--width", 4]
    done = cli("distill", "--preset", "digits-naive", *few, "--out", out, "--quiet")
    assert done.exit_code == 0, done.stderr
    record = read_record(out / "record.json")
    assert (record.kind, record.hooks, record.trigger) == ("distill", [], None)
    attack = {"attack", *ATTACKS["naive"].Options.model_fields}
    assert not attack & record.config.keys()
    assert record.metrics.keys() == {"clean_test_accuracy"}
    assert not (out / "control").exists() and not (out / "trigger.safetensors").exists()


# The configuration -------------------------------------------------------------------------------


def printed(cli: Cli, *words: object) -> dict[str, Any]:
    done = cli(*words, "--print-config")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


@pytest.mark.parametrize("command", ["attack", "distill"])
@pytest.mark.parametrize("preset", preset_names())
def test_a_printed_configuration_gives_itself(
    command: str, preset: str, cli: Cli, tmp_path: Path
) -> None:
    found = load_preset(preset)
    given = {**found["config"], **(found.get("attack_config", {}) if command == "attack" else {})}
    attacked = command == "attack" and "attack" not in given
    extra = ["--attack", "naive"] if attacked else []
    config = printed(cli, command, "--preset", preset, *extra)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert printed(cli, command, "--config", path) == config
    if given.get("victim_augment") == "none":  # as printed
        given = {**given, "victim_augment": ""}
    kept = given.keys() & config.keys()
    assert {key: config[key] for key in kept} == {key: given[key] for key in kept}
    assert ("attack" in config) == (command == "attack")


def test_later_layers_win(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("ipc: 2\nlr-img: 0.2\nwidth: 5\nvictims: 7\n")
    config = printed(
        cli,
        *("attack", "--preset", "digits-naive", "--config", path),
        *("--set", "width=6", "--set", "victims=8", "--set", "lr_net=1e-3"),
        *("--victims", 9, "--victim-network", "mlp", "--victim-network", "convnet"),
    )
    preset = load_preset("digits-naive")["config"]
    assert config["iterations"] == preset["iterations"] and config["ipc"] == 2
    assert (config["lr_img"], config["width"], config["victims"]) == (0.2, 6, 9)
    assert config["lr_net"] == 0.001 and config["victim_network"] == ["mlp", "convnet"]


def test_printing_the_configuration_starts_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed(cli, "attack", "--dataset", "cifar10", "--attack", "doorping", "--seeds", 5)
    assert not list(tmp_path.iterdir())


# Help, lists, version ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_in_the_help_is_a_command(command: str, cli: Cli) -> None:
    help_text = cli(command, "--help").stdout
    examples = re.findall(r"(?m)^ +distillsec (.+)$", help_text)
    assert len(examples) >= 2
    for example in examples:
        name, *words = shlex.split(example, comments=True)
        context = module.main.commands[name].make_context(name, words)
        assert context.params


def test_the_help_shows_a_first_command(cli: Cli) -> None:
    done = cli("--help")
    assert "distillsec attack --preset digits-naive" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)
    bare = cli()
    assert bare.exit_code == 2 and "Commands:" in bare.stderr


REGISTRIES = {
    "presets": preset_names(),
    "datasets": DATASETS,
    "backends": BACKENDS,
    "networks": NETWORKS,
    "attacks": ATTACKS,
    "defenses": DEFENSES,
    "formats": FORMATS,
    "spaces": SPACES,
}


@pytest.mark.parametrize("kind", CATALOGUES)
def test_lists(kind: str, cli: Cli) -> None:
    found = json.loads(cli("list", kind, "--json").stdout)
    assert list(found) == [kind] and list(found[kind]) == list(REGISTRIES[kind])
    text = cli("list", kind).stdout
    for name, row in found[kind].items():
        assert row["description"] and f"  {name}" in text and row["description"] in text
        for option in row.get("options", {}).values():
            assert option["description"]


@pytest.mark.parametrize("kind", CATALOGUES)
def test_details_of_an_entry(kind: str, cli: Cli) -> None:
    """All of the docstring, and each option with its type, bounds and default."""
    for name in list(REGISTRIES[kind])[:3]:
        done = cli("list", kind, name)
        assert done.exit_code == 0 and done.stdout.startswith(f"{name}\n"), done.stderr
        found = json.loads(cli("list", kind, name, "--json").stdout)
        words = " ".join(done.stdout.split())
        assert " ".join(found["text"].split()) in words
        for title, value in found["facts"].items():
            assert " ".join(f"{title} {value}".split()) in words
        for option in found["options"]:
            assert option["description"] and option["kind"]
            parts = [option[key] for key in ("key", "kind", "allowed", "default", "description")]
            assert " ".join(" ".join(parts).split()) in words


def test_the_types_and_bounds_of_options(cli: Cli) -> None:
    found = json.loads(cli("list", "attacks", "naive", "--json").stdout)["options"]
    options = {each["key"]: each for each in found}
    expected = {
        "target": ("integer", "≥ 0", "0"),
        "poison_rate": ("number", "> 0, ≤ 1", "0.01"),
        "target_share": ("number", "> 0, < 1", "none"),
        "goal": ("choice", "all-to-one, one-to-one, all-to-all", "all-to-one"),
        "trigger_image": ("text", "", "none"),
    }
    for key, parts in expected.items():
        assert tuple(options[key][part] for part in ("kind", "allowed", "default")) == parts


def test_an_unknown_entry_is_one_line(cli: Cli) -> None:
    done = cli("list", "defenses", "stripp")
    assert done.exit_code == 2 and "did you mean strip" in done.stderr
    own = cli("list", "attacks", "distillsec.attacks.naive:Naive")
    assert own.exit_code == 0 and "poison_rate" in own.stdout


def test_all_lists_at_once(cli: Cli) -> None:
    text = cli("list").stdout
    assert [kind for kind in CATALOGUES if f"{kind}\n" in text] == list(CATALOGUES)
    assert list(json.loads(cli("list", "--json").stdout)) == list(CATALOGUES)


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert done.exit_code == 0
    assert re.fullmatch(r"distillsec, version \S+\n", done.stdout)


# Exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("it\nbroke"), 1, "distillsec: the run failed: it broke\n"),
        (KeyboardInterrupt(), 1, "distillsec: stopped\n"),
        (MemoryError(), 1, "distillsec: out of memory: a smaller --width"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "distillsec: out of mem"),
        (OSError(28, "No space left on device"), 1, "No space left on device\n"),
        (OSError(13, "Permission denied"), 2, "Permission denied\n"),
    ],
)
def test_failures_are_one_line(
    error: BaseException,
    code: int,
    line: str,
    cli: Cli,
    tiny_options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(runs, "run_cell", fail)
    done = cli("attack", *tiny_options(), "--out", tmp_path / "run")
    assert done.exit_code == code and done.stdout == ""
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_a_fault_of_the_suite_itself_keeps_its_traceback(
    cli: Cli, tiny_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run_cell", lambda *_, **__: 1 / 0)
    done = cli("attack", *tiny_options(), "--out", tmp_path / "run")
    assert isinstance(done.exception, ZeroDivisionError)


def test_a_closed_stdout_is_no_fault() -> None:
    """As after ``distillsec list | head -1``."""
    code = "from distillsec.cli import main; main(['list'])"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        assert done.stdout is not None and done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 0


class Full(io.StringIO):
    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_progress_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        with Reporter().phase("phase", 2) as phase:
            phase.side("side", 1, 1)
            phase.reach(2)
        Reporter().say("a line")


def test_the_disk_is_full(
    cli: Cli, tiny_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = cli("attack", *tiny_options(), "--out", tmp_path / "run", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith("distillsec: the disk is full: cannot write ")


def test_what_could_control_a_terminal_is_escaped() -> None:
    assert printable("a\x1b[2J\tb\n\u202e–") == "a\\x1b[2J\tb\n\\u202e–"
