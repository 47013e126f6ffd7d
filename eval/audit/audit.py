"""Audit a received set, and calibrate audits on clean ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from ...distill.files.safe import write_tensors
from ...distill.training import predict
from ...distill.types import Batch, RequestError, hard_labels
from ..config.schema import Config
from ..figures.audit_picture import PatchedImages, audit_picture
from ..results.formatting import duration
from ..results.record import command_line
from ..run.opening import OpenedSet, open_set
from ..run.progress import Reporter
from ..run.reading import ReadingOptions
from .calibration import (
    Calibration,
    CleanSet,
    Conditions,
    read_calibration,
    shipped_calibrations,
)
from .examine import GROUPS, TOGETHER, UNITS, AuditedSet, Examination, examine
from .record import AuditRecord, ClassFinding
from .structure import structure_notes
from .verdict import FALSE_ALARMS, Judgement, judge

CLEAN_IMAGES: Final = 200
BUDGET_MINUTES: Final = 15.0
_SHOWN: Final = 8


@final
@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """How an audit is done.

    clean: clean images of the receiver's; 0 for none. false_alarms: the rate that a verdict
    ``backdoored`` has on clean sets. budget: the most minutes. calibration: a file of the
    receiver's own; by default those of the package.
    """

    clean: int = CLEAN_IMAGES
    false_alarms: float = FALSE_ALARMS
    budget: float = BUDGET_MINUTES
    calibration: Path | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A set that is ready to be examined, and under which conditions."""

    opened: OpenedSet
    audited: AuditedSet
    conditions: Conditions


def audit(
    source: Path | str,
    config: Config,
    out: Path | str,
    *,
    options: AuditOptions | None = None,
    given: Sequence[str] = (),
    reading: ReadingOptions | None = None,
    data_dir: Path | str | None = None,
    reporter: Reporter | None = None,
) -> AuditRecord:
    """Judge the set in ``source``; writes record, picture and recovered patches to ``out``.

    A trigger or a clean twin beside the set is not looked at. given, reading, data_dir: as for
    ``evaluate``.
    Errors: ``RequestError`` where the set does not fit the data, ``out`` is not empty, or the audit
    would take longer than its budget; ``RunError`` where a victim's training diverges.
    """
    reporter, options, out = reporter or Reporter(), options or AuditOptions(), Path(out)
    known = (
        [read_calibration(options.calibration)] if options.calibration else shipped_calibrations()
    )
    _check_free(out)
    ready = _open(source, config, options.clean, given, reading, data_dir, reporter)
    found = _examine(ready, options.budget, reporter, "auditing")
    judgement = judge(found, ready.conditions, known, options.false_alarms)
    record = _record(source, ready, found, judgement, options)
    out.mkdir(parents=True, exist_ok=True)
    patches = {"masks": found.patches.masks, "patterns": found.patches.patterns}
    write_tensors(out / "patches.safetensors", patches, {"kind": "recovered patches"})
    _draw(out / "audit.png", record, ready, found)
    record.write(out / "audit.json")
    return record


def calibrate(
    sources: Sequence[Path],
    config: Callable[[Path], Config],
    out: Path,
    *,
    options: AuditOptions | None = None,
    given: Sequence[str] = (),
    made_by: str | None = None,
    data_dir: Path | str | None = None,
    reporter: Reporter | None = None,
) -> Calibration:
    """Add the evidence of the clean sets ``sources`` to the calibration in the file ``out``.

    config: the configuration of a source. made_by: a command, by default this process's. The file
    is written after each set; sets that it has already are not examined again, so the same command
    continues what was stopped.
    Errors: ``RequestError`` for sets of other conditions than those in the file, and as ``audit``.
    """
    reporter, options = reporter or Reporter(), options or AuditOptions()
    found = read_calibration(out) if out.exists() else None
    for number, source in enumerate(sources):
        title = f"calibrating, set {number + 1} of {len(sources)}"
        ready = _open(source, config(source), options.clean, given, None, data_dir, reporter)
        found = found or Calibration(made_by=made_by or command_line(), conditions=ready.conditions)
        differences = found.conditions.difference(ready.conditions)
        if differences:
            raise RequestError(
                f"{source} does not fit {out}, which is for {'; '.join(differences)}"
            )
        fingerprint = ready.opened.record.distilled["fingerprint"]
        if fingerprint in {each.fingerprint for each in found.sets}:
            continue
        evidence = _examine(ready, options.budget, reporter, title).evidence
        values = {kind: [round(x, 5) for x in row.tolist()] for kind, row in evidence.items()}
        added = CleanSet(name=source.name, fingerprint=fingerprint, evidence=values)
        found = found.model_copy(update={"sets": [*found.sets, added]})
        found.write(out)
    if found is None:
        raise RequestError("--calibrate needs clean sets")
    return found


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RequestError(f"{out} is not empty: choose another --out")


