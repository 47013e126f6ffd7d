"""An interceptor's attack on a finished set: its run folder, and what it never reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from distillsec.distill.data.registry import ImageSet, load_dataset
from distillsec.distill.files.artifact import load_set, load_trigger
from distillsec.distill.files.safe import read_json, write_json
from distillsec.eval.report.load import load_experiment
from distillsec.eval.results.record import read_record

Cli = Callable[..., Result]
Options = Callable[..., list[str]]
QUICK = [
    part
    for key, value in {
        "poison_steps": 4,
        "archetypes": 3,
        "archetype_steps": 2,
        "archetype_networks": 2,
        "unroll_warmup": 3,
        "unroll_least": 0,
        "unroll_steps": 2,
        "images_per_update": 16,
    }.items()
    for part in ("--set", f"{key}={value}")
]
ATTACK = ["--attack", "poisoned-set", *QUICK]
FEW = ["--victims", 2, "--victim-epochs", 3, "--threads", 1, "--quiet"]
FILES = ("record.json", "distilled.safetensors", "trigger.safetensors", "progress.jsonl")
PICTURES = ("distilled.png", "trigger.png", "triggered.png", "curves.png", "archetypes.png")


@pytest.fixture(scope="module")
def clean(finished: Path) -> Path:
    """A clean set, as its twin's run folder."""
    return finished / "control"


