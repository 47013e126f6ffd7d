"""The command line: parse, call ``eval``, print."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import click
import yaml

from .attacks.triggers import TriggerRange
from .distill.types import RequestError, RunError
from .eval import catalogue
from .eval.cell import run_cell
from .eval.checks import out_of_memory
from .eval.config import Config, configure
from .eval.evaluate import Source
from .eval.evaluate import evaluate as evaluate_set
from .eval.progress import Reporter
from .eval.record import Record, metadata_version, read_record
from .eval.request import for_clean, gather
from .eval.runfolder import RunFolder, fresh_folder
from .eval.seeds import run_seeds
from .eval.tables import table

Command = TypeVar("Command", bound=Callable[..., Any])

# Options that say how a command behaves; all others are keys of the configuration.
_NO_KEYS = {"preset", "file", "settings", "print_config", "data_dir", "control_run", "seeds"}
_NO_KEYS |= {"buffer", "out", "resume", "as_json", "quiet"}

_PATH = click.Path(path_type=Path)


class _Program(click.Group):
    """Turns errors, click's own among them, into one line and the promised exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        command = (error.ctx or ctx).command_path
        _leave(ctx, 2, f"{error.format_message()} (see `{command} --help`)")
    except (RequestError, OSError) as error:
        _leave(ctx, 2, str(error))
    except RunError as error:
        _leave(ctx, 1, f"the run failed: {error}")
    except KeyboardInterrupt:
        _leave(ctx, 1, "stopped")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _leave(ctx, 1, "out of memory: a smaller --width, --ipc or --set batch_real=N needs less")


def _leave(ctx: click.Context, code: int, line: str) -> NoReturn:
    click.echo(f"distillsec: {' '.join(line.split())}", err=True)
    ctx.exit(code)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata_version(), prog_name="distillsec")
