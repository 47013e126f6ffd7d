"""What survives: the variants of a set, their measurement, and a run that was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image

from distillsec.distill.files.safe import read_json
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.randomness import Streams
from distillsec.distill.training import fit
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError, RunError, Step
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.evaluate import evaluate
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.survival import (
    at_rate,
    augmented,
    evaluate_survival,
    kept_rows,
    longer,
    only_rows,
    other_networks,
    variants,
)
from distillsec.eval.run.victims import train_victim

Tiny = Callable[..., Config]
Cli = Callable[..., Result]
QUIET = Reporter(quiet=True)
TRAINER = "distillsec.eval.run.survival.train_victim"
SPACE = Preprocessing((0.5,), (0.25,))
LEARNED = (Step(rows=(0, 1, 2, 3), rate=0.2), Step(rows=(1, 3), rate=0.5))


@pytest.fixture(scope="module")
def measured(finished: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants of a tiny attacked set, one victim each; read-only."""
    out = tmp_path_factory.mktemp("measured") / "out"
    evaluate_survival(finished, tiny(victims=1), out, reporter=QUIET)
    return out


def toy_set(labels: list[int], recipe: Recipe | None = None) -> DistilledSet:
    """A set of images that are numbered by their pixels."""
    numbers = torch.arange(len(labels)).view(-1, 1, 1, 1) / 10
    batch = Batch(images=numbers.expand(-1, 1, 8, 8).clone(), labels=torch.tensor(labels))
    recipe = recipe or Recipe(preprocessing=SPACE)
    return DistilledSet(batch=batch, classes=("a", "b"), recipe=recipe)


def maker(**parameters: Any) -> NetworkMaker:
    spec = NetworkSpec.model_validate(parameters)
    return NetworkMaker(spec=spec, image_shape=(1, 8, 8), classes=2, preprocessing=SPACE)


# What a receiver may change ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, [5, 1, 1]), (0.25, [2, 1, 1]), (1, [10, 3, 1])]
)
def test_a_share_of_each_class_is_kept(share: float, expected: list[int]) -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])[torch.randperm(14)]
    rows = kept_rows(labels, share, torch.Generator().manual_seed(1))
    assert labels[rows].bincount().tolist() == expected
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_a_quarter_is_part_of_the_half_and_another_seed_keeps_other_rows() -> None:
    labels = torch.arange(100) % 5

    def kept(share: float, seed: int) -> set[int]:
        return set(kept_rows(labels, share, torch.Generator().manual_seed(seed)).tolist())

    assert kept(0.25, 1) < kept(0.5, 1) != kept(0.5, 2)
    assert kept(0.5, 1) == kept(0.5, 1)


def test_learned_steps_follow_the_rows_that_are_left() -> None:
    whole = toy_set([0, 0, 1, 1], Recipe(preprocessing=SPACE, steps=LEARNED))
    part = only_rows(whole, torch.tensor([0, 2]))
    assert torch.equal(part.batch.images, whole.batch.images[[0, 2]])
    assert part.batch.labels.tolist() == [0, 1]
    assert part.recipe.steps == (Step(rows=(0, 1), rate=0.2),)


def test_recipes_change_one_thing() -> None:
    recipe = Recipe(preprocessing=SPACE, epochs=10, lr=0.02, steps=LEARNED)
    assert longer(recipe, 2) == replace(recipe, epochs=20, steps=LEARNED * 2)
    faster = at_rate(recipe, 3)
    assert faster.lr == pytest.approx(0.06) and faster.epochs == 10
    assert [step.rate for step in faster.steps] == pytest.approx([0.6, 1.5])
    assert [step.rows for step in faster.steps] == [step.rows for step in LEARNED]
    assert augmented(recipe, "crop") == replace(recipe, augment="crop", steps=())


def test_repeated_steps_are_the_training_twice() -> None:
    """Plain gradient descent has no state: two rounds of the steps, one after the other."""
    once = Recipe(preprocessing=SPACE, steps=LEARNED)
    batch = toy_set([0, 0, 1, 1]).batch
    network = maker(network="mlp", width=4)
    generator = torch.Generator()
    twice = fit(fit(network(0), batch, once, generator).train(), batch, once, generator)
    longer_one = fit(network(0), batch, longer(once, 2), generator)
    for ours, theirs in zip(longer_one.parameters(), twice.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (
            {"network": "convnet", "width": 32, "depth": 2},
            {
                "convnet, batch norm": {"width": 32, "depth": 2, "norm": "batch"},
                "convnet, width 64": {"width": 64, "depth": 2},
                "mlp": {"network": "mlp"},
            },
        ),
        (
            {"network": "convnet", "norm": "batch"},
            {"convnet, width 256": {"norm": "batch", "width": 256}, "mlp": {"network": "mlp"}},
        ),
        (
            {"network": "mlp"},
            {
                "convnet, batch norm": {"norm": "batch"},
                "mlp, width 256": {"network": "mlp", "width": 256},
            },
        ),
        (
            {"network": "package.module:Class"},
            {
                "convnet, batch norm": {"norm": "batch"},
                "convnet, width 256": {"width": 256},
                "mlp": {"network": "mlp"},
            },
        ),
    ],
)
def test_the_other_networks_are_not_the_sets_own(
    own: dict[str, Any], expected: dict[str, dict[str, Any]]
) -> None:
    found = other_networks(NetworkSpec.model_validate(own))
    assert found == {name: NetworkSpec(**keys) for name, keys in expected.items()}


