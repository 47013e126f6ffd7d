"""The commands that run a grid of cells: ``benchmark`` and ``ablate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

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
from . import options
from .exits import leave, printable, stoppable, write_out


@click.command()
@click.argument("file", type=options.PATH)
@options.GRID
def benchmark(file: Path, **given: Any) -> None:
    """Run the suite in FILE: attacks, defenses, seeds.

    Each attack has its clean twin, and every defense is measured on both.

    \b
    The classic check, no distillation: BadNets on the digits and on Fashion-MNIST
        distillsec benchmark sweeps/classic.yaml --out runs/classic
    Resume after a stop or a kill:
        distillsec benchmark sweeps/classic.yaml --out runs/classic --resume
    On a Ray cluster, four cells on each GPU:
        distillsec benchmark sweeps/defense-benchmark.yaml --ray auto --gpus 0.25 --out /shared/b

    Writes one table (table.md, table.json) and one heat map (heatmap.png) to --out, and updates
    them after each cell. docs/defenses.md has the keys of a suite.
    """
    suite = read_suite(file)
    out = options.out_folder(given, f"benchmark-{file.stem}")
    first = next(iter(configurations(suite, groups(suite)[0]).values()))
    with stoppable(out):
        found = run_suite(suite, out, _executor(first.run, given), **_arguments(given))
    _show(found.model_dump_json(indent=2), benchmark_markdown(found), given)
    _show_files(out, ("table.json", "table.md", "heatmap.png"), found.failures, given)


@click.command()
@click.argument("file", type=options.PATH)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the base.")
@click.option("--seeds", type=click.IntRange(1), help="Distillation seeds (default: the file's).")
@click.option("--dry-run", is_flag=True, help="Print the number of cells and an estimate of time.")
@click.option("--limit", type=click.IntRange(1), help="Run at most so many cells now, twins too.")
@options.GRID
def ablate(
    file: Path,
    settings: tuple[str, ...],
    seeds: int | None,
    dry_run: bool,
    limit: int | None,
    **given: Any,
) -> None:
    """Run the sweep in FILE; each cell once, in one table.

    A cell is one point of the sweep with one distillation seed.

    \b
    A first example on digits, a few minutes on two cores:
        distillsec ablate sweeps/digits-quick.yaml --jobs 2 --out runs/quick
    How many cells are there, and how long will they take?
        distillsec ablate sweeps/digits-quick.yaml --out runs/quick --dry-run
    A few cells at a time, or after a kill:
        distillsec ablate sweeps/digits-quick.yaml --out runs/quick --limit 10 --resume
    Two cells at a time on a Ray cluster of this machine (a larger one: docs/ablate.md):
        distillsec ablate sweeps/digits-quick.yaml --ray local --jobs 2 --out runs/quick

    A cell is identified by the hash of its configuration: add values or seeds, and --resume runs
    only what is new. Cells share clean twins and expert buffers where they need the same.
    """
    sweep = read_sweep(file, base=key_values(settings), seeds=seeds)
    first = sweep.config(sweep.points()[0], sweep.first_seed)
    executor = _executor(first.run, given)
    if dry_run:
        workers = given["jobs"] or (1 if given["ray"] else executor.slots)
        for line in estimate_sweep(sweep, given["out"]).lines(workers):
            write_out(line)
        return
    out = options.out_folder(given, f"ablate-{file.stem}")
    with stoppable(out):
        found = run_sweep(sweep, out, executor, limit=limit, **_arguments(given))
    _show(found.model_dump_json(indent=2), ablation_markdown(found), given)
    _show_files(out, ("table.json", "table.md"), found.failures, given)


def _executor(run: RunSection, given: options.Given) -> Executor:
    return choose_executor(run, **{name: given[name] for name in ("jobs", "ray", "gpus", "memory")})


def _arguments(given: options.Given) -> dict[str, Any]:
    return {"retries": given["retries"], **options.run_arguments(given)}


def _show(json: str, text: str, given: options.Given) -> None:
    write_out(json if given["as_json"] else printable(text), newline=given["as_json"])


def _show_files(
    out: Path, names: Sequence[str], failures: Sequence[Failure], given: options.Given
) -> None:
    """The paths of the tables; exit code 1 if cells failed."""
    if not given["as_json"]:
        write_out("\n" + "\n".join(str(out / name) for name in names))
    if failures:
        count = len(failures)
        leave(click.get_current_context(), 1, f"{count} cells failed: see {out}/table.md")
