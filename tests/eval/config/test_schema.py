"""The configuration: flat keys, one-line refusals, hashes that tell runs apart."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args

import joblib
import pytest
import torch
from pydantic import BaseModel, ValidationError

from distillsec.attacks import ATTACKS
from distillsec.distill.backends import BACKENDS
from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.run.setup import prepare

DOORPING: dict[str, Any] = {"attack": "doorping", "backend": "dsa", "ipc": 3, "device": "cpu"}
RICH: list[dict[str, Any]] = [
    {},
    {"backend": "dsa"},
    {"backend": "dsa", "dataset": "cifar10", "augment": "flip_crop", "victim_augment": "none"},
    {"attack": "naive", "target_share": 0.25, "trigger_range": "unbounded", "seed": 9},
    {"attack": "doorping", "objective": "student", "update_every": 5, "freeze_at": 0.25},
    {"network": "mlp", "width": 32, "victim_network": ["lenet", "mlp"], "threads": 1},
]


@pytest.mark.parametrize("keys", RICH)
def test_flat_keys_make_the_same_configuration_again(keys: dict[str, Any]) -> None:
    config = configure(**keys)
    flat = config.flat()
    assert configure(**flat) == config
    assert configure(**flat).key() == config.key()
    for key, value in keys.items():
        if key != "victim_augment":
            assert flat[key] == value
    assert ("attack" in flat) == ("attack" in keys)


def test_none_means_not_given() -> None:
    assert configure(ipc=None, attack=None) == configure()


def test_one_victim_network_needs_no_list() -> None:
    assert configure(victim_network="lenet") == configure(victim_network=["lenet"])


def test_a_configuration_is_frozen() -> None:
    config = configure()
    with pytest.raises(ValidationError, match="frozen"):
        config.set.ipc = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.attack = "naive"  # type: ignore[misc]


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"icp": 3}, "there is no configuration key 'icp'; did you mean ipc?"),
        ({"zzzz": 3}, "there is no configuration key 'zzzz'; --print-config lists the keys"),
        ({"alpha": 3}, "alpha is an option of doorping, .*blended, not of"),
        ({"attack": "naive", "alpha": 3}, "alpha is an option of doorping, .*blended, not of"),
        ({"augment": "flip"}, "augment is an option of dsa, dm, mtt, not of what was chosen"),
        ({"attack": "dorping"}, "unknown attack 'dorping'; there are .*did you mean doorping"),
        ({"backend": "cd"}, "unknown backend 'cd'; there are dc, dsa"),
        ({"dataset": "digit"}, "digit.*did you mean digits"),
        ({"attack": 5}, "attack: expected a name, got 5"),
        ({"backend": ["dc"]}, r"backend: expected a name, got \['dc'\]"),
        ({"augment": "flp", "backend": "dsa"}, "unknown augmentation 'flp'; .*did you mean flip"),
        ({"victim_augment": "crop_flp"}, "unknown augmentation 'flp'; .*did you mean flip"),
    ],
)
def test_unknown_names_and_keys(keys: dict[str, Any], expected: str) -> None:
    refused(keys, expected)


def refused(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError, match=expected) as caught:
        configure(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("ipc", 0, "greater than or equal to 1"),
        ("ipc", 1.5, "integer"),
        ("ipc", "many", "integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("victims", 0, "greater than or equal to 1"),
        ("iterations", 0, "greater than or equal to 1"),
        ("lr_img", 0, "greater than 0"),
        ("lr_img", float("nan"), "finite"),
        ("momentum_img", 1, "less than 1"),
        ("outer_loop", 0, "greater than or equal to 1"),
        ("init", "zeros", "'noise', 'real' or 'poisoned'"),
        ("distance", "l1", "'layerwise', 'mse' or 'cos'"),
        ("clip_pixels", "perhaps", "boolean"),
        ("poison_rate", 0, "greater than 0"),
        ("poison_rate", 1.5, "less than or equal to 1"),
        ("poison_rate", -0.1, "greater than 0"),
        ("target", -1, "greater than or equal to 0"),
        ("target_share", 1, "less than 1"),
        ("trigger_size", 0, "greater than or equal to 1"),
        ("trigger_range", "wide", "'pixel' or 'unbounded'"),
        ("trigger_position", "middle", "'top-left' or 'center'"),
        ("objective", "neurons", "'neuron', 'neuron-reference', 'target-logit' or 'student'"),
        ("alpha", float("inf"), "finite number"),
        ("victim_lr", float("inf"), "finite number"),
        ("freeze_at", 1.1, "less than or equal to 1"),
        ("depth", 0, "greater than or equal to 1"),
        ("norm", "l2", "'instance', 'batch'"),
        ("threads", 5000, "less than or equal to 1024"),
        ("image_size", 3, "greater than or equal to 4"),
        ("victim_network", 3, "tuple"),
        ("ipc", 10_001, "less than or equal to 10000"),
        ("dataset", 3, "string"),
    ],
)
def test_an_impossible_value_is_refused_in_one_line(key: str, value: Any, allowed: str) -> None:
    keys = {"attack": "doorping", key: value}
    refused(keys, f"^{key}: .*{re.escape(allowed)}.*, got {re.escape(repr(value))}$")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0:1", "CPU", "mps:0"])
def test_an_unknown_device_is_refused(device: str) -> None:
    refused({"device": device}, f"device must be auto, cpu, cuda, cuda:N or mps, got '{device}'")


def test_a_missing_device_is_refused_on_the_machine_that_runs() -> None:
    config = configure(device="cuda:99")  # it may be run elsewhere
    with pytest.raises(RequestError, match=r"no cuda:99 here: [0-9]+ CUDA devices were found"):
        prepare(config)


def test_mps_is_a_device_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configure(device="mps").run.device == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RequestError, match="there is no mps here"):
        prepare(configure(device="mps"))


# Resolving -------------------------------------------------------------------------------------


def test_device_and_threads_are_resolved() -> None:
    run = configure().run
    assert run.device in ("cpu", "cuda")
    assert run.threads == joblib.cpu_count()
    assert configure(threads=3).run.threads == 3


def test_speed_and_precision_are_the_device_s_own() -> None:
    on_cpu, on_gpu = configure(device="cpu").run, configure(device="cuda:1").run
    assert (on_cpu.speed, on_cpu.precision) == ("plain", "float32")
    assert (on_gpu.speed, on_gpu.precision) == ("fast", "tf32")
    given = configure(device="cuda", speed="plain", precision="float32").run
    assert (given.speed, given.precision) == ("plain", "float32")


def test_the_fast_path_is_part_of_the_identity_and_the_plain_one_changes_no_hash() -> None:
    plain = configure(device="cpu", threads=1)
    assert not {"speed", "precision", "deterministic"} & plain.flat().keys()
    others: list[dict[str, Any]] = [
        {"speed": "fast"},
        {"speed": "fast", "precision": "bf16"},
        {"deterministic": True},
    ]
    found = [configure(device="cpu", threads=1, **other) for other in others]
    assert len({plain.key(), *(each.key() for each in found)}) == len(others) + 1
    assert [configure(**each.flat()) for each in found] == found


def test_a_gpu_s_configuration_says_its_speed() -> None:
    for speed in ("plain", "fast"):
        config = configure(device="cuda", threads=1, speed=speed)
        assert config.flat()["speed"] == speed and configure(**config.flat()) == config


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"device": "cpu", "precision": "tf32"}, "precision tf32 is a GPU's: cpu takes"),
        ({"device": "cuda", "speed": "plain", "precision": "bf16"}, "bf16 needs the fast path"),
        ({"speed": "quick"}, "speed: input should be 'plain' or 'fast'"),
    ],
)
def test_a_precision_that_the_path_lacks_is_refused(keys: dict[str, Any], said: str) -> None:
    refused(keys, said)


def test_the_published_recipes_come_with_the_backend() -> None:
    dc, dsa = configure().victims, configure(backend="dsa", dataset="cifar10").victims
    assert (dc.victim_epochs, dc.victim_augment) == (300, "")
    assert (dsa.victim_epochs, dsa.victim_augment) == (1000, "color_crop_cutout_flip_scale_rotate")
    own = configure(backend="dsa", victim_epochs=7, victim_augment="none").victims
    assert (own.victim_epochs, own.victim_augment) == (7, "")


@pytest.mark.parametrize(
    ("dataset", "flips"),
    [("digits", False), ("mnist", False), ("svhn", False), ("cifar10", True), ("stl10", True)],
)
def test_flips_are_dropped_where_they_change_the_label(dataset: str, flips: bool) -> None:
    config = configure(backend="dsa", dataset=dataset)
    operations = "color_crop_cutout_flip_scale_rotate"
    expected = operations if flips else operations.replace("flip_", "")
    assert config.flat()["augment"] == config.victims.victim_augment == expected


def test_given_flips_stay() -> None:
    config = configure(backend="dsa", dataset="digits", augment="flip", victim_augment="flip")
    assert config.flat()["augment"] == config.victims.victim_augment == "flip"


# Keys ------------------------------------------------------------------------------------------


def another(model: BaseModel, name: str) -> BaseModel:
    """``model`` with some other valid value in field ``name``."""
    old = getattr(model, name)
    annotated = get_args(type(model).model_fields[name].annotation)
    literals = [*annotated, *(inner for part in annotated for inner in get_args(part))]
    candidates: list[Any] = [1, 2, 16, 0.125, *(x for x in literals if isinstance(x, str))]
    candidates = [not old, ("lenet",), "crop", *candidates]
    for value in candidates:
        try:
            changed = type(model).model_validate({**model.model_dump(), name: value})
        except ValidationError:
            continue
        if getattr(changed, name) != old:
            return changed
    raise AssertionError(f"no other value for {name}")


SECTIONS = ("data", "network", "set", "backend", "attack_options", "victims", "run")
FIELDS = [
    (section, name)
    for section in SECTIONS
    for name in type(getattr(configure(**DOORPING), section)).model_fields
]


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_keys_change_with_every_field(section: str, name: str) -> None:
    config: Config = configure(**DOORPING)
    changed = config.model_copy(update={section: another(getattr(config, section), name)})
    assert changed.key() != config.key()
    of_the_attack = section == "attack_options" or name == "control"
    assert (changed.control_key() == config.control_key()) is of_the_attack


def test_every_attack_shares_the_clean_twin() -> None:
    keys = {configure(attack=name).control_key() for name in ATTACKS}
    assert keys == {configure().control_key()} == {configure(control=False).control_key()}
    assert configure().control_key() == configure(control=False).key()
    assert len({configure(attack=name).key() for name in ATTACKS} | keys) == len(ATTACKS) + 1
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"ipc": 2},
        {"lr_img": 0.2},
        {"backend": "dsa"},
        {"threads": 7},
    ]
    found = {configure(attack="naive", **other).control_key() for other in others}
    assert len(found | keys) == len(others) + 1


def test_a_twin_is_the_configuration_without_its_attack() -> None:
    config = configure(**DOORPING)
    twin = config.without_attack()
    assert (twin.attack, twin.attack_options, twin.victims.control) == (None, None, False)
    kept = {key: value for key, value in twin.flat().items() if key != "control"}
    assert kept.items() <= config.flat().items()
    assert configure(**twin.flat()) == twin
    assert twin.key() == config.control_key()
    with pytest.raises(RequestError, match="has no attack"):
        twin.attack_class()


# A user's own ----------------------------------------------------------------------------------

OWN = """
from pydantic import Field
from distillsec.attacks import PatchOptions, PoisoningAttack, PoisoningOptions

class Options(PatchOptions, PoisoningOptions):
    strength: float = Field(1.0, gt=0)

class Mine(PoisoningAttack):
    name = "mine"
    Options = Options
"""


def test_a_users_own_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_attack_of_test_config.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    name = "own_attack_of_test_config:Mine"
    try:
        config = configure(attack=name, strength=2, target=1)
        assert config.attack_class().__name__ == "Mine"
        flat = config.flat()
        assert (flat["attack"], flat["strength"], flat["target"]) == (name, 2, 1)
        assert configure(**flat) == config
        assert config.key() != configure(attack=name, strength=3, target=1).key()
        assert config.control_key() == configure().control_key()
        refused({"attack": name, "strength": 0}, "^strength: .*greater than 0, got 0$")
        refused({"attack": name, "strenth": 1}, "no configuration key.*did you mean strength")
        refused({"attack": "own_attack_of_test_config:Options"}, "is not a subclass of .*Attack")
    finally:
        sys.modules.pop("own_attack_of_test_config", None)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_by_reference(name: str) -> None:
    backend = BACKENDS[name]
    reference = f"{backend.__module__}:{backend.__name__}"
    assert configure(backend=reference).backend_class() is backend
