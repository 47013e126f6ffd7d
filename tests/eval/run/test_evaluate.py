"""Victims on a finished set: of a run, with its control, and of a received file."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from distillsec.distill.data.registry import load_dataset
from distillsec.distill.files.artifact import load_set, save_set, save_trigger
from distillsec.distill.files.safe import read_json
from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import read_record
from distillsec.eval.run.evaluate import evaluate
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.reading import ReadingOptions

Tiny = Callable[..., Config]
QUIET = Reporter(quiet=True)


def test_a_run_is_measured_as_it_was(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    record = evaluate(finished, tiny(), tmp_path / "out", reporter=QUIET)
    assert (record.kind, record.status) == ("evaluate", "done")
    assert record.metrics == read_record(finished / "record.json").metrics
    assert record.trigger is not None and record.trigger["target"] == 0
    assert record.model_dump(mode="json") == read_json(tmp_path / "out" / "record.json")
    assert (tmp_path / "out" / "distilled.png").exists()


def test_other_architectures_are_never_pooled(
    finished: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    networks = ["--victim-network", "mlp", "--victim-network", "convnet"]
    done = cli("evaluate", finished, *networks, "--victims", 2, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "ASR, control" in done.stdout and "victims: convnet" in done.stdout
    record = read_record(out / "record.json")
    assert list(record.metrics_by_network) == ["convnet"]
    original = read_record(finished / "record.json").metrics
    assert record.metrics_by_network["convnet"] == original
    assert record.metrics.keys() == original.keys()
    assert record.metrics["clean_test_accuracy"] != original["clean_test_accuracy"]
    assert record.recipe["epochs"] == 3  # the set's own


def test_images_rounded_to_eight_bits_are_measured(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    record = evaluate(finished, tiny(), tmp_path / "out", png=True, reporter=QUIET)
    low, high = record.distilled["pixel_range"]
    assert low >= 0 and high <= 1
    whole = load_set(finished / "distilled.safetensors").batch.images
    assert whole.min() < 0 or whole.max() > 1  # otherwise clipping would change nothing
    assert len(list((tmp_path / "out" / "png").rglob("*.png"))) == len(whole)
    assert record.labels == ["8-bit images: clipped to [0, 1] and rounded"]
    assert "control_attack_success_rate" in record.metrics


def test_only_given_keys_override_the_sets_recipe(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    file = finished / "distilled.safetensors"
    config = tiny(victim_epochs=1, victims=1, attack=None, poison_rate=None)
    own = evaluate(file, config, tmp_path / "own", reporter=QUIET)
    asked = evaluate(file, config, tmp_path / "asked", given=["victim_epochs"], reporter=QUIET)
    assert (own.recipe["epochs"], asked.recipe["epochs"]) == (3, 1)
    assert own.trigger is None and own.metrics.keys() == {"clean_test_accuracy"}


def test_the_clean_twin_gets_the_same_overrides(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Else the backdoor gain would compare victims of two recipes."""
    config = tiny(victim_epochs=1, victims=1)
    record = evaluate(finished, config, tmp_path / "out", given=["victim_epochs"], reporter=QUIET)
    twin = evaluate(
        finished / "control",
        tiny(victim_epochs=1, victims=1, attack=None, poison_rate=None),
        tmp_path / "twin",
        given=["victim_epochs"],
        reporter=QUIET,
    )
    control = record.mean("control_clean_test_accuracy")
    assert control is not None and control == twin.mean("clean_test_accuracy")


