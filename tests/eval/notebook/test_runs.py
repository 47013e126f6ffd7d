"""Runs from Python: keywords win over a preset, and objects stand where a name is taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distillsec
from distillsec import ReadingOptions, ext
from distillsec.attacks import Naive
from distillsec.defenses.inputs.strip import Strip
from distillsec.eval.results.run_table import run_table

SMALL: dict[str, Any] = {
    "ipc": 1,
    "iterations": 2,
    "victims": 1,
    "victim_epochs": 2,
    "threads": 1,
    "quiet": True,
}
NETWORK = distillsec.network("convnet", width=4, depth=1)


class Corner(ext.FixedTriggerAttack):
    """A white corner."""

    name, Options = "corner", ext.PoisoningOptions

    def make_trigger(self) -> ext.Trigger:
        white = torch.ones(self.data.image_shape)
        mask = torch.zeros(1, *self.data.image_shape[1:])
        mask[0, 0, 0] = 1
        return ext.PatchTrigger(pattern=white, mask=mask)


class Plain(nn.Module):
    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def embed(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(images))
        return found


class Pull(ext.Backend):
    """Pulls the synthetic images to grey."""

    name, Options = "pull", ext.BackendOptions

    def __init__(self, options: ext.BackendOptions, *, ipc: int, recipe: ext.Recipe) -> None:
        self.rate = options.lr_img

    def steps(self) -> int:
        return 1

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD([leaf], lr=self.rate)

    def network(self, run: ext.Run) -> nn.Module:
        return run.task.fresh_network(0)

    def losses(self, run: ext.Run, network: nn.Module, synthetic: ext.Batch) -> Iterator[Tensor]:
        yield (synthetic.images - 0.5).square().mean()

    def advance(self, run: ext.Run, network: nn.Module, synthetic: ext.Batch) -> None:
        """Its networks stay as they are."""


class Sure(ext.InputScorer):
    """The victim's confidence."""

    name = "sure"

    def score_inputs(self, view: ext.DefenderView, images: Tensor) -> Tensor:
        return view.logits(images).softmax(dim=1).amax(dim=1)

    def threshold(self, view: ext.DefenderView) -> float | None:
        return None


NAMES = {kind: f"{__name__}:{kind.__name__}" for kind in (Corner, Plain, Pull, Sure)}


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> distillsec.Record:
    """A finished run whose attack, backend and network are classes of this module."""
    return distillsec.run_attack(
        dataset="digits",
        attack=Corner,
        backend=Pull,
        network=Plain,
        poison_rate=0.1,
        out=tmp_path_factory.mktemp("own") / "run",
        **SMALL,
    )


def test_keywords_win_over_the_preset(tmp_path: Path) -> None:
    record = distillsec.run_attack(
        preset="digits-naive", trigger_size=4, width=4, control=False, out=tmp_path / "a", **SMALL
    )
    assert (record.config["trigger_size"], record.config["ipc"]) == (4, 1)
    assert record.config["inner_loop"] == 20  # the preset's
    assert record.objects == {} and "objects" not in json.loads(
        (tmp_path / "a/record.json").read_text()
    )


def test_it_is_the_run_of_the_command_line(
    tmp_path: Path, finished: Path, tiny: Callable[..., Any]
) -> None:
    theirs = distillsec.read_record(finished)
    keys: dict[str, Any] = {
        key: theirs.config[key] for key in ("width", "depth", "attack", "poison_rate", "victims")
    }
    record = distillsec.run_attack(
        **keys,
        iterations=3,
        ipc=1,
        victim_epochs=3,
        threads=1,
        device="cpu",
        quiet=True,
        out=tmp_path / "a",
    )
    assert record.metrics == theirs.metrics and record.config_key == theirs.config_key


def test_a_record_names_the_objects_of_a_run(own_run: distillsec.Record) -> None:
    names = {"attack": NAMES[Corner], "backend": NAMES[Pull], "network": NAMES[Plain]}
    assert own_run.status == "done"
    assert {key: own_run.config[key] for key in names} == names
    assert own_run.objects == {key: [name] for key, name in names.items()}
    shown = "; ".join(f"{key} {name}" for key, name in names.items())
    assert f"given as objects in Python: {shown}" in run_table(own_run, own_run.folder)
    read = distillsec.read_record(own_run.folder)
    assert read.objects == own_run.objects and read.folder == own_run.folder