def named(labels: list[int], **keys: Any) -> list[str]:
    recipe = Recipe(preprocessing=SPACE, augment=keys.pop("augment", ""))
    own = maker(network="convnet", width=4, depth=1)
    fields = {"chosen": (), "streams": Streams(0), "flips": False, **keys}
    return [each.name for each in variants(toy_set(labels, recipe), own, **fields)]


def test_the_variants_of_a_set() -> None:
    names = named([0, 0, 0, 0, 1, 1, 1, 1])
    assert names == [
        "as it is",
        "8-bit PNG",
        "network: convnet, batch norm",
        "network: convnet, width 8",
        "network: mlp",
        "with augmentation",
        "twice the epochs",
        "learning rate × 0.3",
        "learning rate × 3",
        "half of each class",
        "quarter of each class",
    ]
    assert len(set(names)) == len(names)


def test_a_part_with_as_many_rows_is_no_variant() -> None:
    assert named([0, 1])[-1] == "learning rate × 3"
    assert named([0, 0, 1, 1])[-1] == "half of each class"  # a quarter is one row of each too


def test_an_augmented_set_is_trained_without_augmentation() -> None:
    names = named([0, 1], augment="crop")
    assert "without augmentation" in names and "with augmentation" not in names


def test_flips_only_where_they_keep_the_label() -> None:
    for flips in (True, False):
        found = variants(toy_set([0, 1]), maker(network="mlp"), (), Streams(0), flips=flips)
        change = next(each.change for each in found if each.name == "with augmentation")
        augment = change(toy_set([0, 1])).recipe.augment
        assert ("flip" in augment) == flips and "crop" in augment


def test_chosen_networks_replace_the_others() -> None:
    assert [
        name for name in named([0, 1], chosen=["convnet-baadd", "mlp"]) if "network" in name
    ] == [
        "network: convnet-baadd",
        "network: mlp",
    ]
    with pytest.raises(RequestError, match="did you mean"):
        named([0, 1], chosen=["convnt"])


def test_a_part_is_drawn_by_the_seed() -> None:
    whole = toy_set([0, 1] * 8)
    parts = []
    for seed in (0, 0, 1):
        tried = variants(whole, maker(network="mlp"), (), Streams(seed), flips=False)
        change = next(each.change for each in tried if each.name == "half of each class")
        parts.append(change(whole).batch)
    assert torch.equal(parts[0].images, parts[1].images)
    assert not torch.equal(parts[0].images, parts[2].images)
    assert parts[0].labels.bincount().tolist() == [4, 4]


# Measuring ---------------------------------------------------------------------------------------