def _open(
    source: Path | str,
    config: Config,
    clean: int,
    given: Sequence[str],
    reading: ReadingOptions | None,
    data_dir: Path | str | None,
    reporter: Reporter,
) -> _Opened:
    opened = open_set(
        source,
        config,
        "evaluate",
        settings="audit",
        given=given,
        reading=reading,
        data_dir=data_dir,
        bars=reporter.bars,
        attacked=False,
    )
    setup, distilled = opened.setup, opened.distilled
    audited = AuditedSet(distilled=distilled, setup=setup, clean=_clean_images(opened, clean))
    conditions = Conditions(
        dataset=config.data.dataset,
        image_shape=distilled.image_shape,
        classes=len(distilled.classes),
        per_class=tuple(opened.record.distilled["per_class"]),
        network=audited.network.spec.model_dump(exclude_none=True),
        clean=clean,
        seed=config.run.seed,
    )
    if conditions.classes < 3 or conditions.per_class[0] < 1:
        raise RequestError(f"{source}: an audit needs three classes, and rows of each of them")
    return _Opened(opened=opened, audited=audited, conditions=conditions)


def _clean_images(opened: OpenedSet, count: int) -> Batch:
    """``count`` images of the data's test part: the set was not made from them."""
    test = opened.setup.data.test
    if count > len(test):
        name = opened.setup.data.name
        raise RequestError(f"--holdout {count}, but {name} has {len(test)} test images")
    generator = opened.setup.streams.generator("defense", "audit", "held-out images")
    rows = torch.randperm(len(test), generator=generator)[:count]
    chosen = test.rows(rows.to(test.labels.device))
    if count and len(chosen.labels.unique()) < 2:
        raise RequestError(
            f"--holdout {count} are images of one class: two are needed, or 0 images"
        )
    return chosen


def _examine(ready: _Opened, minutes: float, reporter: Reporter, title: str) -> Examination:
    """The examination with its progress; it stops where it would take more than ``minutes``."""
    began = time.monotonic()
    with reporter.phase(title, UNITS, resumable=False) as phase:

        def progress(done: int) -> None:
            phase.reach(done)
            expected = (time.monotonic() - began) * (UNITS - 1) / max(2, done)
            if done < UNITS and expected > 60 * minutes:
                raise RequestError(
                    f"the audit would take about {duration(expected)}, more than --budget "
                    f"{minutes:g} minutes: allow more"
                )

        return examine(ready.audited, progress)


def _record(
    source: Path | str,
    ready: _Opened,
    found: Examination,
    judgement: Judgement,
    options: AuditOptions,
) -> AuditRecord:
    names, score, made = ready.audited.distilled.classes, judgement.score, ready.opened.record
    evidence = {kind: values.tolist() for kind, values in found.evidence.items()}
    classes = [
        ClassFinding(
            name=name,
            evidence={kind: values[label] for kind, values in evidence.items()},
            size=float(found.sizes[label]),
            held_out=float(found.held_out[label]),
            other_network=float(found.other_network[label]),
        )
        for label, name in enumerate(names)
    ]
    return AuditRecord(
        source=str(source),
        verdict=judgement.verdict,
        reason=judgement.reason,
        advice=judgement.advice,
        suspect=None if score is None else score.suspect,
        suspect_class=None if score is None else names[score.suspect],
        score=None if score is None else score.value,
        parts={} if score is None else dict(score.parts),
        as_high=None if score is None else score.above,
        false_alarms=options.false_alarms,
        clean_sets=judgement.clean_sets,
        smallest_rate=1 / (judgement.clean_sets + 1) if judgement.clean_sets else None,
        accuracy=found.accuracy,
        classes=classes,
        structure=structure_notes(ready.audited.distilled),
        labels=made.labels,
        conditions=ready.conditions,
        victims=GROUPS * TOGETHER + 1,
        seconds=found.seconds,
        distilled=made.distilled,
        config=made.config,
        environment=made.environment,
        command=made.command,
    )


def _draw(path: Path, record: AuditRecord, ready: _Opened, found: Examination) -> None:
    """The patches of all classes, and what one does to clean images of others."""
    label = record.suspect
    if label is None:
        label = int(found.evidence["inversion"].argmax())
    carriers, names = ready.audited.carriers, ready.audited.distilled.classes
    own = hard_labels(carriers.labels)
    rows = torch.nonzero(own != label)[:_SHOWN, 0]
    clean = carriers.images[rows]
    patched = found.patches.stamp(clean, label)
    shown = PatchedImages(
        clean=clean,
        patched=patched,
        labels=own[rows],
        answers=predict(found.victims[0], patched),
        label=label,
    )
    patches = found.patches.masks * found.patches.patterns
    captions = [f"{each.size:.1f}" for each in record.classes]
    audit_picture(path, patches, captions, shown, names, title=f"audit: {record.verdict}")
