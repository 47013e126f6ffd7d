"""The command that converts sets between the formats of this and other projects: ``convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..distill.files.formats import FORMATS
from ..distill.files.formats.writers import WRITERS
from ..distill.types import Recipe
from ..eval.run.convert import Conversion
from ..eval.run.convert import convert as convert_set
from ..eval.run.progress import Reporter
from . import options
from .exits import printable, write_out

_MOST_FILES = 5


@click.command()
@click.argument("source", metavar="IN", type=options.PATH)
@click.argument("out", metavar="OUT", type=options.PATH)
@click.option(
    "--format", "form", metavar="NAME", help=f"{', '.join(WRITERS)} (default: by OUT's name)."
)
@options.READING
@options.DATA
@options.MACHINE
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def convert(
    source: Path, out: Path, form: str | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Convert a set between the formats of this and other projects.

    IN is a run folder, or a file or folder of this or another project: .pt files of DC, DSA, DM,
    IDM, DataDAM, IDC, NCFM, MTT and DATM, folders of DD-Ranking, image folders, tables of the
    Hugging Face hub, .npz, safetensors. No code of a file runs. What was assumed and what is lost
    is reported.

    \b
    To this suite's format; in which space the values are is found out, or given with --space:
        distillsec convert res_DC_CIFAR10.pt set.safetensors --dataset cifar10
        distillsec convert images_best.pt set.safetensors --dataset cifar10 --space zca
        distillsec convert cifar10_ipc10.pt set.safetensors --dataset cifar10 --factor 2
    To the formats of others; the ending, or a name with "images", says which:
        distillsec convert runs/a set.pt            # as DC, DSA and DM write it
        distillsec convert runs/a images_best.pt    # with labels_best.pt and lr_best.pt, as MTT
        distillsec convert runs/a set.npz
        distillsec convert runs/a pictures          # a folder of PNG files
    """
    reading = options.take_reading(given)
    data_dir = given["data_dir"]
    config = options.data_configuration(given) if given["dataset"] else None
    done = convert_set(
        source,
        out,
        form=form,
        config=config,
        reading=reading,
        data_dir=data_dir,
        bars=Reporter(quiet=quiet or as_json).bars,
    )
    write_out(json.dumps(done.describe(), indent=2) if as_json else printable(_text(done)))


def _recipe_note(recipe: Recipe) -> str:
    augment = f"augmentation {recipe.augment}" if recipe.augment else "no augmentation"
    trained = f"{recipe.epochs} epochs at the rate {recipe.lr:.3g}, {augment}"
    return f"no recipe is in the files: the default one is written ({trained})"


def _text(done: Conversion) -> str:
    """The report for people."""
    batch, read = done.distilled.batch, done.read
    kind = "soft labels" if batch.labels.ndim == 2 else "hard labels"
    shape = "×".join(map(str, done.distilled.image_shape))
    classes = len(done.distilled.classes)
    lines = [f"{done.source}: {len(batch)} images {shape}, {classes} classes, {kind}"]
    if read is not None:
        lines.append(f"  format: {read.form} ({FORMATS[read.form].description})")
        lines += [f"  ! {note}" for note in (*read.notes, _recipe_note(done.distilled.recipe))]
    files = [str(file) for file in done.files[:_MOST_FILES]]
    if len(done.files) > _MOST_FILES:
        files.append(f"… {len(done.files)} files in all")
    lines += [f"{done.form}: {WRITERS[done.form].description}", *(f"  {file}" for file in files)]
    lines += [f"  lost: {each}" for each in done.lost] or ["  nothing is lost"]
    return "\n".join(lines)
