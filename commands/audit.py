"""The command for who received a set: ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from ..eval.audit.audit import (
    BUDGET_MINUTES,
    CLEAN_IMAGES,
    AuditOptions,
    calibrate,
)
from ..eval.audit.audit import audit as audit_set
from ..eval.audit.report import audit_text
from ..eval.audit.verdict import FALSE_ALARMS
from ..eval.run.progress import Reporter
from . import options
from .exits import printable, write_out

BACKDOORED: Final = 3
"""The exit code where the set was judged backdoored."""


@click.command()
@click.argument("sources", type=options.PATH, nargs=-1, required=True, metavar="SET")
@options.READING
@click.option(
    "--holdout",
    type=click.IntRange(0),
    default=CLEAN_IMAGES,
    show_default=True,
    help="Clean images of yours; 0 for none.",
)
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=FALSE_ALARMS,
    show_default=True,
    help="The share of clean sets that may be judged backdoored.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    default=BUDGET_MINUTES,
    show_default=True,
    help="The most minutes.",
)
@click.option("--calibration", type=options.PATH, help="A file of your own (default: ours).")
@click.option(
    "--calibrate",
    "calibrated",
    type=options.PATH,
    metavar="FILE",
    help="Add the clean sets SET … to this calibration, and judge nothing.",
)
@options.CONFIGURATION
@options.DATA
@options.MACHINE
@click.option("--out", type=options.PATH, help="Folder (default: a fresh one under runs/).")
@click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def audit(
    sources: tuple[Path, ...],
    holdout: int,
    false_alarms: float,
    budget: float,
    calibration: Path | None,
    calibrated: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Should I train on this set that I was sent?

    SET is a file or folder of this or another project, or a run folder. Victims are trained on it
    and searched for triggers; nothing of a file runs. Exit code 3: judged backdoored.

    \b
        distillsec audit received.safetensors --dataset digits
        distillsec audit images_best.pt --dataset cifar10 --holdout 500
    Where no calibration fits, with clean sets that you made yourself:
        distillsec audit clean/* --dataset cifar10 --calibrate mine.json
        distillsec audit images_best.pt --dataset cifar10 --calibration mine.json
    """
    reading = options.take_reading(given)
    # A run folder's record has a seed too; victims are the receiver's own.
    given = {**given, "resume": False, "seed": given["seed"] or 0}
    chosen = AuditOptions(
        clean=holdout, false_alarms=false_alarms, budget=budget, calibration=calibration
    )
    reporter = Reporter(quiet=quiet or as_json)
    if calibrated is not None:
        keys = options.configuration(given, source=sources[0])[1]
        made = calibrate(
            sources,
            lambda source: options.configuration(given, source=source)[0],
            calibrated,
            options=chosen,
            given=keys,
            data_dir=given["data_dir"],
            reporter=reporter,
        )
        write_out(
            f"{calibrated}: {len(made.sets)} clean sets; "
            f"the smallest rate of false alarms is {made.smallest_rate:.1%}"
        )
        return
    if len(sources) > 1:
        raise click.UsageError("one SET is audited at a time; several are for --calibrate")
    config, keys = options.configuration(given, source=sources[0])
    folder = out or options.out_folder({**given, "out": None}, f"audit-{sources[0].stem or 'set'}")
    record = audit_set(
        sources[0],
        config,
        folder,
        options=chosen,
        given=keys,
        reading=reading,
        data_dir=given["data_dir"],
        reporter=reporter,
    )
    write_out(
        record.model_dump_json(indent=2) if as_json else printable(audit_text(record, folder))
    )
    if record.verdict == "backdoored":
        click.get_current_context().exit(BACKDOORED)
