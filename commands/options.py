"""The command line's options, in groups, and the configuration that they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import yaml

from ..attacks.triggers import TriggerRange
from ..defenses.base import Budget
from ..distill.engine import Precision, Speed
from ..distill.files.spaces import SPACES
from ..distill.types import RequestError
from ..eval.config.layers import for_clean, gather, without_attack
from ..eval.config.schema import Config, configure
from ..eval.results.record import read_record
from ..eval.run.folder import RunFolder, fresh_folder
from ..eval.run.progress import Reporter
from ..eval.run.reading import ReadingOptions
from ..eval.run.recorded import resumed_keys, source_keys
from ..eval.run.source import SetFiles
from .exits import write_out

Command = TypeVar("Command", bound=Callable[..., Any])
Given = dict[str, Any]
"""A command's options by name, as click parsed them."""


class _PathType(click.Path):
    """A path; an empty one is refused: it would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a path, got an empty one", param, ctx)
        return super().convert(value, param, ctx)


PATH = _PathType(path_type=Path)

# Options that say how a command behaves; all others are keys of the configuration.
_NO_KEYS = {"preset", "file", "settings", "print_config", "data_dir", "control_run", "seeds"}
_NO_KEYS |= {"reference_run", "buffer", "out", "resume", "trust", "as_json", "quiet"}
_READING = ("set_number", "space", "factor", "labels")


def _group(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several click options as one decorator, in reading order."""

    def decorate(command: Command) -> Command:
        return functools.reduce(lambda done, option: option(done), reversed(options), command)

    return decorate