def test_a_file_with_and_without_a_trigger(
    finished: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    file, trigger = finished / "distilled.safetensors", finished / "trigger.safetensors"
    tail = ["--dataset", "digits", "--threads", 1]
    words = ["evaluate", file, *tail, "--victims", 1, "--victim-network", "mlp", "--quiet"]
    plain = cli(*words, "--out", tmp_path / "plain")
    armed = cli(*words, "--out", tmp_path / "armed", "--trigger", trigger)
    assert (plain.exit_code, armed.exit_code) == (0, 0), plain.stderr + armed.stderr
    records = [read_record(tmp_path / name / "record.json") for name in ("plain", "armed")]
    assert records[0].metrics.keys() == {"clean_test_accuracy"}
    assert "attack_success_rate" in records[1].metrics
    assert "control_attack_success_rate" not in records[1].metrics
    cta = [record.metrics["clean_test_accuracy"] for record in records]
    assert cta[0] == cta[1]


def test_the_trigger_is_stamped_on_eligible_images(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """A trigger over the whole image makes all images equal: all reach the target, or none."""
    data = load_dataset("digits")
    tensors = {"pattern": data.test.images[0], "mask": torch.ones(1, 8, 8)}
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, tensors, {"kind": "patch", "target": 3, "range": "unbounded"})
    record = evaluate(finished, tiny(), tmp_path / "out", trigger=path, reporter=QUIET)
    values = record.metrics["attack_success_rate"].values
    assert set(values) <= {0.0, 1.0}
    assert record.labels == ["unbounded trigger: no camera or file can carry it"]


def test_a_trigger_file_says_its_goal(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    """The same stamp with another goal is measured on other images, towards other labels."""
    test = load_dataset("digits").test
    tensors = {"pattern": test.images[0], "mask": torch.ones(1, 8, 8)}
    path, noted = tmp_path / "trigger.safetensors", {"kind": "patch", "range": "pixel"}
    rates = {}
    for goal in ({"target": 3}, {"target": 3, "goal": "one-to-one", "source": 5}):
        save_trigger(path, tensors, {**noted, **goal})
        out = tmp_path / str(goal.get("goal", "old"))
        record = evaluate(finished, tiny(), out, trigger=path, reporter=QUIET)
        assert record.trigger is not None and goal.items() <= record.trigger.items()
        assert record.trigger["target_class"] == "3"
        assert record.trigger["max"] == test.images[0].max()
        rates[len(goal)] = record.metrics["attack_success_rate"].values
    assert rates[1] == rates[3]  # all images are one image
    save_trigger(path, tensors, {**noted, "target": None, "goal": "all-to-all"})
    record = evaluate(finished, tiny(), tmp_path / "all", trigger=path, reporter=QUIET)
    for value in record.metrics["attack_success_rate"].values:
        assert value == pytest.approx(0.1, abs=0.02)  # one answer for all: right for one class


def published(path: Path, images: torch.Tensor, classes: int = 10) -> Path:
    """The structure of DatasetCondensation's ``res_*.pt``, with its numpy scalars."""
    pair = [images, torch.arange(len(images)) % classes]
    torch.save({"data": [pair], "accs_all_exps": {"ConvNet": [np.float64(0.5)]}}, path)
    return path


def test_a_published_pt_file(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Normalised images in a .pt file give the same metrics as in our own format."""
    ours = load_set(finished / "distilled.safetensors")
    data = load_dataset("digits")
    normalised = (ours.batch.images - data.mean[0]) / data.std[0]
    path = published(tmp_path / "res.pt", normalised)
    config = tiny(attack=None, poison_rate=None)
    record = evaluate(path, config, tmp_path / "out", reporter=QUIET)
    found = record.metrics["clean_test_accuracy"].values
    wanted = read_record(finished / "record.json").metrics["clean_test_accuracy"].values
    assert found == pytest.approx(wanted, abs=0.01)  # normalising and back moves the last bits


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((10, 1, 9, 9), "don't fit digits"), ((10, 3, 8, 8), "don't fit digits")],
)
def test_sets_of_another_shape_are_refused(
    tiny: Tiny, tmp_path: Path, shape: tuple[int, ...], expected: str
) -> None:
    path = published(tmp_path / "res.pt", torch.randn(shape))
    with pytest.raises(RequestError, match=expected):
        evaluate(path, tiny(), tmp_path / "out", reporter=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("info", "shape", "expected"),
    [
        ({"target": 10}, (1, 8, 8), "target 10 is no class"),
        ({"goal": "one-to-one"}, (1, 8, 8), "needs a source class, 0 to 9"),
        ({"goal": "some"}, (1, 8, 8), "unknown goal 'some'; there are all-to-one, "),
        ({}, (1, 9, 9), r"does not fit \(1, 8, 8\) images"),
        ({"kind": "mesh"}, (1, 8, 8), "unknown kind of trigger 'mesh'; there are patch, blend, "),
        ({"range": "any"}, (1, 8, 8), "range is 'any', expected"),
    ],
)
def test_triggers_that_do_not_fit_are_refused(
    finished: Path,
    tiny: Tiny,
    tmp_path: Path,
    info: dict[str, Any],
    shape: tuple[int, int, int],
    expected: str,
) -> None:
    tensors = {"pattern": torch.zeros(shape), "mask": torch.ones(1, *shape[1:])}
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, tensors, {"kind": "patch", "target": 3, "range": "pixel", **info})
    with pytest.raises(RequestError, match=expected):
        evaluate(finished, tiny(), tmp_path / "out", trigger=path, reporter=QUIET)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_resumed_on_the_same_set_only(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    file = finished / "distilled.safetensors"
    config = tiny(attack=None, poison_rate=None)
    first = evaluate(file, config, out, reporter=QUIET)
    running = first.model_copy(update={"status": "interrupted", "metrics": {}})
    for record in (first, running):  # one is finished, the other has its victims
        record.write(out / "record.json")
        again = evaluate(file, config, out, resume=True, reporter=QUIET)
        assert (again.status, again.metrics) == ("done", first.metrics)
    distilled = load_set(file)
    batch = distilled.batch.replace(images=distilled.batch.images.flip(0))
    save_set(other, dataclasses.replace(distilled, batch=batch))
    with pytest.raises(RequestError, match="another set, trigger or recipe"):
        evaluate(other, config, out, resume=True, reporter=QUIET)
    with pytest.raises(RequestError, match=r"victims 1 \(was 2\)"):
        config = tiny(attack=None, poison_rate=None, victims=1)
        evaluate(file, config, out, resume=True, reporter=QUIET)


def test_sources_without_a_finished_run_are_refused(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    record = read_record(run / "record.json")
    for changes, expected in (
        ({"status": "running"}, "is not finished"),
        ({"kind": "evaluate", "distilled": {"source": "x"}}, "itself an evaluation"),
    ):
        record.model_copy(update=changes).write(run / "record.json")
        with pytest.raises(RequestError, match=expected):
            evaluate(run, tiny(), tmp_path / "out", reporter=QUIET)
    with pytest.raises(RequestError, match="no such run folder or file"):
        evaluate(tmp_path / "absent", tiny(), tmp_path / "out", reporter=QUIET)
    assert not (tmp_path / "out").exists()


# Class names and sets of others -------------------------------------------------------------------

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def named(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """A factory: the digits as an npz file whose classes have these names, in this order."""

    def make(names: Sequence[str]) -> Path:
        data, place = load_dataset("digits"), {name: i for i, name in enumerate(names)}
        renumbered = np.array([place.get(name, i) for i, name in enumerate(NAMES)])
        path = tmp_path / f"{names[0]}.npz"
        np.savez(
            path,
            x_train=data.train.images.numpy(),
            y_train=renumbered[data.train.labels],
            x_test=data.test.images.numpy(),
            y_test=renumbered[data.test.labels],
            classes=np.array(names),
        )
        return path

    return make


@pytest.mark.parametrize("attached", [True, False])
def test_classes_in_another_order_are_matched_by_name(
    named: Callable[[Sequence[str]], Path],
    finished: Path,
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    attached: bool,
) -> None:
    """The same images under other numbers give the same figures, the trigger's target too."""
    file, trigger = tmp_path / "set.safetensors", tmp_path / "trigger.safetensors"
    save_set(file, dataclasses.replace(load_set(finished / "distilled.safetensors"), classes=NAMES))
    tensors = {"pattern": torch.ones(1, 8, 8), "mask": torch.ones(1, 8, 8)}
    number = {"target": 2 if attached else sorted(NAMES).index("two")}
    save_trigger(
        trigger, tensors, {"kind": "patch", "range": "pixel", "target_class": "two", **number}
    )
    found = []
    for names in (NAMES, sorted(NAMES)):
        config = tiny(dataset=f"npz:{named(names)}", attack=None, poison_rate=None)
        record = evaluate(file, config, tmp_path / names[0], trigger=trigger, reporter=QUIET)
        assert record.trigger is not None and record.trigger["target"] == 2
        found.append(record.metrics)
    assert found[0] == found[1]
    assert "another order" in caplog.text
    assert ("is class 2 here, not 8" in caplog.text) == (not attached)


def test_names_that_differ_are_pointed_out_or_refused(
    named: Callable[[Sequence[str]], Path],
    finished: Path,
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = finished / "distilled.safetensors"
    config = tiny(dataset=f"npz:{named(NAMES)}", attack=None, poison_rate=None, victims=1)
    evaluate(file, config, tmp_path / "out", reporter=QUIET)
    assert "are matched by number" in caplog.text
    contradicting = ("1", "0", *NAMES[2:])
    config = tiny(dataset=f"npz:{named(contradicting)}", attack=None, poison_rate=None)
    with pytest.raises(RequestError, match="class '0' is number 0 there and 1 here"):
        evaluate(file, config, tmp_path / "other", reporter=QUIET)
    assert not (tmp_path / "other").exists()


SECOND = ReadingOptions(number=1)


def test_one_of_several_sets_in_a_file_is_chosen(
    cli: Callable[..., Result], tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, generator = tmp_path / "res.pt", torch.Generator().manual_seed(0)
    sets = [[torch.randn(10, 1, 8, 8, generator=generator), torch.arange(10)] for _ in range(2)]
    torch.save({"data": sets}, path)
    config = tiny(attack=None, poison_rate=None, victims=1)
    first = evaluate(path, config, tmp_path / "first", reporter=QUIET)
    second = evaluate(path, config, tmp_path / "second", reading=SECOND, reporter=QUIET)
    assert first.labels[0] == "set 0 of the 2 in the file: --set-number N chooses another"
    assert first.labels[0] in caplog.text
    assert not any("set 0" in label for label in second.labels)
    assert first.metrics != second.metrics
    with pytest.raises(RequestError, match="another set, trigger or recipe"):
        evaluate(path, config, tmp_path / "second", resume=True, reporter=QUIET)
    words = ["evaluate", path, "--dataset", "digits", "--out", tmp_path / "third"]
    refused = cli(*words, "--set-number", 2)
    assert refused.exit_code == 2 and "there is no set 2" in refused.stderr


def test_a_file_of_one_set_has_no_other(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds one set: there is no set 1"):
        evaluate(finished, tiny(), tmp_path / "out", reading=SECOND, reporter=QUIET)