@pytest.fixture(scope="module")
def poisoned(clean: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished attack on the clean set."""
    out = tmp_path_factory.mktemp("intercepted") / "run"
    done = cli("attack", "--on", clean, *ATTACK, *FEW, "--out", out)
    assert done.exit_code == 0, done.stderr
    return out


def test_it_is_a_run_like_any_other(poisoned: Path, clean: Path) -> None:
    assert all((poisoned / name).is_file() for name in (*FILES, *PICTURES))
    record = read_record(poisoned / "record.json")
    assert (record.kind, record.status) == ("attack", "done")
    assert record.hooks == [{"name": "poisoned-set", "threat_model": "interceptor"}]
    assert record.attack_counters["attack_updates"] == 4
    assert record.config["attack"] == "poisoned-set" and record.config["poison_steps"] == 4
    assert record.distilled["source"] == str(clean) and record.distilled["fingerprint"]
    assert record.distilled["rms_from_twin"] > 0
    assert {"attack_success_rate", "control_attack_success_rate"} <= record.metrics.keys()
    assert load_experiment(poisoned).kind == "attack"


def test_the_twin_is_the_received_set(poisoned: Path, clean: Path) -> None:
    """To the bit; the attacked set has its other rows, its labels and its classes."""
    given, twin, made = (
        load_set(place / "distilled.safetensors")
        for place in (clean, poisoned / "control", poisoned)
    )
    assert torch.equal(twin.batch.images, given.batch.images)
    same = (made.batch.images == given.batch.images).flatten(1).all(1)
    assert same.tolist() == [label != 0 for label in given.batch.labels.tolist()]
    assert torch.equal(made.batch.labels, given.batch.labels) and made.classes == given.classes
    assert made.recipe == twin.recipe
    own = read_record(poisoned / "record.json").metrics["control_clean_test_accuracy"]
    assert own == read_record(clean / "record.json").metrics["clean_test_accuracy"]


def test_it_is_evaluated_and_defended(poisoned: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("evaluate", poisoned, *FEW, "--out", tmp_path / "evaluated")
    assert done.exit_code == 0, done.stderr
    again, first = (read_record(p / "record.json") for p in (tmp_path / "evaluated", poisoned))
    assert again.metrics == first.metrics
    assert "poisoned-set" in again.distilled["origin"]
    words = ("--defense", "strip", "--victims", 1, "--threads", 1, "--quiet")
    done = cli("defend", poisoned, *words, "--out", tmp_path / "defended")
    assert done.exit_code == 0, done.stderr
    assert (
        "control_auroc"
        in read_record(tmp_path / "defended" / "record.json").defenses["strip"].metrics
    )
    done = cli("report", poisoned, "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.stderr


def test_a_file_gives_the_same_bits(poisoned: Path, clean: Path, cli: Cli, tmp_path: Path) -> None:
    file, out = clean / "distilled.safetensors", tmp_path / "run"
    done = cli("attack", "--on", file, "--dataset", "digits", *ATTACK, *FEW, "--out", out)
    assert done.exit_code == 0, done.stderr
    for name in ("distilled.safetensors", "trigger.safetensors"):
        assert (out / name).read_bytes() == (poisoned / name).read_bytes()
    assert "origin unknown" in done.stdout and "poisoned-set" in done.stdout
    assert not {"backend", "ipc"} & read_record(out / "record.json").config.keys()


def test_training_images_are_never_read(
    poisoned: Path, clean: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing but NaN and wrong labels in their place, the attack gives the same bits."""

    def spoiled(*arguments: Any, **options: Any) -> ImageSet:
        data: ImageSet = load_dataset(*arguments, **options)
        images = torch.full_like(data.train.images, torch.nan)
        labels = torch.full_like(data.train.labels, -1)
        return dataclasses.replace(data, train=data.train.replace(images=images, labels=labels))

    monkeypatch.setattr("distillsec.eval.run.setup.load_dataset", spoiled)
    done = cli("attack", "--on", clean, *ATTACK, *FEW, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    for name in ("distilled.safetensors", "trigger.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (poisoned / name).read_bytes()
    wanted = read_record(poisoned / "record.json").metrics
    assert read_record(tmp_path / "run" / "record.json").metrics == wanted


def test_another_projects_file(clean: Path, cli: Cli, tmp_path: Path) -> None:
    batch = load_set(clean / "distilled.safetensors").batch
    pair = [(batch.images - batch.images.mean()) / batch.images.std(), batch.labels]
    torch.save({"data": [pair, pair]}, tmp_path / "set.pt")
    words = ("--on", tmp_path / "set.pt", "--set-number", 1, "--dataset", "digits")
    small = ("--set", "network=convnet", "--width", 4, "--depth", 1, "--target", 3)
    done = cli("attack", *words, *small, *ATTACK, *FEW, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    _, info = load_trigger(tmp_path / "run" / "trigger.safetensors")
    assert (info["target"], info["target_class"]) == (3, "3")


def test_an_attacked_set_can_be_attacked(finished: Path, cli: Cli, tmp_path: Path) -> None:
    """Nothing of the first attack is taken over but the set."""
    done = cli("attack", "--on", finished, *ATTACK, *FEW, "--no-control", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    record = read_record(tmp_path / "run" / "record.json")
    assert "poison_rate" not in record.config and record.control is None
    assert "naive" in record.distilled["origin"]
    assert "control_attack_success_rate" not in record.metrics


# Resuming ----------------------------------------------------------------------------------------


def test_a_finished_run_is_shown(poisoned: Path, clean: Path, cli: Cli) -> None:
    for words in ((), ("--on", clean, *ATTACK, *FEW)):
        done = cli("attack", *words, "--out", poisoned, "--resume")
        assert done.exit_code == 0 and "poisoned-set" in done.stdout


def test_a_run_on_another_set_is_not_resumed(
    poisoned: Path, finished: Path, cli: Cli, tmp_path: Path
) -> None:
    write_json(tmp_path / "record.json", {})
    record = read_json(poisoned / "record.json")
    record["distilled"]["fingerprint"] = "another"
    write_json(tmp_path / "record.json", record)
    clean = finished / "control"
    done = cli("attack", "--on", clean, *ATTACK, *FEW, "--out", tmp_path, "--resume")
    assert done.exit_code == 2 and "was run on another set" in done.stderr


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--attack", "naive"), "--on is for attacks on a finished set (poisoned-set), not for"),
        ((), "not for a run without an attack"),
        (("--attack", "poisoned-set", "--seeds", 2), "--seeds is for attacks that distil"),
        (("--attack", "poisoned-set", "--buffer", "x"), "--buffer is for"),
        (("--attack", "poisoned-set", "--control-run", "x"), "--control-run is for"),
        (("--attack", "poisoned-set", "--image-size", 16), "don't fit digits"),
        (("--attack", "poisoned-set", "--target", 10), "target 10 is no class"),
        (("--attack", "poisoned-set", "--trigger-size", 9), "does not fit 8×8 images"),
        (("--attack", "poisoned-set", "--poison-rate", 0.1), "poison_rate is an option of"),
        (
            ("--attack", "poisoned-set", "--set", "unroll_warmup=9"),
            "unroll_least is 50, at most unroll_warmup, 9",
        ),
        (("--attack", "poisoned-set", "--set-number", 1), "holds one set: there is no set 1"),
    ],
)
def test_what_is_refused(
    words: tuple[object, ...], expected: str, clean: Path, cli: Cli, tmp_path: Path
) -> None:
    done = cli("attack", "--on", clean, *words, "--quiet", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert expected in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "attack poisoned-set takes a finished set: name it with --on FILE"),
        (
            ("--set-number", 1),
            "--set-number, --space, --factor and --labels are for a received set",
        ),
    ],
)
def test_it_needs_a_set(
    words: tuple[object, ...], expected: str, cli: Cli, tiny_options: Options, tmp_path: Path
) -> None:
    keys = tiny_options(attack="poisoned-set", poison_rate=None)
    done = cli("attack", *keys, *words, "--out", tmp_path / "out")
    assert done.exit_code == 2 and expected in done.stderr
    assert not (tmp_path / "out").exists()