CONFIGURATION = _group(
    click.option("--preset", metavar="NAME", help="Start from a preset (see `list presets`)."),
    click.option("--config", "file", type=PATH, help="YAML file of keys; options win over it."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key."),
    click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop."),
    click.option(
        "--trust",
        is_flag=True,
        help="Use the classes, paths, device and threads in a run folder's record: a run of yours.",
    ),
)
DATA = _group(
    click.option("--dataset", metavar="NAME", help="A name, folder:PATH or npz:PATH."),
    click.option("--data-dir", type=PATH, help="Folder with data sets, also for downloads."),
    click.option("--image-size", type=int, help="Resize images to this side."),
    click.option("--zca/--no-zca", default=None, help="Whiten the images (mtt's CIFAR figures)."),
)
DISTILLATION = _group(
    click.option("--backend", metavar="NAME", help="Distillation backend (see `list backends`)."),
    click.option("--network", metavar="NAME", help="Distilling network, or package.module:Class."),
    click.option("--width", type=int, help="Its width."),
    click.option("--depth", type=int, help="Its depth."),
    click.option("--norm", metavar="NAME", help="Its norm: instance, batch, layer, group, none."),
    click.option("--ipc", type=int, help="Images per class."),
    click.option("--iterations", type=int, help="Outer iterations."),
    click.option("--init", metavar="NAME", help="Start from noise, real or poisoned rows."),
)
ATTACK = _group(
    click.option("--attack", metavar="NAME", help="Attack (see `list attacks`), or a class."),
    click.option("--target", type=int, help="Target class number."),
    click.option(
        "--goal", metavar="NAME", help="all-to-one (default), one-to-one or all-to-all (classes)."
    ),
    click.option("--source", type=int, help="Source class number, for goal one-to-one."),
    click.option("--poison-rate", type=float, help="Poisoned rows / training set size."),
    click.option("--target-share", type=float, help="Poisoned share of the target's batches."),
    click.option("--trigger-size", type=int, help="Side of the trigger in pixels."),
    click.option("--trigger-image", metavar="FILE", help="PNG or JPEG file as the trigger."),
    click.option("--trigger-range", metavar="|".join(get_args(TriggerRange)), help="Its values."),
    click.option("--objective", metavar="NAME", help="What Doorping optimises its trigger for."),
)
VICTIMS = _group(
    click.option("--victims", type=int, help="Networks trained on the set."),
    click.option("--victim-network", multiple=True, metavar="NAME", help="Theirs; repeatable."),
    click.option("--victim-epochs", type=int, help="Their training epochs."),
)
CONTROL = _group(
    click.option("--control/--no-control", default=None, help="Distil the clean twin too."),
    click.option("--control-run", type=PATH, help="Reuse a finished clean twin's folder."),
    click.option(
        "--reference-run",
        type=PATH,
        help="A clean run of another seed: how far apart are two clean sets?",
    ),
)
TWIN = _group(
    click.option(
        "--control-run", type=PATH, help="The clean twin's folder (default: in the run's own)."
    ),
)
MACHINE = _group(
    click.option("--seed", type=int, help="The distillation seed."),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--threads", type=int, help="CPU threads; another count gives other bits."),
    click.option(
        "--speed",
        type=click.Choice(get_args(Speed)),
        help="plain, or fast: compiled passes and CUDA graphs (default: fast on a GPU).",
    ),
    click.option(
        "--precision",
        type=click.Choice(get_args(Precision)),
        help="Of products on a GPU (default: tf32); bf16 is for fast first-order passes.",
    ),
    click.option(
        "--deterministic/--no-deterministic",
        default=None,
        help="The same bits for the same seed on a GPU too; slower.",
    ),
)
SEEDS = _group(
    click.option("--seeds", type=click.IntRange(1), help="Number of seeds, counted from --seed."),
    click.option("--buffer", type=PATH, help="Folder for mtt's experts (default: in --out)."),
)
OUTPUT = _group(
    click.option("--out", type=PATH, help="Run folder (default: a fresh one under runs/)."),
    click.option("--resume", is_flag=True, help="Resume the run in --out."),
    click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else."),
    click.option("--quiet", is_flag=True, help="No progress."),
)
READING = _group(
    click.option(
        "--set-number",
        type=click.IntRange(0),
        metavar="N",
        help="Another project's file: which of its sets, from 0 (default: the first).",
    ),
    click.option(
        "--space",
        metavar="NAME",
        help=f"What its values are: auto (default), {', '.join(SPACES)}.",
    ),
    click.option(
        "--factor",
        type=click.IntRange(1, 8),
        metavar="F",
        help="Each of its images packs F² smaller ones (default: found out).",
    ),
    click.option(
        "--labels", type=PATH, help="A file with its labels, or a folder of a teacher's (FKD)."
    ),
)
INTERCEPTED = _group(
    click.option(
        "--on", "on", type=PATH, metavar="FILE", help="Attack a finished set: a file or a run."
    ),
    READING,
)
DEFENSES = _group(
    click.option("--trigger", type=PATH, help="A trigger file (default: the run's own)."),
    click.option(
        "--defense",
        multiple=True,
        metavar="NAME",
        help="all (default), sets, inputs, models, training, quick, a name, or a class.",
    ),
    click.option(
        "--option", "defense_options", multiple=True, metavar="NAME.KEY=VALUE", help="Its options."
    ),
    click.option(
        "--budget",
        type=click.Choice(get_args(Budget)),
        default="quick",
        show_default=True,
        help="paper: published settings; tuned: the strongest that keep held-out accuracy; "
        "quick: less work than published.",
    ),
    click.option(
        "--holdout",
        type=click.IntRange(0),
        default=100,
        show_default=True,
        help="Clean real images that the defender holds.",
    ),
    click.option(
        "--images",
        type=click.IntRange(1),
        help="Test images measured (default: quick 500, else all).",
    ),
)
SHADOWS = _group(
    click.option(
        "--pairs",
        type=int,
        default=256,
        show_default=True,
        help="Clean shadows, and as many backdoored ones (published: 2304).",
    ),
    click.option(
        "--images",
        type=int,
        default=500,
        show_default=True,
        help="Clean training images that they train on.",
    ),
    click.option(
        "--shadow-epochs", type=int, default=100, show_default=True, help="Epochs of a shadow."
    ),
    click.option(
        "--shadow-batch", type=int, default=100, show_default=True, help="Its mini-batch."
    ),
    click.option("--out", type=PATH, required=True, help="The file of shadows (safetensors)."),
    click.option("--resume", is_flag=True, help="Add to the shadows in --out."),
    click.option("--quiet", is_flag=True, help="No progress."),
)
GRID = _group(
    click.option("--jobs", type=click.IntRange(1), help="Processes (default: as cores allow)."),
    click.option(
        "--ray", metavar="ADDRESS|local", help="Run on a Ray cluster, or one started here."
    ),
    click.option(
        "--gpus", type=click.FloatRange(0), help="With --ray: GPUs per cell, fractions allowed."
    ),
    click.option("--memory", type=click.FloatRange(0), help="With --ray: GiB per cell."),
    click.option(
        "--retries",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Further attempts at a cell that fails.",
    ),
    click.option("--data-dir", type=PATH, help="Folder with data sets, also for downloads."),
    click.option("--out", type=PATH, help="Folder (default: a fresh one under runs/)."),
    click.option("--resume", is_flag=True, help="Resume what is in --out."),
    click.option(
        "--json", "as_json", is_flag=True, help="Print the table as JSON, and nothing else."
    ),
    click.option("--quiet", is_flag=True, help="No progress."),
)


def configuration(
    given: Given, *, clean: bool = False, source: Path | None = None, attacked_anew: bool = False
) -> tuple[Config, list[str]]:
    """The configuration that ``given`` asks for, and the keys that were given.

    clean: leave out the attack. source: a run folder or file; the options win over what its record
    says. attacked_anew: leave out the attack that the source's record names. With --print-config
    the configuration is printed and the program ends.
    """
    keys = {k: v for k, v in given.items() if k not in _NO_KEYS and v not in (None, ())}
    layers = {name: given[name] for name in ("preset", "file", "settings")}
    own = gather(**layers, options=keys)
    recorded = {} if source is None else _of_source(source, own, given)
    if attacked_anew:
        recorded = without_attack(recorded)
    resolved = {**recorded, **_of_resumed(own, given), **own}
    config = for_clean(resolved) if clean else configure(**resolved)
    if given["print_config"]:
        text = yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True)
        write_out(text, newline=False)
        click.get_current_context().exit()
    return config, sorted(own)


