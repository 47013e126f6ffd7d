"""The command line: parse, call ``eval``, print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .commands import batch, options, reporting
from .defenses.base import Budget
from .defenses.common.shadows import ShadowOptions
from .distill.types import RequestError, RunError
from .eval.bench.defend import defend as defend_set
from .eval.bench.options import BenchOptions, choose_defenses
from .eval.bench.zoo import make_zoo
from .eval.config import catalogue
from .eval.config.layers import by_owner
from .eval.config.schema import build_options
from .eval.results.record import metadata_version
from .eval.run.checks import out_of_memory
from .eval.run.evaluate import evaluate as evaluate_set
from .eval.run.progress import Reporter
from .eval.run.source import Source


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
        options.leave(ctx, 2, f"{error.format_message()} (see `{command} --help`)")
    except (RequestError, OSError) as error:
        options.leave(ctx, 2, str(error))
    except RunError as error:
        options.leave(ctx, 1, f"the run failed: {error}")
    except KeyboardInterrupt:
        options.leave(ctx, 1, "stopped")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        options.leave(
            ctx, 1, "out of memory: a smaller --width, --ipc or --set batch_real=N needs less"
        )


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


@main.command()
@options.CONFIGURATION
@options.DATA
@options.DISTILLATION
@options.ATTACK
@options.VICTIMS
@options.CONTROL
@options.MACHINE
@options.SEVERAL
@options.PLACE
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
    request = options.Request(given)
    config = request.configuration()
    if config is not None and config.attack is None:
        raise RequestError("no attack was chosen: --attack NAME, see `distillsec list attacks`")
    request.run(config)


@main.command()
@options.CONFIGURATION
@options.DATA
@options.DISTILLATION
@options.VICTIMS
@options.MACHINE
@options.SEVERAL
@options.PLACE
def distill(**given: Any) -> None:
    """Distil cleanly, and measure the clean test accuracy.

    \b
        distillsec distill --preset digits-dc
        distillsec distill --preset digits-mtt --buffer experts   # keeps the experts for later runs
        distillsec distill --dataset fashion-mnist --backend dsa --ipc 10 --device cuda
    """
    request = options.Request(given)
    request.run(request.configuration(clean=True))


@main.command()
@click.argument("source", type=options.PATH)
@click.option("--trigger", type=options.PATH, help="A trigger file (default: the run's own).")
@click.option("--png", is_flag=True, help="Write 8-bit PNG files, and measure what they keep.")
@options.CONFIGURATION
@options.DATA
@options.VICTIMS
@options.MACHINE
@options.PLACE
def evaluate(source: Path, trigger: Path | None, png: bool, **given: Any) -> None:
    """Train fresh victims on a finished set: SOURCE is a run folder or a file.

    \b
    Other architectures than the one that distilled:
        distillsec evaluate runs/a --victim-network mlp --victim-network convnet-baadd
    A file that somebody sent, on the data it claims to stand for:
        distillsec evaluate received.safetensors --dataset fashion-mnist
    """
    request = options.Request(given)
    found = Source(source)
    config = request.for_source(found)
    if config is None:
        return
    out = request.out(f"evaluate-{source.stem or 'set'}")
    with options.stoppable(out):
        record = evaluate_set(source, config, out, trigger=trigger, png=png, **request.common())
    request.show(record, out)


@main.command()
@click.argument("source", type=options.PATH)
@options.DEFENSES
@options.CONFIGURATION
@options.DATA
@options.VICTIMS
@options.MACHINE
@options.PLACE
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
    """Measure defenses on a finished set: SOURCE is a run folder or a file.

    \b
    The whole catalogue on an attack and its clean twin, about 2 minutes on digits:
        distillsec defend runs/a
    Some of them as published, with more clean images in the defender's hands:
        distillsec defend runs/a --defense strip --defense scan --budget paper --holdout 200
        distillsec defend runs/a --defense strip --option strip.copies=50
    Your own, and a set that somebody sent:
        distillsec defend runs/a --defense mypackage.mine:MyDefense
        distillsec defend received.safetensors --dataset fashion-mnist

    What there is: `distillsec list defenses`. Of a file without --trigger only what needs no
    trigger is measured.
    """
    request = options.Request(given)
    found = Source(source)
    config = request.for_source(found)
    if config is None:
        return
    chosen = choose_defenses(list(defense) or ["all"], budget, by_owner(defense_options))
    bench = build_options(
        BenchOptions, {"budget": budget, "holdout": holdout, "images": images}, "defend"
    )
    out = request.out(f"defend-{source.stem or 'set'}")
    with options.stoppable(out):
        record = defend_set(
            source, config, out, defenses=chosen, options=bench, trigger=trigger, **request.common()
        )
    request.show(record, out)
    failed = [name for name, outcome in record.defenses.items() if outcome.status == "error"]
    if failed:
        options.leave(click.get_current_context(), 1, f"{', '.join(failed)} failed: see the table")


@main.command()
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
    """Train a zoo of shadow networks for MNTD: half of them clean, half with backdoors.

    They are of the architecture of SOURCE's victims; SOURCE is a run folder or a file.

    \b
    Once, in a few minutes; then for any set whose victims are such networks:
        distillsec shadows runs/a --pairs 128 --out zoo.safetensors
        distillsec defend runs/a --defense mntd --option mntd.zoo=zoo.safetensors
    More of them later:
        distillsec shadows runs/a --pairs 512 --out zoo.safetensors --resume
    """
    request = options.Request({**given, "resume": False})
    config = request.for_source(Source(source))
    if config is None:
        return
    chosen = build_options(
        ShadowOptions, {"pairs": pairs, "epochs": shadow_epochs, "batch": shadow_batch}, "shadows"
    )
    with options.stoppable(out):
        zoo = make_zoo(
            config,
            out,
            chosen,
            images=images,
            data_dir=given["data_dir"],
            resume=resume,
            reporter=Reporter(quiet=quiet),
        )
    click.echo(f"{len(zoo)} shadows, half of them backdoored: {out}")


main.add_command(batch.benchmark)
main.add_command(batch.ablate)
main.add_command(reporting.report)


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


if __name__ == "__main__":
    main()
