"""The user's own classes, by ``package.module:Name``, and the messages for those that don't fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distillsec.attacks import ATTACKS
from distillsec.distill.networks.registry import (
    Network,
    NetworkSpec,
    UserNetwork,
    build_network,
    penultimate_linear,
)
from distillsec.distill.plugins import (
    installed_names,
    is_given,
    is_reference,
    load_object,
    look_up,
    objects_by_name,
    reference_to,
)
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import RequestError
from distillsec.eval.bench.options import make_defense
from distillsec.eval.config.catalogue import CATALOGUES, details
from distillsec.eval.config.schema import configure, find_attack

CIFAR = (3, 32, 32)


def build(reference: str, seed: int = 0, **parameters: Any) -> Network | UserNetwork:
    spec = NetworkSpec(network=reference, **parameters)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    return build_network(
        spec, image_shape=CIFAR, classes=10, preprocessing=Preprocessing(mean, std), seed=seed
    )


USERS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, image_shape, classes):
        super().__init__()
        channels, height, width = image_shape
        self.linear = nn.Linear(channels * height * width, classes)
    def forward(self, images):
        return self.linear(images.flatten(1))

class Embedding(Plain):
    def embed(self, images):
        return images.flatten(1)

class Outer:
    Inner = Embedding

class NoClasses(nn.Module):
    def __init__(self, image_shape):
        super().__init__()

class Grey(Plain):
    def __init__(self, image_shape, classes):
        super().__init__((1, 8, 8), classes)

class TooMany(Plain):
    def __init__(self, image_shape, classes):
        super().__init__(image_shape, classes + 1)

def no_module(image_shape, classes):
    return "a network"
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "users_networks_of_this_test"
    (tmp_path / f"{name}.py").write_text(USERS)
    (tmp_path / "broken_module_of_this_test.py").write_text("raise OSError('no\\nsuch disk')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_users_class(users_module: str) -> None:
    path, state = list(sys.path), torch.random.get_rng_state()
    network = build(f"{users_module}:Outer.Inner", seed=4)
    assert sys.path == path
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(network, UserNetwork)
    assert network.training
    images = torch.rand(2, *CIFAR)
    normalised = network.normalise(images)
    assert torch.equal(network(images), network.body(normalised))
    assert torch.equal(network.embed(images), normalised.flatten(1))
    again = build(f"{users_module}:Outer.Inner", seed=4)
    assert torch.equal(network(images), again(images))
    assert penultimate_linear(network) is None


def test_a_users_class_without_embed_says_so(users_module: str) -> None:
    network = build(f"{users_module}:Plain")
    with pytest.raises(RequestError, match="Plain lacks a method embed"):
        network.embed(torch.rand(2, *CIFAR))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoClasses", "cannot be called with image_shape=..., classes=..."),
        ("Grey", r"failed on \(3, 32, 32\): RuntimeError: .*mat1 and mat2"),
        ("TooMany", r"logits \(1, 10\) for one image; it is a TooMany with \(1, 11\)"),
        ("no_module", "failed on"),
        ("Missing", "module users_networks_of_this_test has no Missing"),
    ],
)
def test_a_users_class_that_does_not_fit(users_module: str, name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        build(f"{users_module}:{name}")
    assert "\n" not in str(refused.value)


def test_a_users_class_takes_no_parameters_of_ours(users_module: str) -> None:
    with pytest.raises(RequestError, match="has no parameter width; it takes none"):
        build(f"{users_module}:Plain", width=3)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("collections:OrderedDict:x", "is not of the form package.module:Name"),
        ("collections", "is not of the form package.module:Name"),
        (":Name", "is not of the form"),
        ("no_such_module_here:Name", "there is no module no_such_module_here"),
        ("broken_module_of_this_test:Name", "failed: OSError: no such disk$"),
    ],
)
def test_references_that_cannot_be_loaded(users_module: str, reference: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        load_object(reference, "attack")
    assert str(refused.value).startswith(f"attack {reference!r}")
    assert "\n" not in str(refused.value)


def test_references_and_names() -> None:
    assert load_object("collections.abc:Mapping.get", "attack").__name__ == "get"
    assert is_reference("package.module:Name")
    assert not is_reference("convnet-baadd")
    assert look_up("two", {"one": 1, "two": 2}, "number") == 2


# Entry points of installed packages -------------------------------------------------------------

POINTS = """
[distillsec.attacks]
mine = installed_mine:Mine
naive = installed_mine:Mine
broken = installed_mine:Missing

[distillsec.defenses]
guard = installed_mine:Guard
"""
PACKAGE = """
from distillsec.ext import FixedTriggerAttack, InputScorer, PoisoningOptions

class Mine(FixedTriggerAttack):
    "An attack of an installed package."
    name, Options = "mine", PoisoningOptions

class Guard(InputScorer):
    "A defense of an installed package."
    name = "guard"

    def score_inputs(self, view, images):
        return images.flatten(1).mean(dim=1)

    def threshold(self, view):
        return None
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with entry points, as an installer leaves it."""
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "installed_mine.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "installed_mine", raising=False)


@pytest.mark.usefixtures("installed")
def test_an_installed_package_adds_its_own() -> None:
    assert list(installed_names("attacks")) == ["mine", "naive", "broken"]
    assert "installed_mine" not in sys.modules
    assert find_attack("mine").__module__ == "installed_mine"
    assert configure(attack="mine", poison_rate=0.2).attack_class() is find_attack("mine")
    assert make_defense("guard", "quick", {}).name == "guard"


@pytest.mark.usefixtures("installed")
def test_the_catalogue_lists_what_an_installed_package_adds() -> None:
    rows = CATALOGUES["attacks"]()
    assert rows["mine"] == {"description": "of an installed package: installed_mine:Mine"}
    assert list(rows)[: len(ATTACKS)] == list(ATTACKS) and "options" in rows["naive"]
    assert "installed_mine" not in sys.modules
    assert details("attacks", "mine").text == "An attack of an installed package."


@pytest.mark.usefixtures("installed")
def test_an_installed_package_cannot_replace_the_suites_own() -> None:
    assert find_attack("naive") is ATTACKS["naive"]


@pytest.mark.usefixtures("installed")
def test_a_wrong_entry_point_is_one_line() -> None:
    with pytest.raises(RequestError, match="attack broken: its entry point installed_mine"):
        find_attack("broken")
    with pytest.raises(RequestError, match="did you mean mine"):
        find_attack("mime")


# Objects that are given --------------------------------------------------------------------------


def test_a_given_object_is_found_by_its_name_and_only_within() -> None:
    class Local:
        pass

    name = reference_to(Local)
    assert name == f"{__name__}:test_a_given_object_is_found_by_its_name_and_only_within.Local"
    assert reference_to(Local()) == name
    assert reference_to(lambda: 0).endswith(".lambda")
    with objects_by_name({name: Local}):
        with objects_by_name({"a:B": 1}):
            assert load_object(name, "thing") is Local and load_object("a:B", "thing") == 1
        assert is_given(name) and not is_given("a:B")
    with pytest.raises(RequestError):
        load_object(name, "thing")
