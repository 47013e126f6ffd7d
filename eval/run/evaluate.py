"""Measure a finished set, in a run folder or a file, with any victims."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ...distill.files.artifact import export_png
from ..config.schema import Config
from ..results.metrics import collect
from ..results.record import Record
from .cell import draw_set
from .folder import RunFolder
from .opening import OpenedSet, Source, name_of, open_set
from .progress import Reporter
from .reading import ReadingOptions
from .victims import Panel


def evaluate(
    source: Source,
    config: Config,
    out: Path | str,
    *,
    given: Sequence[str] = (),
    reading: ReadingOptions | None = None,
    trigger: Path | str | None = None,
    control_run: Path | str | None = None,
    png: bool = False,
    data_dir: Path | str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Record:
    """Train fresh victims on the set in ``source`` and measure them; returns and writes the record.

    source: a run's folder, a file, or a ``DistilledSet``.
    config: the test data and the victims; the set's own recipe is used, with the overrides that
    ``given`` names, and its own network unless ``config`` sets one. reading: how another project's
    files are to be read. trigger: a trigger file, by default the one beside the set. If the source
    is a run with a clean twin, in its folder or in ``control_run``, the control is measured too.
    png: write the set as 8-bit PNG files under ``out/png``, and measure the rounded images (of the
    clean twin too).
    Errors: ``RequestError`` where the set doesn't fit the test data.
    """
    reporter, folder = reporter or Reporter(), RunFolder(Path(out))
    opened = open_set(
        source,
        config,
        "evaluate",
        settings=png,
        given=given,
        reading=reading,
        trigger=trigger,
        control_run=control_run,
        data_dir=data_dir,
        bars=reporter.bars,
        eight_bits=png,
    )
    record = opened.record
    with folder.entered(record, resume=resume) as earlier:
        if earlier is not None and earlier.status == "done":
            return earlier
        with folder.keeping(record):
            _measure(opened, folder, reporter)
            draw_set(folder, opened.distilled, Path(name_of(source)).name)
            if png:
                export_png(folder.path / "png", opened.distilled)
    return record


def _measure(opened: OpenedSet, folder: RunFolder, reporter: Reporter) -> None:
    began = time.monotonic()
    record, setup, case, twin = opened.record, opened.setup, opened.case, opened.twin
    count = setup.config.victims.victims
    panel = Panel(folder, setup.data.test, setup.streams, count, reporter)
    for name, network in setup.victim_networks.items():
        scores = panel.measure(name, opened.distilled, network, case)
        control = panel.measure(f"{name}, clean twin", twin, network, case) if twin else None
        metrics = collect(scores, control)
        if record.metrics:
            record.metrics_by_network[name] = metrics
        else:
            record.metrics = metrics
    record.timings["victims_seconds"] = time.monotonic() - began
