"""A whole cell: its files, record, reproducibility and control."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distillsec.distill.files.artifact import load_set, load_trigger
from distillsec.distill.files.safe import read_tensors
from distillsec.distill.types import RequestError, RunError
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.folder import RunFolder
from distillsec.eval.run.progress import Reporter

Tiny = Callable[..., Config]
QUIET = Reporter(quiet=True)


def walk(value: Any) -> Iterator[str]:
    """Every key and every string in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)
    elif isinstance(value, str):
        yield value


def test_the_folder_holds_the_documented_files(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("[!.]*")}
    own = {"record.json", "distilled.safetensors", "distilled.png", "curves.png", "progress.jsonl"}
    state = {"checkpoint", "checkpoint/state.safetensors"}
    attack = {"trigger.safetensors", "trigger.png", "triggered.png", "checkpoint/victims.json"}
    assert names == own | state | attack | {"control"} | {f"control/{n}" for n in own | state}
    for picture in finished.rglob("*.png"):
        with Image.open(picture) as opened:
            assert np.asarray(opened.convert("L")).std() > 1  # not blank
    rows = [json.loads(line) for line in (finished / "progress.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] > 0 and row["trigger_linf"] == 1 for row in rows)
    assert rows[0]["seconds"] < rows[-1]["seconds"]


def test_the_set_and_its_trigger_load(finished: Path) -> None:
    distilled, twin = (load_set(finished / f"{p}distilled.safetensors") for p in ("", "control/"))
    assert distilled.batch.images.shape == (10, 1, 8, 8)
    assert distilled.batch.labels.tolist() == list(range(10))
    assert distilled.recipe.epochs == 3
    assert not distilled.batch.images.equal(twin.batch.images)
    tensors, info = load_trigger(finished / "trigger.safetensors")
    assert tensors["pattern"].shape == (1, 8, 8) and tensors["mask"].sum() == 4
    assert (info["target"], info["target_class"], info["range"]) == (0, "0", "pixel")


@pytest.mark.parametrize("part", ["", "control/"])
def test_the_set_says_nothing_of_the_attack(finished: Path, part: str) -> None:
    tensors, info = read_tensors(finished / f"{part}distilled.safetensors")
    assert set(tensors) == {"images", "labels"}
    words = " ".join(walk(info)).lower()
    assert "epochs" in words
    for word in ("trigger", "poison", "attack", "target", "seed", "path", "naive", str(finished)):
        assert word not in words


def test_the_record_holds_the_documented_fields(finished: Path) -> None:
    text = (finished / "record.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    record = json.loads(text)
    assert (record["schema_version"], record["kind"], record["status"]) == (1, "attack", "done")
    assert record["error"] is None and record["conditional_on_set"] is True
    assert record["config"]["seed"] == 0 and record["config"]["lr_img"] == 0.1
    assert "iterations" in record["config_given"] and "lr_img" not in record["config_given"]
    assert record["hooks"] == [{"name": "naive", "threat_model": "data owner"}]
    around = record["environment"]
    assert {"commit", "dirty", "python", "platform", "device_name", "started"} <= around.keys()
    assert around["threads"] == 1 and around["versions"]["torch"]
    trigger = record["trigger"]
    assert (trigger["target"], trigger["range"], trigger["max"]) == (0, "pixel", 1)
    assert 5 < trigger["psnr"] < 40 and 0 < trigger["ssim"] < 1
    assert record["attack_counters"] == {"poisoned_rows": 130}  # a tenth of 1,297
    assert record["control"]["folder"] == "control" and not record["control"]["reused"]
    assert record["control"]["key"] == record["control_key"]
    assert set(record["timings"]) == {"distil_seconds", "control_seconds", "victims_seconds"}
    assert record["distilled"]["images"] == 10 and record["distilled"]["rms_from_twin"] > 0


def test_the_metrics_summarise_their_values(finished: Path) -> None:
    metrics = read_record(finished / "record.json").metrics
    rates = {"clean_test_accuracy", "attack_success_rate", "attack_success_rate_all"}
    assert metrics.keys() >= rates | {f"control_{name}" for name in rates} | {"backdoor_gain"}
    for summary in metrics.values():
        values = [value for value in summary.values if value is not None]
        assert len(values) == 2 and summary.ci95 is None  # two values have no interval
        assert summary.mean == pytest.approx(np.mean(values))
        assert summary.std == pytest.approx(np.std(values, ddof=1))
    ours, theirs = metrics["attack_success_rate"], metrics["control_attack_success_rate"]
    pairs = zip(ours.values, theirs.values, strict=True)
    gains = [a - b for a, b in pairs if a is not None and b is not None]
    assert metrics["backdoor_gain"].values == pytest.approx(gains)


def test_the_twin_is_a_finished_clean_run(finished: Path) -> None:
    attacked, twin = (read_record(finished / f"{p}record.json") for p in ("", "control/"))
    assert (twin.kind, twin.status, twin.hooks, twin.trigger) == ("distill", "done", [], None)
    assert twin.control_key == attacked.control_key
    found = twin.metrics["clean_test_accuracy"]
    assert found == attacked.metrics["control_clean_test_accuracy"]
    assert not {"attack", "target", "poison_rate"} & twin.config.keys()


def test_the_same_seed_repeats_to_the_bit_and_another_does_not(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    same = run_cell(tiny(), tmp_path / "same", reporter=QUIET)
    other = run_cell(tiny(seed=1, control=False), tmp_path / "other", reporter=QUIET)
    assert same.metrics == read_record(finished / "record.json").metrics
    for name in ("distilled.safetensors", "trigger.safetensors", "control/distilled.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (finished / name).read_bytes()
    name = "distilled.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (finished / name).read_bytes()
    assert other.metrics["clean_test_accuracy"] != same.metrics["clean_test_accuracy"]


def test_without_control_there_is_none(tmp_path: Path, tiny: Tiny) -> None:
    record = run_cell(tiny(control=False), tmp_path / "run", reporter=QUIET)
    assert record.control is None and not (tmp_path / "run" / "control").exists()
    assert record.metrics["attack_success_rate"].mean is not None
    assert not [name for name in record.metrics if "control" in name or "gain" in name]


def test_a_twin_is_reused(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    twin, out = finished / "control", tmp_path / "run"
    record = run_cell(tiny(), out, control_run=twin, reporter=QUIET)
    assert record.metrics == read_record(finished / "record.json").metrics
    assert not (out / "control").exists() and "control_seconds" not in record.timings
    assert record.control is not None and record.control["reused"]
    assert (out / record.control["folder"]).resolve() == twin.resolve()
    bigger = run_cell(tiny(trigger_size=4), tmp_path / "b", control_run=twin, reporter=QUIET)
    assert bigger.mean("control_clean_test_accuracy") == record.mean("control_clean_test_accuracy")
    assert bigger.trigger != record.trigger


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ipc": 2}, r"differs in ipc 2 \(was 1\)"),
        ({"seed": 4, "width": 8}, r"seed 4 \(was 0\), width 8 \(was 4\)"),
        ({"control": False}, "not with --no-control"),
    ],
)
def test_a_run_that_is_no_twin_is_refused(
    finished: Path, tiny: Tiny, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        run_cell(tiny(**changes), tmp_path / "run", control_run=finished / "control")
    assert not (tmp_path / "run").exists()


def test_an_unfinished_or_damaged_twin_is_refused(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    record = read_record(finished / "control" / "record.json")
    for changes, message in (
        ({"status": "running"}, "no finished clean run: distill, running"),
        ({"dataset": {**record.dataset, "fingerprint": "0"}}, "digits has changed"),
        ({}, "distilled.safetensors: no such file"),
    ):
        record.model_copy(update=changes).write(twin / "record.json")
        with pytest.raises(RequestError, match=message):
            run_cell(tiny(), tmp_path / "run", control_run=twin)
    with pytest.raises(RequestError, match="no finished clean run: attack, done"):
        run_cell(tiny(), tmp_path / "run", control_run=finished)
    assert not (tmp_path / "run").exists()


def test_every_victim_network_has_its_own_metrics(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny(victim_network=("mlp", "convnet"), control=False)
    record = run_cell(config, tmp_path / "run", reporter=QUIET)
    assert list(record.metrics_by_network) == ["convnet"]
    both = record.metrics, record.metrics_by_network["convnet"]
    assert both[0].keys() == both[1].keys()
    assert [len(m["clean_test_accuracy"].values) for m in both] == [2, 2]
    assert both[0]["clean_test_accuracy"] != both[1]["clean_test_accuracy"]


def test_an_unbounded_trigger_is_labelled(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny(trigger_range="unbounded", control=False, victims=1)
    record = run_cell(config, tmp_path / "run", reporter=QUIET)
    assert record.trigger is not None and record.trigger["range"] == "unbounded"
    assert record.labels == ["unbounded trigger: no camera or file can carry it"]
    assert record.metrics["clean_test_accuracy"].ci95 is None  # one victim has no interval


@pytest.mark.parametrize("error", [RunError("the loss is nan"), ZeroDivisionError("no rows")])
def test_a_failing_run_says_so_in_its_record(
    tmp_path: Path, tiny: Tiny, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("distillsec.eval.run.cell.Panel.measure", fail)
    with pytest.raises(type(error)):
        run_cell(tiny(control=False), tmp_path / "run", reporter=QUIET)
    record: Record = read_record(RunFolder(tmp_path / "run").record)
    assert record.status == "error" and str(error) in str(record.error)
    assert record.metrics == {}
    assert read_tensors(tmp_path / "run" / "checkpoint" / "state.safetensors")
    monkeypatch.undo()
    again = run_cell(tiny(control=False), tmp_path / "run", resume=True, reporter=QUIET)
    assert (again.status, again.error) == ("done", None)


def test_diverging_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, tiny: Tiny
) -> None:
    with pytest.raises(RunError, match="diverged"):
        run_cell(tiny(lr_img=1e30, iterations=5), tmp_path / "run", reporter=QUIET)
    record = read_record(tmp_path / "run" / "record.json")
    assert record.status == "error" and "diverged" in str(record.error)
    assert not (tmp_path / "run" / "distilled.safetensors").exists()
    kept, _ = read_tensors(tmp_path / "run" / "checkpoint" / "state.safetensors")
    assert kept["leaf"].isfinite().all()


def test_what_saving_would_refuse_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"recipe.epochs: .* 10000, not 10001"):
        run_cell(tiny(victim_epochs=10_001), tmp_path / "out", reporter=QUIET)
    assert not (tmp_path / "out").exists()
