"""Measure a set that lies finished in a folder or a file, with any victims."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...attacks import TestCase
from ...distill.files.artifact import export_png, load_set, quantised
from ...distill.types import DistilledSet
from ..config.schema import Config
from ..results.metrics import collect
from ..results.record import Record
from .cell import describe_set, draw_set, new_record
from .checks import check_same_run
from .folder import RunFolder
from .progress import Reporter
from .source import Source, check_fit, fingerprint, trigger_case
from .victims import Panel
from .workshop import Workshop, open_workshop


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
    distilled = with_recipe(found.load(workshop), workshop, given)
    check_fit(found.set_file, distilled, workshop)
    trigger = Path(trigger) if trigger else found.trigger_file
    record = new_record(workshop, given, "evaluate")
    record.recipe = distilled.recipe.describe()
    if png:
        distilled = quantised(distilled)
        record.labels.append("8-bit images: clipped to [0, 1] and rounded")
    record.distilled = describe_set(distilled) | {"source": str(source)}
    case = trigger_case(trigger, workshop, record)
    device = config.run.device
    twin = load_set(found.control) if found.control and case else None
    if twin is not None:
        twin = (quantised(twin) if png else twin).to(device)
    files = (found.set_file, trigger, found.control)
    record.distilled["fingerprint"] = fingerprint((distilled.recipe.describe(), png), files)
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


def with_recipe(distilled: DistilledSet, workshop: Workshop, given: Sequence[str]) -> DistilledSet:
    """The set's own recipe, changed only where the user asked for it.

    Steps that were learned give way to training by epochs as soon as anything of it is asked for.
    """
    wanted = workshop.recipe
    fields = {"victim_epochs": "epochs", "victim_lr": "lr", "victim_augment": "augment"}
    changes = {field: getattr(wanted, field) for key, field in fields.items() if key in given}
    if not changes:
        return distilled
    return replace(distilled, recipe=distilled.recipe.by_epochs(**changes))
