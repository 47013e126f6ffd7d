"""The commands of the defender's bench: ``defend`` and ``shadows``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..defenses.base import Budget
from ..defenses.common.shadows import ShadowOptions
from ..eval.bench.defend import defend as defend_set
from ..eval.bench.options import BenchOptions, choose_defenses
from ..eval.bench.zoo import make_zoo
from ..eval.config.layers import by_owner
from ..eval.config.schema import build_options
from ..eval.results.defend_table import defend_blocks
from ..eval.run.own_network import with_own_network
from ..eval.run.progress import Reporter
from ..eval.run.source import SetFiles
from . import options
from .exits import leave, stoppable, write_out
from .runs import show


@click.command()
@click.argument("source", type=options.PATH)
@options.READING
@options.DEFENSES
@options.CONFIGURATION
@options.DATA
@options.VICTIMS
@options.TWIN
@options.MACHINE
@options.OUTPUT
def defend(
    source: Path,
    trigger: Path | None,
    defense: tuple[str, ...],
    defense_options: tuple[str, ...],
    budget: Budget,
    holdout: int,
    images: int | None,
    **given: Any,
) -> None:
    """Measure defenses on a finished set.

    SOURCE is a run folder or a file; its record is data, as for `evaluate`.

    \b
    The whole catalogue on an attack and its clean twin, about 2 minutes on digits:
        distillsec defend runs/a
    Some of them with their published settings and more clean images for the defender:
        distillsec defend runs/a --defense strip --defense scan --budget paper --holdout 200
        distillsec defend runs/a --defense strip --option strip.copies=50
    Your own defense, and a set from somebody else:
        distillsec defend runs/a --defense mypackage.mine:MyDefense
        distillsec defend received.safetensors --dataset fashion-mnist

    `distillsec list defenses` lists them. Of a file without --trigger only the figures that need
    no trigger are measured.
    """
    reading = options.take_reading(given)
    config, keys = options.configuration(given, source=source)
    control_run = options.trusted_control(source, given)
    chosen = choose_defenses(list(defense) or ["all"], budget, by_owner(defense_options))
    bench = build_options(
        BenchOptions, {"budget": budget, "holdout": holdout, "images": images}, "defend"
    )
    out = options.out_folder(given, f"defend-{source.stem or 'set'}")
    with stoppable(out):
        record = defend_set(
            source,
            config,
            out,
            defenses=chosen,
            options=bench,
            given=keys,
            reading=reading,
            trigger=trigger,
            control_run=control_run,
            **options.run_arguments(given),
        )
    show(defend_blocks(record, out), out, given)
    failed = [name for name, outcome in record.defenses.items() if outcome.status == "error"]
    if failed:
        leave(click.get_current_context(), 1, f"{', '.join(failed)} failed: see the table")


@click.command()
@click.argument("source", type=options.PATH)
@options.SHADOWS
@options.CONFIGURATION
@options.DATA
@options.VICTIMS
@options.MACHINE
def shadows(
    source: Path,
    out: Path,
    images: int,
    resume: bool,
    quiet: bool,
    pairs: int,
    shadow_epochs: int,
    shadow_batch: int,
    **given: Any,
) -> None:
    """Train the shadow networks that MNTD needs.

    Half of them are clean, half have backdoors. They have the architecture of SOURCE's victims;
    SOURCE is a run folder or a file.

    \b
    Once, in a few minutes; then for any set whose victims are such networks:
        distillsec shadows runs/a --pairs 128 --out zoo.safetensors
        distillsec defend runs/a --defense mntd --option mntd.zoo=zoo.safetensors
    Add more later:
        distillsec shadows runs/a --pairs 512 --out zoo.safetensors --resume
    """
    config, keys = options.configuration({**given, "resume": False}, source=source)
    config, warnings = with_own_network(config, SetFiles(source), keys)
    reporter = Reporter(quiet=quiet)
    for warning in warnings:
        reporter.say(f"warning: {warning}")
    chosen = build_options(
        ShadowOptions, {"pairs": pairs, "epochs": shadow_epochs, "batch": shadow_batch}, "shadows"
    )
    with stoppable(out):
        zoo = make_zoo(
            config,
            out,
            chosen,
            images=images,
            data_dir=given["data_dir"],
            resume=resume,
            reporter=reporter,
        )
    write_out(f"{len(zoo)} shadows, half of them with backdoors: {out}")