def main() -> None:
    """Security evaluation of distilled datasets.

    \b
    See it work, in about a minute, without data to download:
        distillsec attack --preset digits-naive
    What there is to choose from:
        distillsec list presets
    """


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several click options as one decorator, in reading order."""

    def decorate(command: Command) -> Command:
        return functools.reduce(lambda done, option: option(done), reversed(options), command)

    return decorate


_configuration = _options(
    click.option("--preset", metavar="NAME", help="Start from a preset (see `list presets`)."),
    click.option("--config", "file", type=_PATH, help="YAML file of keys; options win over it."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key."),
    click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop."),
)
_data = _options(
    click.option("--dataset", metavar="NAME", help="A name, folder:PATH or npz:PATH."),
    click.option("--data-dir", type=_PATH, help="Where data sets lie, or are downloaded to."),
    click.option("--image-size", type=int, help="Resize images to this side."),
    click.option("--zca/--no-zca", default=None, help="Whiten the images (mtt's CIFAR figures)."),
)
_distillation = _options(
    click.option("--backend", metavar="NAME", help="Distillation backend (see `list backends`)."),
    click.option("--network", metavar="NAME", help="Distilling network, or package.module:Class."),
    click.option("--width", type=int, help="Its width."),
    click.option("--depth", type=int, help="Its depth."),
    click.option("--norm", metavar="NAME", help="Its norm: instance, batch, layer, group, none."),
    click.option("--ipc", type=int, help="Images per class."),
    click.option("--iterations", type=int, help="Outer iterations."),
    click.option("--init", metavar="NAME", help="Start from noise, real or poisoned rows."),
)
_attack = _options(
    click.option("--attack", metavar="NAME", help="Attack (see `list attacks`), or a class."),
    click.option("--target", type=int, help="Target class number."),
    click.option("--poison-rate", type=float, help="Poisoned rows / training set size."),
    click.option("--target-share", type=float, help="Poisoned share of the target's batches."),
    click.option("--trigger-size", type=int, help="Side of the patch in pixels."),
    click.option("--trigger-range", metavar="|".join(get_args(TriggerRange)), help="Its values."),
    click.option("--objective", metavar="NAME", help="What Doorping optimises its trigger for."),
)
_victims = _options(
    click.option("--victims", type=int, help="Networks trained on the set."),
    click.option("--victim-network", multiple=True, metavar="NAME", help="Theirs; repeatable."),
    click.option("--victim-epochs", type=int, help="Their training epochs."),
)
_control = _options(
    click.option("--control/--no-control", default=None, help="Distil the clean twin too."),
    click.option("--control-run", type=_PATH, help="Reuse a finished clean twin's folder."),
)
_machine = _options(
    click.option("--seed", type=int, help="The distillation seed."),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N."),
    click.option("--threads", type=int, help="CPU threads: part of a result's identity."),
)
_several = _options(
    click.option("--seeds", type=click.IntRange(1), help="So many distillation seeds from --seed."),
    click.option("--buffer", type=_PATH, help="Where mtt's experts are kept (default: in --out)."),
)
_place = _options(
    click.option("--out", type=_PATH, help="Run folder (default: a fresh one under runs/)."),
    click.option("--resume", is_flag=True, help="Take up the run in --out where it stopped."),
    click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else."),
    click.option("--quiet", is_flag=True, help="No progress."),
)


@main.command()
@_configuration
@_data
@_distillation
@_attack
@_victims
@_control
@_machine
@_several
@_place
def attack(**given: Any) -> None:
    """Distil under an attack, with its clean twin, and measure both.

    \b
    A first look on digits, 2 minutes on two cores:
        distillsec attack --preset digits-naive
    The same attack with a bigger patch, five distillation seeds:
        distillsec attack --preset digits-naive --trigger-size 4 --seeds 5
    Your own images (folders train/CLASS and test/CLASS) and your own attack:
        distillsec attack --dataset folder:photos --attack mypackage.mine:MyAttack
    Stopped half way? The same command goes on:
        distillsec attack --preset digits-naive --out runs/a --resume

    Without a preset the published settings hold; they want a GPU.
    """
    request = _Request(given)
    config = request.configuration()
    if config is not None and config.attack is None:
        raise RequestError("no attack was chosen: --attack NAME, see `distillsec list attacks`")
    request.run(config)


@main.command()
@_configuration
@_data
@_distillation
@_victims
@_machine
@_several
@_place
def distill(**given: Any) -> None:
    """Distil cleanly, and measure the clean test accuracy.

    \b
        distillsec distill --preset digits-dc
        distillsec distill --preset digits-mtt --buffer experts   # keeps the experts for later runs
        distillsec distill --dataset fashion-mnist --backend dsa --ipc 10 --device cuda
    """
    request = _Request(given)
    request.run(request.configuration(clean=True))


@main.command()
@click.argument("source", type=_PATH)
@click.option("--trigger", type=_PATH, help="A trigger file (default: the run's own).")
@click.option("--png", is_flag=True, help="Write 8-bit PNG files, and measure what they keep.")
@_configuration
@_data
@_victims
@_machine
@_place
def evaluate(source: Path, trigger: Path | None, png: bool, **given: Any) -> None:
    """Train fresh victims on a finished set: SOURCE is a run folder or a file.

    \b
    Other architectures than the one that distilled:
        distillsec evaluate runs/a --victim-network mlp --victim-network convnet-baadd
    A file that somebody sent, on the data it claims to stand for:
        distillsec evaluate received.safetensors --dataset fashion-mnist
    """
    request = _Request(given)
    found = Source(source)
    if not found.config and not (given["dataset"] or given["preset"] or given["file"]):
        raise RequestError(f"{source} is a file: say on which data it is tested, --dataset NAME")
    config = request.configuration(below=found.config)
    if config is None:
        return
    out = request.out(f"evaluate-{source.stem or 'set'}")
    with request.stoppable(out):
        record = evaluate_set(source, config, out, trigger=trigger, png=png, **request.common())
    request.show(record, out)


@main.command("list")
@click.argument("what", type=click.Choice(list(catalogue.CATALOGUES)), required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(what: str | None, as_json: bool) -> None:
    """What there is to choose from.

    \b
        distillsec list attacks
        distillsec list presets
    """
    kinds = [what] if what else list(catalogue.CATALOGUES)
    texts = [catalogue.as_json(kinds)] if as_json else map(catalogue.as_text, kinds)
    click.echo("\n".join(texts))


class _Request:
    """One command's options, and what becomes of them."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self.given_keys: list[str] = []

    def configuration(
        self, *, clean: bool = False, below: dict[str, Any] | None = None
    ) -> Config | None:
        """The configuration asked for; ``None`` after --print-config has printed it."""
        given = self._given
        options = {k: v for k, v in given.items() if k not in _NO_KEYS and v not in (None, ())}
        layers = {name: given[name] for name in ("preset", "file", "settings")}
        own = gather(**layers, options=options)
        keys = {**(below or {}), **self._resumed(own), **own}
        self.given_keys = sorted(own)
        config = for_clean(keys) if clean else configure(**keys)
        if given["print_config"]:
            click.echo(yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True), nl=False)
            return None
        return config

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
        with self.stoppable(out):
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

    @contextmanager
    def stoppable(self, out: Path) -> Iterator[None]:
        """Ctrl-C ends in one line that says how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            how = f"; the same command with --out {out} --resume goes on" if out.exists() else ""
            _leave(click.get_current_context(), 1, f"stopped{how}")

    def show(self, record: Record, out: Path) -> None:
        """The record as a table, or as JSON and nothing else."""
        if self._given["as_json"]:
            click.echo(RunFolder(out).record.read_text(), nl=False)
        else:
            click.echo(table(record, out))


if __name__ == "__main__":
    main()