def _of_source(source: Path, own: Given, given: Given) -> Given:
    """What the record of the run folder ``source`` says of its configuration."""
    record = SetFiles(source).record
    if record is not None:
        return source_keys(record, source, own, trust=given["trust"])
    if not (given["dataset"] or given["preset"] or given["file"]):
        raise RequestError(f"{source} is no run: name the data to test it on, --dataset NAME")
    return {}


def _of_resumed(own: Given, given: Given) -> Given:
    """The configuration of the run to be resumed, from which options may be left out."""
    if not given["resume"]:
        return {}
    return resumed_keys(RunFolder(out_folder(given, "")), own, trust=given["trust"])


def only_resumes(given: Given) -> bool:
    """Whether ``given`` asks for the run in --out as it is, and for nothing else."""
    asked = {key for key, value in given.items() if value not in (None, (), False)}
    return given["resume"] and asked <= {"out", "resume", "trust", "data_dir", "as_json", "quiet"}


def trusted_control(source: Path, given: Given) -> Path | None:
    """The clean twin's folder: the one given, or with --trust the one in the record."""
    control: Path | None = given["control_run"]
    record = SetFiles(source).record if given["trust"] and control is None else None
    return source / record.control["folder"] if record and record.control else control


def trusted_buffer(given: Given) -> Path | None:
    """The folder for experts: the one given, or with --trust that of the run to be resumed."""
    buffer: Path | None = given["buffer"]
    path = RunFolder(out_folder(given, "")).record if given["resume"] else None
    if buffer is None and given["trust"] and path is not None and path.exists():
        record = read_record(path)
        buffer = None if record.buffer is None else Path(record.buffer)
        return buffer.parent if buffer and record.kind == "seeds" else buffer
    return buffer


def out_folder(given: Given, name: str) -> Path:
    """The folder given, or a fresh one for ``name``."""
    if given["out"] is None and given["resume"]:
        raise RequestError("--resume needs the run's folder: --out FOLDER")
    out: Path = given["out"] or fresh_folder(name)
    return out


def data_configuration(given: Given) -> Config:
    """The configuration of a command that names the data and the machine alone."""
    return configure(
        **{
            key: value
            for key, value in given.items()
            if value not in (None, ()) and key not in _NO_KEYS
        }
    )


def take_reading(given: Given) -> ReadingOptions:
    """How another project's files are to be read; takes its options out of ``given``."""
    number, space, factor, labels = (given.pop(name) for name in _READING)
    space = None if space == "auto" else space
    return ReadingOptions(number=number, space=space, factor=factor, labels=labels)


def run_arguments(given: Given) -> dict[str, Any]:
    """The keyword arguments of every run: the data folder, whether to resume, the reporter."""
    return {
        "data_dir": given["data_dir"],
        "resume": given["resume"],
        "reporter": Reporter(quiet=given["quiet"] or given["as_json"]),
    }
