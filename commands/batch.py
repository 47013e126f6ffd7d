"""The commands that run many cells: ``benchmark`` and ``ablate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..distill.types import RequestError
from ..eval.config.layers import key_values
from ..eval.config.schema import RunSection
from ..eval.grid.ablate import ablate as run_sweep
from ..eval.grid.benchmark import benchmark as run_suite
from ..eval.grid.choose_executor import choose_executor
from ..eval.grid.estimate import estimate_sweep
from ..eval.grid.executors import Executor
from ..eval.grid.suite import configurations, groups, read_suite
from ..eval.grid.sweep import read_sweep
from ..eval.results.ablation import ablation_markdown
from ..eval.results.benchmark import benchmark_markdown
from ..eval.results.record import Failure
from ..eval.run.folder import fresh_folder
from ..eval.run.progress import Reporter
from . import options


@click.command()
@click.argument("file", type=options.PATH)
@options.BATCH
def benchmark(file: Path, **given: Any) -> None:
    """Attacks × defenses × seeds × victims, as the suite in FILE says, with clean twins.

    \b
    The classic check, no distillation: BadNets on the digits and on Fashion-MNIST
        distillsec benchmark sweeps/classic.yaml --out runs/classic
    Stopped or killed, it goes on:
        distillsec benchmark sweeps/classic.yaml --out runs/classic --resume
    On a Ray cluster, four cells on each GPU:
        distillsec benchmark sweeps/defense-benchmark.yaml --ray auto --gpus 0.25 --out /shared/b

    Ends with one table (table.md, table.json) and one heat map (heatmap.png) in --out; they are
    renewed as cells end. See docs/defenses.md for a suite's keys.
    """
    suite = read_suite(file)
    out = _folder(given, f"benchmark-{file.stem}")
    first = next(iter(configurations(suite, groups(suite)[0]).values()))
    with options.stoppable(out):
        found = run_suite(suite, out, _executor(first.run, given), **_common(given))
    _show(found.model_dump_json(indent=2), benchmark_markdown(found), given)
    _places(out, ("table.json", "table.md", "heatmap.png"), found.failures, given)


@click.command()
@click.argument("file", type=options.PATH)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the base.")
@click.option("--seeds", type=click.IntRange(1), help="Distillation seeds (default: the file's).")
@click.option("--dry-run", is_flag=True, help="Say what there is to do, and how long it may take.")
@click.option("--limit", type=click.IntRange(1), help="Run no more cells than that now.")
@options.BATCH
def ablate(
    file: Path,
    settings: tuple[str, ...],
    seeds: int | None,
    dry_run: bool,
    limit: int | None,
    **given: Any,
) -> None:
    """Every point of the sweep in FILE, over distillation seeds: one table, each cell once.

    \b
    A first look on digits, about two minutes on two cores:
        distillsec ablate sweeps/digits-quick.yaml --jobs 2 --out runs/quick
    How much is there to do, and how long will it take?
        distillsec ablate sweeps/digits-quick.yaml --out runs/quick --dry-run
    In pieces, or after a kill:
        distillsec ablate sweeps/digits-quick.yaml --out runs/quick --limit 10 --resume
    Two cells at a time on a Ray cluster of this machine; a big one: see docs/ablate.md
        distillsec ablate sweeps/digits-quick.yaml --ray local --jobs 2 --out runs/quick

    Cells go by the hash of their configuration: add values or seeds, and --resume runs what is
    new. Clean twins and expert buffers are made once for all cells that need the same.
    """
    sweep = read_sweep(file, base=key_values(settings), seeds=seeds)
    first = sweep.config(sweep.points()[0], sweep.first_seed)
    executor = _executor(first.run, given)
    if dry_run:
        workers = given["jobs"] or (1 if given["ray"] else executor.slots)
        for line in estimate_sweep(sweep, given["out"]).lines(workers):
            click.echo(line)
        return
    out = _folder(given, f"ablate-{file.stem}")
    with options.stoppable(out):
        found = run_sweep(sweep, out, executor, limit=limit, **_common(given))
    _show(found.model_dump_json(indent=2), ablation_markdown(found), given)
    _places(out, ("table.json", "table.md"), found.failures, given)


def _executor(run: RunSection, given: dict[str, Any]) -> Executor:
    return choose_executor(run, **{name: given[name] for name in ("jobs", "ray", "gpus", "memory")})


def _folder(given: dict[str, Any], name: str) -> Path:
    """The folder given, or a fresh one."""
    if given["resume"] and given["out"] is None:
        raise RequestError("--resume wants the folder: --out FOLDER")
    out: Path = given["out"] or fresh_folder(name)
    return out


def _common(given: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: given[name] for name in ("data_dir", "resume", "retries")},
        "reporter": Reporter(quiet=given["quiet"] or given["as_json"]),
    }


def _show(json: str, text: str, given: dict[str, Any]) -> None:
    click.echo(json if given["as_json"] else text, nl=given["as_json"])


def _places(
    out: Path, names: Sequence[str], failures: Sequence[Failure], given: dict[str, Any]
) -> None:
    """Where the tables lie; exit 1 where cells failed."""
    if not given["as_json"]:
        click.echo("\n" + "\n".join(str(out / name) for name in names))
    if failures:
        count = len(failures)
        options.leave(click.get_current_context(), 1, f"{count} cells failed: see {out}/table.md")
