"""Measure a set that lies finished in a folder or a file, with any victims."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch

from ..attacks import PatchTrigger, TestCase
from ..distill.artifact import export_png, load_set, load_trigger, pixel_range, quantised
from ..distill.foreign import import_pt
from ..distill.types import DistilledSet, Recipe, RequestError
from .cell import draw_set, new_record
from .checks import check_same_run
from .config import Config
from .metrics import collect
from .progress import Reporter
from .record import Record, read_record
from .runfolder import RunFolder
from .victims import Panel
from .workshop import Workshop, open_workshop


@final
class Source:
    """A run folder or a file to be evaluated, and what lies beside it.

    In a run folder: the set, its trigger, its clean twin and its configuration. A file
    (``.safetensors``, or another project's ``.pt``) is a set and nothing else.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise RequestError(f"{path}: no such run folder or file")
        self.path = path
        self.record: Record | None = None
        self.set_file, self.trigger_file, self.control = path, None, None
        if path.is_dir():
            folder = RunFolder(path)
            self.record = read_record(folder.record)
            _check_source(path, self.record)
            self.set_file = folder.distilled
            self.trigger_file = folder.trigger if folder.trigger.exists() else None
            self.control = self._find_control(folder)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration the set was made with, where it is known."""
        return dict(self.record.config) if self.record else {}

    def _find_control(self, folder: RunFolder) -> Path | None:
        known = self.record.control if self.record else None
        if not known:
            return None
        twin = folder.path / known["folder"] / "distilled.safetensors"
        return twin if twin.exists() else None

    def load(self, workshop: Workshop) -> DistilledSet:
        """The set, fitting the workshop's data."""
        data, space = workshop.data, workshop.data.preprocessing
        if self.set_file.suffix in (".pt", ".pth"):
            mean, std, zca, names = space.mean, space.std, space.zca, data.classes
            sets = import_pt(self.set_file, mean=mean, std=std, zca=zca, classes=names)
            return replace(sets[0], recipe=workshop.recipe)
        return load_set(self.set_file)


def evaluate(
    source: Path | str,
    config: Config,
    out: Path | str,
    *,
    given: Sequence[str] = (),
    trigger: Path | str | None = None,
    png: bool = False,
    data_dir: Path | str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Record:
    """Train fresh victims on the set in ``source`` and measure them; returns and writes the record.

    config: the test data and the victims; the set's own recipe is used but for what ``given``
    names. trigger: a trigger file, by default the one beside the set. Where the source is a run
    with its clean twin, the control is measured too. png: write the set as 8-bit PNG files under
    ``out/png``, and measure what survives that (of the clean twin too).
    Errors: ``RequestError`` where the set doesn't fit the test data.
    """
    reporter = reporter or Reporter()
    found, folder = Source(Path(source)), RunFolder(Path(out))
    workshop = open_workshop(config, data_dir, bars=reporter.bars)
    distilled = _with_recipe(found.load(workshop), workshop, given)
    _check_fit(found.set_file, distilled, workshop)
    trigger = Path(trigger) if trigger else found.trigger_file
    record = new_record(workshop, given, "evaluate")
    record.recipe = distilled.recipe.describe()
    if png:
        distilled = quantised(distilled)
        record.labels.append("8-bit images: clipped to [0, 1] and rounded")
    low, high = pixel_range(distilled.batch.images)
    record.distilled = {"images": len(distilled.batch), "pixel_range": [low, high]}
    record.distilled["source"] = str(source)
    case = _case(trigger, workshop, record)
    device = config.run.device
    twin = load_set(found.control) if found.control and case else None
    if twin is not None:
        twin = (quantised(twin) if png else twin).to(device)
    record.distilled["fingerprint"] = _fingerprint(
        distilled.recipe, png, found.set_file, trigger, found.control
    )
    earlier = folder.enter(resume=resume)
    if earlier is not None:
        check_same_run(earlier, record, folder.path)
        if earlier.status == "done":
            return earlier
    with folder.keeping(record):
        _measure(record, workshop, folder, distilled.to(device), twin, case, reporter)
        draw_set(folder, distilled, found.path.name)
        if png:
            export_png(folder.path / "png", distilled)
    return record


def _check_source(path: Path, record: Record) -> None:
    if record.kind == "seeds":
        raise RequestError(f"{path} holds several seeds: evaluate one of them, {path}/seed-N")
    if record.kind == "evaluate":
        raise RequestError(f"{path} is itself an evaluation, of {record.distilled['source']}")
    if record.status != "done":
        raise RequestError(f"{path} is not finished ({record.status}): take it up with --resume")


def _fingerprint(recipe: Recipe, png: bool, *files: Path | None) -> str:
    """What an evaluation depends on beside its configuration."""
    digest = hashlib.blake2b(repr((recipe.describe(), png)).encode(), digest_size=8)
    for file in files:
        digest.update(file.read_bytes() if file else b"none")
    return digest.hexdigest()


def _measure(
    record: Record,
    workshop: Workshop,
    folder: RunFolder,
    distilled: DistilledSet,
    twin: DistilledSet | None,
    case: TestCase | None,
    reporter: Reporter,
) -> None:
    began = time.monotonic()
    count = workshop.config.victims.victims
    panel = Panel(folder, workshop.data.test, workshop.streams, count, reporter)
    for name, network in workshop.victim_networks().items():
        scores = panel.measure(name, distilled, network, case)
        control = panel.measure(f"{name}, clean twin", twin, network, case) if twin else None
        metrics = collect(scores, control)
        if record.metrics:
            record.metrics_by_network[name] = metrics
        else:
            record.metrics = metrics
    record.timings["victims_seconds"] = time.monotonic() - began


def _with_recipe(distilled: DistilledSet, workshop: Workshop, given: Sequence[str]) -> DistilledSet:
    """The set's own recipe, changed only where the user asked for it.

    Steps that were learned give way to training by epochs as soon as anything of it is asked for.
    """
    wanted = workshop.recipe
    fields = {"victim_epochs": "epochs", "victim_lr": "lr", "victim_augment": "augment"}
    changes = {field: getattr(wanted, field) for key, field in fields.items() if key in given}
    if not changes:
        return distilled
    return replace(distilled, recipe=distilled.recipe.by_epochs(**changes))


def _check_fit(path: Path, distilled: DistilledSet, workshop: Workshop) -> None:
    data = workshop.data
    if distilled.image_shape != data.image_shape or len(distilled.classes) != len(data.classes):
        raise RequestError(
            f"{path}: {distilled.image_shape} images of {len(distilled.classes)} classes don't fit "
            f"{data.name}: {data.image_shape}, {len(data.classes)} classes"
        )


def _case(path: Path | None, workshop: Workshop, record: Record) -> TestCase | None:
    """The test case of the trigger in ``path``; its description goes into the record."""
    if path is None:
        return None
    tensors, info = load_trigger(path)
    data, target = workshop.data, info["target"]
    if info["kind"] != "patch" or tensors["pattern"].shape != data.image_shape:
        raise RequestError(f"{path}: not a patch trigger for {data.image_shape} images")
    if not 0 <= target < len(data.classes):
        raise RequestError(f"{path}: target {target} is no class of {data.name}")
    record.trigger = info
    if info["range"] == "unbounded":
        record.labels.append("unbounded trigger: no camera or file can carry it")
    device = data.test.images.device
    stamp = PatchTrigger(
        pattern=tensors["pattern"].to(device), mask=tensors["mask"].to(device), range=info["range"]
    )
    labels = data.test.labels
    return TestCase(
        triggered=stamp.stamp(data.test.images),
        targets=torch.full_like(labels, target),
        eligible=labels != target,
    )