def test_each_variant_is_measured_as_evaluate_measures_it(
    finished: Path, measured: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """The same victims as those of a set and a configuration that were changed by hand."""
    found = {
        name: each.metrics for name, each in read_record(measured / "record.json").survival.items()
    }
    asked: dict[str, dict[str, Any]] = {
        "as it is": {},
        "8-bit PNG": {"png": True},
        "twice the epochs": {"victim_epochs": 6},
        "learning rate × 3": {"victim_lr": 0.03},
        "with augmentation": {"victim_augment": "color_crop_cutout_scale_rotate"},
        "network: mlp": {"victim_network": "mlp"},
    }
    for number, (name, keys) in enumerate(asked.items()):
        png, given = keys.get("png", False), [key for key in keys if key != "png"]
        config = tiny(victims=1, **{key: keys[key] for key in given})
        out = tmp_path / str(number)
        record = evaluate(finished, config, out, png=png, given=given, reporter=QUIET)
        assert found[name] == record.metrics, name
    assert len({each["clean_test_accuracy"].mean for each in found.values()}) > 5


def test_the_record_the_table_and_the_picture(finished: Path, measured: Path) -> None:
    record = read_record(measured / "record.json")
    assert (record.kind, record.status) == ("evaluate", "done")
    assert record.metrics == record.survival["as it is"].metrics
    assert len(record.survival) == 9  # of one row per class there is no part
    wanted = {"clean_test_accuracy", "attack_success_rate"}
    wanted |= {f"control_{name}" for name in wanted}
    assert all(wanted <= each.metrics.keys() for each in record.survival.values())
    text = (measured / "survival.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "| variant | CTA | CTA, clean twin | ASR | ASR, control |"
    assert len(rows) == 2 + len(record.survival) and rows[2].startswith("| as it is | 0.")
    with Image.open(measured / "survival.png") as picture:
        assert picture.width > 1000
    assert {path.name for path in measured.iterdir()} >= {"record.json", "distilled.png"}


def stopped(measured: Path, out: Path, kept: int) -> dict[str, Any]:
    """A copy of ``measured`` as a kill after ``kept`` victims would leave it; their scores."""
    shutil.copytree(measured, out)
    scores: dict[str, Any] = dict(list(read_json(out / "checkpoint/victims.json").items())[:kept])
    (out / "checkpoint/victims.json").write_text(json.dumps(scores))
    record = read_json(out / "record.json")
    for name in ("survival.md", "survival.png", "distilled.png"):
        (out / name).unlink()
    changed = {**record, "status": "running", "survival": {}, "metrics": {}}
    (out / "record.json").write_text(json.dumps(changed))
    return scores


def test_a_killed_run_trains_only_the_victims_that_are_missing(
    finished: Path, measured: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = read_json(measured / "checkpoint/victims.json")
    kept = stopped(measured, out, 5)
    trained = []

    def counting(*what: Any) -> Any:
        trained.append(what)
        return train_victim(*what)

    monkeypatch.setattr(TRAINER, counting)
    words = ["evaluate", finished, "--survival", "--victims", 1, "--out", out, "--resume"]
    done = cli(*words, "--threads", 1, "--quiet")
    assert done.exit_code == 0, done.stderr
    assert len(kept) == 5 and len(trained) == len(whole) - 5
    assert read_json(out / "checkpoint/victims.json") == whole
    records = [read_record(place / "record.json") for place in (out, measured)]
    assert records[0].survival == records[1].survival
    assert (out / "survival.md").exists() and (out / "survival.png").exists()
    again = cli(*words, "--threads", 1, "--quiet")
    assert again.exit_code == 0 and len(trained) == len(whole) - 5
    assert "quarter" not in again.stdout and "learning rate × 0.3" in again.stdout


def test_another_request_in_the_same_folder_is_refused(
    finished: Path, measured: Path, cli: Cli
) -> None:
    words = ["evaluate", finished, "--victims", 1, "--threads", 1, "--out", measured, "--resume"]
    for more in ([], ["--survival", "--victim-network", "convnet-baadd"]):
        refused = cli(*words, *more)
        assert refused.exit_code == 2 and "another set, trigger or recipe" in refused.stderr
    both = cli("evaluate", finished, "--survival", "--png", "--out", measured / "new")
    assert both.exit_code == 2 and "leave out --png" in both.stderr


def test_chosen_networks_on_the_command_line(finished: Path, cli: Cli, tmp_path: Path) -> None:
    words = ["evaluate", finished, "--survival", "--victims", 1, "--threads", 1, "--json"]
    done = cli(
        *words,
        "--victim-network",
        "convnet",
        "--victim-network",
        "convnet-baadd",
        "--out",
        tmp_path,
    )
    assert done.exit_code == 0 and done.stderr == ""
    record = Record.model_validate(json.loads(done.stdout))
    assert [name for name in record.survival if "network" in name] == ["network: convnet-baadd"]
    assert record.config["victim_network"] == ["convnet", "convnet-baadd"]
    resumed = cli(*words[:3], *words[-3:], "--out", tmp_path, "--resume")  # as the record names
    assert resumed.exit_code == 0 and resumed.stdout == done.stdout


def test_a_file_without_a_trigger_has_accuracies_only(
    tiny: Tiny, finished: Path, tmp_path: Path
) -> None:
    file = finished / "distilled.safetensors"
    config = tiny(victims=1, attack=None, poison_rate=None)
    record = evaluate_survival(file, config, tmp_path / "out", reporter=QUIET)
    assert all(each.metrics.keys() == {"clean_test_accuracy"} for each in record.survival.values())
    row = next(
        line for line in (tmp_path / "out/survival.md").read_text().splitlines() if "mlp" in line
    )
    assert row.endswith("| – | – | – |")


def test_a_training_that_diverges_has_no_figures(
    finished: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def diverging(distilled: DistilledSet, *what: Any) -> Any:
        if distilled.recipe.lr > 0.02:
            raise RunError("training did not converge: the loss is nan")
        return train_victim(distilled, *what)

    monkeypatch.setattr(TRAINER, diverging)
    record = evaluate_survival(finished, tiny(victims=1), tmp_path / "out", reporter=QUIET)
    found = record.survival["learning rate × 3"]
    assert (record.status, found.metrics) == ("done", {})
    assert found.error == "training did not converge: the loss is nan"
    assert "- learning rate × 3: training did not" in (tmp_path / "out/survival.md").read_text()
    assert read_record(tmp_path / "out" / "record.json").survival["learning rate × 3"] == found
