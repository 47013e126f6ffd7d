"""The commands that run one configuration: ``attack``, ``distill``, ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..distill.types import RequestError
from ..eval.config.schema import Config
from ..eval.results.blocks import Block
from ..eval.results.record import RecordKind
from ..eval.results.run_table import run_blocks
from ..eval.run.cell import run_cell
from ..eval.run.evaluate import evaluate as evaluate_set
from ..eval.run.folder import RunFolder
from ..eval.run.intercept import intercept
from ..eval.run.reading import ReadingOptions
from ..eval.run.seeds import run_seeds
from ..eval.run.survival import evaluate_survival
from . import options
from .exits import stoppable, write_out
from .terminal import write_blocks


@click.command()
@options.CONFIGURATION
@options.DATA
@options.DISTILLATION
@options.ATTACK
@options.INTERCEPTED
@options.VICTIMS
@options.CONTROL
@options.MACHINE
@options.SEEDS
@options.OUTPUT
def attack(on: Path | None, **given: Any) -> None:
    """Distil under an attack, with its clean twin; measure both.

    \b
    A first example on digits, 2 minutes on two cores:
        distillsec attack --preset digits-naive --out runs/a
    The same attack with a larger patch, five distillation seeds:
        distillsec attack --preset digits-naive --trigger-size 4 --seeds 5
    Your own images (folders train/CLASS and test/CLASS) and your own attack:
        distillsec attack --dataset folder:photos --attack mypackage.mine:MyAttack
    Resume a run that was stopped:
        distillsec attack --preset digits-naive --out runs/a --resume
    Attack a finished set, without its training images; the received set is the clean twin:
        distillsec attack --on runs/clean --attack poisoned-set --out runs/poisoned
        distillsec attack --on received.safetensors --dataset digits --attack poisoned-set

    Without a preset the published settings hold; they need a GPU.
    """
    reading = options.take_reading(given)
    if _show_finished(given, "attack"):
        return
    if on is not None:
        _intercept(on, reading, given)
        return
    if reading != ReadingOptions():
        raise RequestError(
            "--set-number, --space, --factor and --labels are for a received set: name it with "
            "--on FILE"
        )
    config, keys = options.configuration(given)
    if config.attack is None:
        raise RequestError("no attack was chosen: --attack NAME, see `distillsec list attacks`")
    _run(config, keys, given)


@click.command()
@options.CONFIGURATION
@options.DATA
@options.DISTILLATION
@options.VICTIMS
@options.MACHINE
@options.SEEDS
@options.OUTPUT
def distill(**given: Any) -> None:
    """Distil without an attack; measure clean test accuracy.

    \b
        distillsec distill --preset digits-dc
        distillsec distill --preset digits-mtt --buffer experts   # keeps the experts for later runs
        distillsec distill --dataset fashion-mnist --backend dsa --ipc 10 --device cuda
    """
    if _show_finished(given, "distill"):
        return
    config, keys = options.configuration(given, clean=True)
    _run(config, keys, given)


@click.command()
@click.argument("source", type=options.PATH)
@options.READING
@click.option("--trigger", type=options.PATH, help="A trigger file (default: the run's own).")
@click.option("--png", is_flag=True, help="Write 8-bit PNG files; measure the rounded images.")
@click.option(
    "--survival", is_flag=True, help="Measure also other formats, networks, recipes and sizes."
)
@options.CONFIGURATION
@options.DATA
@options.VICTIMS
@options.TWIN
@options.MACHINE
@options.OUTPUT
def evaluate(
    source: Path,
    trigger: Path | None,
    png: bool,
    survival: bool,
    **given: Any,
) -> None:
    """Train fresh victims on a finished set.

    SOURCE is a run folder, or a file or folder of this or another project. A record is data: no
    class that it names is imported, and no path in it is followed, unless --trust says that the run
    is your own.

    \b
    Other architectures than the one that distilled:
        distillsec evaluate runs/a --victim-network mlp --victim-network convnet-baadd
    What survives 8-bit files, other networks, other recipes and the loss of rows? One table:
        distillsec evaluate runs/a --survival
    A file from somebody else, on the data it was distilled from:
        distillsec evaluate received.safetensors --dataset fashion-mnist
    Another project's: in which space its values are is found out and reported, or given:
        distillsec evaluate res_DC_CIFAR10.pt --dataset cifar10 --set-number 2
        distillsec evaluate images_best.pt --dataset cifar10 --space zca
    A run of your own with your own network or data:
        distillsec evaluate runs/mine --trust
    """
    reading = options.take_reading(given)
    if png and survival:
        raise RequestError("--survival measures 8-bit images too: leave out --png")
    config, keys = options.configuration(given, source=source)
    control_run = options.trusted_control(source, given)
    out = options.out_folder(given, f"evaluate-{source.stem or 'set'}")
    arguments = {
        "given": keys,
        "reading": reading,
        "trigger": trigger,
        "control_run": control_run,
        **options.run_arguments(given),
    }
    with stoppable(out):
        if survival:
            record = evaluate_survival(source, config, out, **arguments)
        else:
            record = evaluate_set(source, config, out, png=png, **arguments)
    show(run_blocks(record, out), out, given)


def _intercept(source: Path, reading: ReadingOptions, given: options.Given) -> None:
    """Attack a finished set, and show the record."""
    for name in ("seeds", "buffer", "control_run"):
        if given[name] is not None:
            option = f"--{name.replace('_', '-')}"
            raise RequestError(f"{option} is for attacks that distil: leave it out with --on")
    config, keys = options.configuration(given, source=source, attacked_anew=True)
    out = options.out_folder(given, f"{config.attack}-{source.stem or 'set'}")
    arguments = options.run_arguments(given)
    with stoppable(out):
        record = intercept(source, config, out, given=keys, reading=reading, **arguments)
    show(run_blocks(record, out), out, given)


def _show_finished(given: options.Given, kind: RecordKind) -> bool:
    """Show the run that is to be resumed, if it is finished and nothing else is asked for.

    Returns whether it was shown. Nothing has to be known then of its classes, data or machine.
    """
    if not options.only_resumes(given):
        return False
    out = options.out_folder(given, "")
    record = RunFolder(out).look(resume=True)
    if record is None or (record.kind, record.status) != (kind, "done"):
        return False
    show(run_blocks(record, out), out, given)
    return True


def _run(config: Config, keys: Sequence[str], given: options.Given) -> None:
    """Run one seed or several, and show the record."""
    seeds, control_run = given["seeds"], given.get("control_run")
    reference_run = given.get("reference_run")
    if seeds is not None and control_run is not None:
        raise RequestError("--control-run is the twin of one seed: leave it out with --seeds")
    if seeds is not None and reference_run is not None:
        raise RequestError("with --seeds the clean twins are each other's --reference-run")
    name = given["preset"] or f"{config.set.backend}-{config.attack or 'clean'}"
    out = options.out_folder(given, name)
    buffer = options.trusted_buffer(given)
    arguments = {"given": keys, "buffer": buffer, **options.run_arguments(given)}
    with stoppable(out):
        if seeds is None:
            record = run_cell(
                config, out, control_run=control_run, reference_run=reference_run, **arguments
            )
        else:
            record = run_seeds(config, seeds, out, **arguments)
    show(run_blocks(record, out), out, given)


def show(blocks: Sequence[Block], out: Path, given: options.Given) -> None:
    """A summary, or with --json the record in ``out`` and nothing else."""
    if given["as_json"]:
        write_out(RunFolder(out).record.read_text(), newline=False)
    else:
        write_blocks(blocks)
