"""Every backend end to end: a clean run and an attack, their records, sets and recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from distillsec.distill.backends import BACKENDS
from distillsec.distill.data.registry import load_dataset
from distillsec.distill.files.artifact import load_set
from distillsec.distill.training import accuracy
from distillsec.distill.types import RequestError
from distillsec.eval.config.layers import for_clean, gather
from distillsec.eval.config.presets import load_preset, preset_names
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.results.record import read_record
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.setup import prepare
from distillsec.eval.run.victims import train_victim

DISTILLING = [name for name, backend in BACKENDS.items() if not backend.keeps_rows]

Tiny = Callable[..., Config]
Cli = Callable[..., Result]
QUIET = Reporter(quiet=True)

EXPERTS = {"experts": 2, "train_epochs": 2, "expert_lr": 0.05, "max_start_epoch": 2}
STUDENTS = {"student_steps": 2, "expert_epochs": 1, "lr_img": 10.0, "lr_rate": 1e-4}
# What each backend needs to run in a second; a missing backend is an error.
SETTINGS: dict[str, dict[str, Any]] = {
    "dc": {},
    "dsa": {"victim_augment": "crop_scale"},
    "dm": {"batch_real": 32},
    "mtt": {**EXPERTS, **STUDENTS, "victim_augment": "none"},
    "dd": {"batch_real": 64, "lr_img": 0.05, "victim_epochs": None},
}


# One attack for each backend; tests/attacks has all pairs.
MOVING = {"attack": "doorping", "objective": "target-logit", "trigger_steps": 2}
ATTACKED: dict[str, dict[str, Any]] = {"dc": {}, "dsa": {}, "dm": {}, "mtt": MOVING, "dd": MOVING}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("backend", DISTILLING)
def test_an_attack_end_to_end(tiny: Tiny, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "run"
    config = tiny(backend=backend, **SETTINGS[backend], **ATTACKED[backend])
    record = run_cell(config, out, reporter=QUIET)
    assert (record.kind, record.status, record.error) == ("attack", "done", None)
    rates = {"clean_test_accuracy", "attack_success_rate", "backdoor_gain"}
    assert rates | {"control_attack_success_rate"} <= record.metrics.keys()
    assert all(value is not None for value in record.metrics["attack_success_rate"].values)
    distilled, twin = (load_set(out / f"{part}distilled.safetensors") for part in ("", "control/"))
    assert distilled.batch.images.shape == (10, 1, 8, 8)
    assert (distilled.batch.images - twin.batch.images).abs().max() > 1e-3
    assert record.recipe == distilled.recipe.describe()
    expected = read_record(out / "control" / "record.json").recipe
    assert expected == as_json(twin.recipe.describe())
    rows = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3] and all(row["loss"] > 0 for row in rows)
    assert record.attack_counters["poisoned_rows"] == 130
    assert (out / "experts").exists() == (backend == "mtt")
    words = (out / "distilled.safetensors").read_bytes().lower()
    assert not [word for word in (b"trigger", b"poison", b"attack", b"expert") if word in words]


@pytest.mark.parametrize("backend", DISTILLING)
def test_the_set_file_alone_gives_the_same_victims(
    tiny: Tiny, tmp_path: Path, backend: str
) -> None:
    clean = {"attack": None, "poison_rate": None}
    config = tiny(backend=backend, **clean, **SETTINGS[backend])
    record = run_cell(config, tmp_path / "run", reporter=QUIET)
    assert record.kind == "distill" and record.metrics.keys() == {"clean_test_accuracy"}
    received = load_set(tmp_path / "run" / "distilled.safetensors")
    setup = prepare(config)
    network = setup.primary_network
    victims = [train_victim(received, network, setup.streams, n) for n in range(2)]
    found = [accuracy(victim, load_dataset("digits").test) for victim in victims]
    assert record.metrics["clean_test_accuracy"].values == pytest.approx(found, abs=1e-9)


# Recipes -----------------------------------------------------------------------------------------


def test_overrides_win_over_the_learned_recipe(tiny: Tiny, tmp_path: Path) -> None:
    clean = {"attack": None, "poison_rate": None, "victims": 1}
    found = {}
    wishes: dict[str, dict[str, Any]] = {
        "mtt": {},
        "mtt, rate": {"victim_lr": 0.3},
        "dd": {},
        "dd, epochs": {"victim_epochs": 2, "victim_augment": "crop"},
        "dd, rate": {"victim_lr": 0.3},
        "dd, fixed": {"student_init": "fixed"},
    }
    for name, changes in wishes.items():
        backend = name.split(",")[0]
        config = tiny(backend=backend, **{**clean, **SETTINGS[backend], **changes})
        run_cell(config, tmp_path / name, reporter=QUIET)
        found[name] = load_set(tmp_path / name / "distilled.safetensors").recipe
    assert found["mtt"].lr != 0.01 and abs(found["mtt"].lr - 0.01) < 0.01
    assert (found["mtt"].epochs, found["mtt"].steps) == (3, ())
    assert found["mtt, rate"].lr == 0.3
    # One image a class: one group, three passes.
    assert [step.rows for step in found["dd"].steps] == [tuple(range(10))] * 3
    assert found["dd"].initial is None and found["dd, fixed"].initial is not None
    assert found["dd, epochs"].steps == found["dd, rate"].steps == ()
    assert (found["dd, epochs"].epochs, found["dd, epochs"].augment) == (2, "crop")
    assert found["dd, rate"].lr == 0.3


def test_backends_give_victims_their_published_recipe() -> None:
    found = {
        name: (c.victims.victim_epochs, c.victims.victim_lr, c.victims.victim_augment)
        for name in DISTILLING
        for c in [configure(dataset="cifar10", backend=name, device="cpu")]
    }
    siamese = "color_crop_cutout_flip_scale_rotate"
    assert found == {
        "dc": (300, 0.01, ""),
        "dsa": (1000, 0.01, siamese),
        "dm": (1000, 0.01, siamese),
        "mtt": (1000, None, siamese),
        "dd": (None, None, ""),
    }
    digits = configure(dataset="digits", backend="mtt", device="cpu")
    assert digits.victims.victim_augment == "color_crop_cutout_scale_rotate"
    assert digits.backend.model_dump()["augment"] == digits.victims.victim_augment


def test_an_impossible_backend_option_is_refused_and_nothing_written(
    tiny: Tiny, tmp_path: Path
) -> None:
    for changes, expected in (
        ({"backend": "dd", "per_step": 2, "ipc": 3}, "IPC 3 is no multiple"),
        ({"backend": "mtt", "train_epochs": 2}, "train_epochs is 2"),
        ({"zca": True, "image_size": 80}, "at most 4096 can be whitened"),
    ):
        with pytest.raises(RequestError, match=expected) as refused:
            run_cell(tiny(**changes), tmp_path / "run", reporter=QUIET)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "run").exists()


# Presets and lists -------------------------------------------------------------------------------


CLEAN = [name for name in preset_names() if "attack_config" in load_preset(name)]


def test_every_backend_has_a_preset() -> None:
    used = {load_preset(name)["config"].get("backend", "dc") for name in preset_names()}
    assert used == set(BACKENDS)
    assert {f"digits-{name}" for name in ("dm", "mtt", "dd")} <= set(CLEAN)


@pytest.mark.parametrize("name", CLEAN)
def test_attack_config_of_a_clean_preset_needs_an_attack(name: str) -> None:
    preset = load_preset(name)
    extra, own = preset["attack_config"], preset["config"]
    assert extra and "attack" not in own
    assert gather(preset=name) == own
    assert for_clean(gather(preset=name)).attack is None
    attacked = gather(preset=name, options={"attack": "doorping"})
    assert attacked == {**own, **extra, "attack": "doorping"}
    resolved = configure(**attacked).flat()
    assert {key: resolved[key] for key in extra} == extra
    # A key from any later layer wins over it.
    for layer in ({"settings": ["trigger_size=1"]}, {"options": {"trigger_size": 1}}):
        said: Any = {"settings": [], "options": {}, **layer}
        said["options"] = {**said["options"], "attack": "doorping"}
        assert gather(preset=name, **said)["trigger_size"] == 1


def test_a_preset_of_another_attack_gives_what_the_chosen_one_has() -> None:
    preset = load_preset("digits-naive")["config"]
    keys = gather(preset="digits-naive", options={"attack": "blended"})
    assert "trigger_size" in preset and "trigger_size" not in keys
    assert keys["poison_rate"] == preset["poison_rate"]
    assert configure(**keys).attack == "blended"
    # A foreign key that is not the preset's is still refused.
    given = {"attack": "blended", "trigger_size": 3}
    with pytest.raises(RequestError, match="trigger_size is an option of"):
        configure(**gather(preset="digits-naive", options=given))


def test_the_list_of_backends_says_what_they_cost_and_need(cli: Cli) -> None:
    rows = json.loads(cli("list", "backends", "--json").stdout)["backends"]
    for name, backend in BACKENDS.items():
        text = " ".join(cli("list", "backends", name).stdout.split())
        assert rows[name]["cost"] == backend.cost and rows[name]["needs"] == backend.needs
        assert backend.cost and f"cost {backend.cost}" in text
        assert backend.needs and f"needs {backend.needs}" in text
        assert rows[name]["options"]["iterations"]["description"]


def test_the_learning_curve_uses_the_current_recipe(tiny: Tiny, tmp_path: Path) -> None:
    clean = {"attack": None, "poison_rate": None, "victims": 1, "curve_every": 1}
    for backend in ("mtt", "dd"):
        out = tmp_path / backend
        run_cell(tiny(backend=backend, **clean, **SETTINGS[backend]), out, reporter=QUIET)
        rows = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
        final = read_record(out / "record.json").metrics["clean_test_accuracy"].values[0]
        assert rows[-1]["clean_test_accuracy"] == pytest.approx(final)
        assert torch.get_num_threads() == 1
