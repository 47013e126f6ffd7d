"""The command line's options, in groups, and what a command's options ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, final, get_args

import click
import yaml

from ..attacks.triggers import TriggerRange
from ..defenses.base import Budget
from ..distill.types import RequestError
from ..eval.config.layers import for_clean, gather
from ..eval.config.schema import Config, configure
from ..eval.results.defend_table import defend_table
from ..eval.results.record import Record, read_record
from ..eval.results.run_table import run_table
from ..eval.run.cell import run_cell
from ..eval.run.folder import RunFolder, fresh_folder
from ..eval.run.progress import Reporter
from ..eval.run.seeds import run_seeds
from ..eval.run.source import Source

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

# Options that say how a command behaves; all others are keys of the configuration.
NO_KEYS = {"preset", "file", "settings", "print_config", "data_dir", "control_run", "seeds"}
NO_KEYS |= {"buffer", "out", "resume", "as_json", "quiet"}


def options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several click options as one decorator, in reading order."""

    def decorate(command: Command) -> Command:
        return functools.reduce(lambda done, option: option(done), reversed(options), command)

    return decorate


CONFIGURATION = options(
    click.option("--preset", metavar="NAME", help="Start from a preset (see `list presets`)."),
    click.option("--config", "file", type=PATH, help="YAML file of keys; options win over it."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key."),
    click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop."),
)
DATA = options(
    click.option("--dataset", metavar="NAME", help="A name, folder:PATH or npz:PATH."),
    click.option("--data-dir", type=PATH, help="Where data sets lie, or are downloaded to."),
    click.option("--image-size", type=int, help="Resize images to this side."),
    click.option("--zca/--no-zca", default=None, help="Whiten the images (mtt's CIFAR figures)."),
)
DISTILLATION = options(
    click.option("--backend", metavar="NAME", help="Distillation backend (see `list backends`)."),
    click.option("--network", metavar="NAME", help="Distilling network, or package.module:Class."),
    click.option("--width", type=int, help="Its width."),
    click.option("--depth", type=int, help="Its depth."),
    click.option("--norm", metavar="NAME", help="Its norm: instance, batch, layer, group, none."),
    click.option("--ipc", type=int, help="Images per class."),
    click.option("--iterations", type=int, help="Outer iterations."),
    click.option("--init", metavar="NAME", help="Start from noise, real or poisoned rows."),
)
ATTACK = options(
    click.option("--attack", metavar="NAME", help="Attack (see `list attacks`), or a class."),
    click.option("--target", type=int, help="Target class number."),
    click.option(
        "--goal", metavar="NAME", help="all-to-one (default), one-to-one or all-to-all (classes)."
    ),
    click.option("--source", type=int, help="Source class number, for goal one-to-one."),
    click.option("--poison-rate", type=float, help="Poisoned rows / training set size."),
    click.option("--target-share", type=float, help="Poisoned share of the target's batches."),
    click.option("--trigger-size", type=int, help="Side of the trigger in pixels."),
    click.option("--trigger-range", metavar="|".join(get_args(TriggerRange)), help="Its values."),
    click.option("--objective", metavar="NAME", help="What Doorping optimises its trigger for."),
)
VICTIMS = options(
    click.option("--victims", type=int, help="Networks trained on the set."),
    click.option("--victim-network", multiple=True, metavar="NAME", help="Theirs; repeatable."),
    click.option("--victim-epochs", type=int, help="Their training epochs."),
)
CONTROL = options(
    click.option("--control/--no-control", default=None, help="Distil the clean twin too."),
    click.option("--control-run", type=PATH, help="Reuse a finished clean twin's folder."),
)
MACHINE = options(
    click.option("--seed", type=int, help="The distillation seed."),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N."),
    click.option("--threads", type=int, help="CPU threads: part of a result's identity."),
)
SEVERAL = options(
    click.option("--seeds", type=click.IntRange(1), help="So many distillation seeds from --seed."),
    click.option("--buffer", type=PATH, help="Where mtt's experts are kept (default: in --out)."),
)
PLACE = options(
    click.option("--out", type=PATH, help="Run folder (default: a fresh one under runs/)."),
    click.option("--resume", is_flag=True, help="Take up the run in --out where it stopped."),
    click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else."),
    click.option("--quiet", is_flag=True, help="No progress."),
)
DEFENSES = options(
    click.option("--trigger", type=PATH, help="A trigger file (default: the run's own)."),
    click.option(
        "--defense", multiple=True, metavar="NAME", help="all (default), a name, or a class."
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
SHADOWS = options(
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
    click.option("--out", type=PATH, required=True, help="The zoo's file (safetensors)."),
    click.option("--resume", is_flag=True, help="Go on with the zoo in --out."),
    click.option("--quiet", is_flag=True, help="No progress."),
)

BATCH = options(
    click.option(
        "--jobs", type=click.IntRange(1), help="Processes (default: what the cores hold)."
    ),
    click.option(
        "--ray", metavar="ADDRESS|local", help="Run on a Ray cluster, or one started here."
    ),
    click.option(
        "--gpus", type=click.FloatRange(0), help="With --ray: GPUs of a cell, or a share."
    ),
    click.option("--memory", type=click.FloatRange(0), help="With --ray: GiB of a cell."),
    click.option(
        "--retries",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Further attempts at a cell that fails.",
    ),
    click.option("--data-dir", type=PATH, help="Where data sets lie, or are downloaded to."),
    click.option("--out", type=PATH, help="Folder (default: a fresh one under runs/)."),
    click.option("--resume", is_flag=True, help="Go on with what is in --out."),
    click.option(
        "--json", "as_json", is_flag=True, help="Print the table as JSON, and nothing else."
    ),
    click.option("--quiet", is_flag=True, help="No progress."),
)


def leave(ctx: click.Context, code: int, line: str) -> NoReturn:
    """End the program with one line on stderr and an exit code."""
    click.echo(f"distillsec: {' '.join(line.split())}", err=True)
    ctx.exit(code)


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Ctrl-C ends in one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        how = f"; the same command with --out {out} --resume goes on" if out.exists() else ""
        leave(click.get_current_context(), 1, f"stopped{how}")


@final
class Request:
    """One command's options, and what becomes of them."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self.given_keys: list[str] = []

    def configuration(
        self, *, clean: bool = False, below: dict[str, Any] | None = None
    ) -> Config | None:
        """The configuration asked for; ``None`` after --print-config has printed it."""
        given = self._given
        keys = {k: v for k, v in given.items() if k not in NO_KEYS and v not in (None, ())}
        layers = {name: given[name] for name in ("preset", "file", "settings")}
        own = gather(**layers, options=keys)
        resolved = {**(below or {}), **self._resumed(own), **own}
        self.given_keys = sorted(own)
        config = for_clean(resolved) if clean else configure(**resolved)
        if given["print_config"]:
            click.echo(yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True), nl=False)
            return None
        return config

    def for_source(self, found: Source) -> Config | None:
        """As ``configuration``, above the one that the set was made with."""
        given = self._given
        if not found.config and not (given["dataset"] or given["preset"] or given["file"]):
            raise RequestError(
                f"{found.path} is a file: say on which data it is tested, --dataset NAME"
            )
        return self.configuration(below=found.config)

    def _resumed(self, own: dict[str, Any]) -> dict[str, Any]:
        """What the run to be resumed was made with: an option left out means what it meant."""
        if not self._given["resume"]:
            return {}
        record = RunFolder(self.out("")).record
        return {} if own and not record.exists() else read_record(record).config

    def out(self, name: str) -> Path:
        """The run folder: the one given, or a fresh one."""
        if self._given["out"] is None and self._given["resume"]:
            raise RequestError("--resume wants the run's folder: --out FOLDER")
        return self._given["out"] or fresh_folder(name)

    def run(self, config: Config | None) -> None:
        """Run one seed or several, and show the record."""
        if config is None:
            return
        seeds, control_run = self._given["seeds"], self._given.get("control_run")
        if seeds is not None and control_run is not None:
            raise RequestError("--control-run is the twin of one seed: leave it out with --seeds")
        out = self.out(self._given["preset"] or f"{config.set.backend}-{config.attack or 'clean'}")
        common = {**self.common(), "buffer": self._given["buffer"]}
        with stoppable(out):
            if seeds is None:
                record = run_cell(config, out, control_run=control_run, **common)
            else:
                record = run_seeds(config, seeds, out, **common)
        self.show(record, out)

    def common(self) -> dict[str, Any]:
        """What every run is told beside its configuration."""
        return {
            "given": self.given_keys,
            "data_dir": self._given["data_dir"],
            "resume": self._given["resume"],
            "reporter": Reporter(quiet=self._given["quiet"] or self._given["as_json"]),
        }

    def show(self, record: Record, out: Path) -> None:
        """The record as a table, or as JSON and nothing else."""
        if self._given["as_json"]:
            click.echo(RunFolder(out).record.read_text(), nl=False)
        else:
            click.echo((defend_table if record.kind == "defend" else run_table)(record, out))