def test_a_resumed_run_needs_its_objects(
    own_run: distillsec.Record, cli: Callable[..., Result]
) -> None:
    with pytest.raises(distillsec.RequestError, match="given as an object in Python: give it"):
        distillsec.run_attack(out=own_run.folder, resume=True, trust=True, quiet=True)
    done = cli("attack", "--out", own_run.folder, "--resume", "--trust", "--victims", 1)
    assert done.exit_code == 2 and "given as an object in Python" in done.stderr
    again = distillsec.run_attack(
        out=own_run.folder, resume=True, attack=Corner, backend=Pull, network=Plain, quiet=True
    )
    assert again.metrics == own_run.metrics


def test_measuring_a_run_with_objects(own_run: distillsec.Record, tmp_path: Path) -> None:
    with pytest.raises(distillsec.RequestError, match=r"network .* given as an object in Python"):
        distillsec.run_evaluate(own_run, out=tmp_path / "a", quiet=True)
    record = distillsec.run_evaluate(
        own_run, network=Plain, victims=1, threads=1, out=tmp_path / "a", quiet=True
    )
    assert record.metrics == own_run.metrics and record.objects == {"network": [NAMES[Plain]]}


def test_defenses_as_classes_and_instances(finished: Path, tmp_path: Path) -> None:
    strip = Strip(Strip.Options(copies=3))
    record = distillsec.run_defend(
        distillsec.read_record(finished),
        defenses=["jpeg", Sure, strip],
        victims=1,
        holdout=20,
        images=40,
        threads=1,
        out=tmp_path / "a",
        quiet=True,
    )
    assert {name: each.status for name, each in record.defenses.items()} == dict.fromkeys(
        ("jpeg", NAMES[Sure], "strip"), "done"
    )
    assert record.defenses["strip"].options == strip.options.model_dump(mode="json")
    assert record.objects == {"defenses": [NAMES[Sure]]}
    with pytest.raises(distillsec.RequestError, match="two defenses of one class"):
        distillsec.run_defend(finished, defenses=[Sure(), Sure()], out=tmp_path / "b")
    with pytest.raises(distillsec.RequestError, match="expected a name or a subclass of Defense"):
        distillsec.run_defend(finished, defenses=[Corner], out=tmp_path / "b")  # type: ignore[list-item]


def test_the_suites_own_classes_keep_their_names(tmp_path: Path) -> None:
    record = distillsec.run_attack(
        attack=Naive, network=NETWORK, poison_rate=0.1, out=tmp_path / "a", **SMALL
    )
    assert record.config["attack"] == "naive" and record.objects == {}
    assert (record.config["network"], record.config["width"]) == ("convnet", 4)


def test_an_instance_of_an_attack_brings_its_options(
    tmp_path: Path, toy_data_info: ext.DataInfo
) -> None:
    attack = Corner(Corner.Options(target=2, poison_rate=0.2), toy_data_info)
    record = distillsec.run_attack(
        attack=attack, network=NETWORK, poison_rate=0.1, control=False, out=tmp_path / "a", **SMALL
    )
    assert (record.config["target"], record.config["poison_rate"]) == (2, 0.1)


def test_a_network_that_is_a_module_is_copied_with_fresh_weights(tmp_path: Path) -> None:
    layer = nn.Linear(64, 10)
    module, before = nn.Sequential(nn.Flatten(), layer), layer.weight.clone()
    keys: dict[str, Any] = {**SMALL, "victims": 2}
    record = distillsec.run_distill(network=module, backend="dc", out=tmp_path / "a", **keys)
    assert torch.equal(layer.weight, before)
    first, second = record.metrics["clean_test_accuracy"].values
    assert first != second

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

    with pytest.raises(distillsec.RequestError, match="layer 1 has no reset_parameters"):
        distillsec.run_distill(network=nn.Sequential(nn.Flatten(), Scale()), out=tmp_path / "b")


def test_data_as_tensors(tmp_path: Path) -> None:
    labels = torch.arange(60) % 3
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    run: dict[str, Any] = {"network": NETWORK, "backend": "dm", **SMALL}
    record = distillsec.run_distill(dataset=(images, labels), out=tmp_path / "a", **run)
    assert record.dataset["train"] == 48 and record.objects == {"dataset": ["torch:Tensor"]}
    other = TensorDataset(images.flip(0), labels)
    with pytest.raises(distillsec.RequestError, match="on other data"):
        distillsec.run_distill(dataset=(other.tensors), out=tmp_path / "a", resume=True, **run)
    with pytest.raises(distillsec.RequestError, match="two objects would be called"):
        distillsec.run_distill(victim_network=[lambda: 0, lambda: 1], out=tmp_path / "b")


def test_a_set_in_place_of_a_path(finished: Path, tmp_path: Path) -> None:
    distilled = distillsec.load_set(finished / "distilled.safetensors")
    keys: dict[str, Any] = {"victims": 1, "threads": 1, "quiet": True}
    with pytest.raises(distillsec.RequestError, match="name the data to test it on"):
        distillsec.run_evaluate(distilled, out=tmp_path / "a", **keys)
    given = distillsec.run_evaluate(distilled, dataset="digits", out=tmp_path / "a", **keys)
    file = distillsec.run_evaluate(
        finished / "distilled.safetensors", dataset="digits", out=tmp_path / "b", **keys
    )
    assert given.metrics == file.metrics
    assert given.distilled["source"] == "a DistilledSet"
    again = distillsec.run_evaluate(
        distilled, dataset="digits", out=tmp_path / "a", resume=True, **keys
    )
    assert again.metrics == given.metrics
    steps: dict[str, Any] = {
        "poison_steps": 1,
        "archetype_steps": 1,
        "archetypes": 2,
        "unroll_least": 0,
    }
    steps |= {"dataset": "digits", "unroll_steps": 1, "archetype_networks": 1}
    record = distillsec.run_attack(
        on=distilled, attack="poisoned-set", out=tmp_path / "c", **steps, **keys
    )
    assert record.hooks[0]["threat_model"] == "interceptor"


def test_every_iteration_is_reported(tmp_path: Path) -> None:
    seen: list[distillsec.Iteration] = []
    record = distillsec.run_attack(
        attack="naive",
        network=NETWORK,
        poison_rate=0.1,
        out=tmp_path / "a",
        on_iteration=seen.append,
        **SMALL,
    )
    places = [(each.run, each.phase, each.number) for each in seen]
    assert places == [
        (run, phase, number)
        for run, phase in (
            (record.folder, "distilling"),
            (record.folder / "control", "distilling the clean twin"),
        )
        for number in (1, 2)
    ]
    logged = [json.loads(line) for line in (tmp_path / "a/progress.jsonl").read_text().splitlines()]
    assert [{"iteration": each.number, **each.values} for each in seen[:2]] == logged


def test_what_a_tracker_raises_ends_the_run(tmp_path: Path) -> None:
    def fail(_: distillsec.Iteration) -> None:
        raise ConnectionError("the tracker is away")

    run: dict[str, Any] = {"network": NETWORK, "backend": "dm", "out": tmp_path / "a", **SMALL}
    with pytest.raises(ConnectionError):
        distillsec.run_distill(on_iteration=fail, **run)
    assert distillsec.read_record(tmp_path / "a").status == "error"
    assert distillsec.run_distill(resume=True, **run).status == "done"


def test_wrong_requests(finished: Path, tmp_path: Path) -> None:
    wrong: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (distillsec.run_attack, {}, "no attack was chosen"),
        (distillsec.run_attack, {"attack": "naive", "resume": True}, "out=FOLDER"),
        (distillsec.run_attack, {"attack": 3}, "expected a name or a subclass of Attack"),
        (distillsec.run_distill, {"backend": Corner}, "expected a name or a subclass of Backend"),
        (distillsec.run_distill, {"network": 3}, "expected a name, a class or a torch module"),
        (distillsec.run_distill, {"dataset": 3}, "int is no data set"),
        (distillsec.run_distill, {"trigger_syze": 3}, "trigger_syze"),
        (distillsec.run_distill, {"victim_network": [NETWORK]}, "takes no parameters"),
        (distillsec.run_attack, {"attack": "naive", "seeds": 2, "control_run": "x"}, "one seed"),
        (distillsec.run_attack, {"attack": "naive", "on": finished, "seeds": 2}, "that distil"),
        (
            distillsec.run_attack,
            {"attack": "naive", "reading": ReadingOptions(number=1)},
            "name it with on=",
        ),
    ]
    for run, keys, message in wrong:
        with pytest.raises(distillsec.RequestError, match=message):
            run(**{"out": tmp_path / "a", **keys} if "resume" not in keys else keys)
    with pytest.raises(distillsec.RequestError, match="leave out png"):
        distillsec.run_evaluate(finished, png=True, survival=True)
    assert not (tmp_path / "a").exists()
