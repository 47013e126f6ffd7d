"""Run a suite: every attack with its clean twin, every defense on both, cell by cell."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from ..distill.files import read_json, write_json, write_text
from ..distill.types import DistillsecError, RequestError
from .benchmark_table import Benchmark, Failure, as_markdown, summarise_suite
from .cell import run_cell
from .checks import out_of_memory
from .config import Config, configure
from .defend import defend
from .defense_pictures import heatmap_picture
from .executors import run_all
from .progress import Reporter
from .record import read_record
from .store import VictimStore
from .suite import Group, Suite, configurations, groups, twin

_SUITE = "suite.json"


def benchmark(
    suite: Suite,
    out: Path,
    *,
    jobs: int | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Benchmark:
    """Run ``suite`` in the folder ``out`` and return its table, which also lies there.

    Cells that are done are not run again with ``resume``; failed ones are. jobs: processes, by
    default as many as the first configuration's threads leave room for. A cell that fails or does
    not apply is in the table with its reason, and keeps no other from running.
    Errors: ``RequestError`` for a folder that holds something else.
    """
    reporter = reporter or Reporter()
    _enter(suite, out, resume)
    todo = groups(suite)
    work = partial(run_group, suite=suite, out=out, data_dir=data_dir)
    failures: list[Failure] = []
    table = summarise_suite(suite, out, failures)
    with reporter.phase("benchmark", len(todo)) as phase:
        found = run_all(work, todo, jobs or _default_jobs(suite))
        for done, (group, failed) in enumerate(found, start=1):
            failures += failed
            for failure in failed:
                reporter.say(f"{failure.place}: {failure.reason}")
            table = summarise_suite(suite, out, failures)
            write_benchmark(out, table)
            reporter.say(f"{group.setting}, seed {group.seed}: over ({done} of {len(todo)})")
            phase.reach(done)
    return table


def write_benchmark(out: Path, found: Benchmark) -> None:
    """``table.json``, ``table.md`` and ``heatmap.png`` in ``out``."""
    write_json(out / "table.json", found.model_dump(mode="json"))
    write_text(out / "table.md", as_markdown(found))
    heatmap_picture(out / "heatmap.png", found)


def run_group(group: Group, *, suite: Suite, out: Path, data_dir: Path | None) -> list[Failure]:
    """The twin, then each attack and its defenses; returns what failed, with the reason."""
    store, quiet = VictimStore(out / "victims"), Reporter(quiet=True)
    folder, failures = group.folder(out), []

    def distilled(config: Config, name: str, control_run: Path | None = None) -> Path:
        place = folder / name
        run_cell(
            config,
            place,
            data_dir=data_dir,
            resume=place.exists(),
            control_run=control_run,
            train=store.victim,
            reporter=quiet,
        )
        return place

    def defended(source: Path, attack: str, network: str | None) -> None:
        place = group.defended(out, attack, network)
        keys = read_record(source / "record.json").config
        defend(
            source,
            configure(**keys | ({"victim_network": network} if network else {})),
            place,
            defenses=suite.defenses_of(group.setting),
            options=suite.bench_of(group.setting),
            given=("victims",),
            data_dir=data_dir,
            resume=place.exists(),
            store=store,
            reporter=quiet,
        )

    try:
        control = distilled(twin(suite, group), "clean")
        configs = configurations(suite, group)
    except Exception as error:
        return [_failure(folder / "clean", out, error)]
    for attack, config in configs.items():
        place = folder / attack
        try:
            distilled(config, attack, control)
            for network in suite.networks():
                place = group.defended(out, attack, network)
                defended(folder / attack, attack, network)
        except Exception as error:
            failures.append(_failure(place, out, error))
    return failures


def _failure(place: Path, out: Path, error: Exception) -> Failure:
    """What kept a cell from its figures; a machine out of memory ends everything."""
    if out_of_memory(error):
        raise error
    text = str(error) if isinstance(error, DistillsecError) else repr(error)
    return Failure(place=str(place.relative_to(out)), reason=" ".join(text.split()))


def _enter(suite: Suite, out: Path, resume: bool) -> None:
    """Make the folder, or find the same suite begun in it."""
    kept = out / _SUITE
    if not kept.exists():
        if out.exists() and any(out.iterdir()):
            raise RequestError(f"{out} is not empty, and holds no suite: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
    elif not resume:
        raise RequestError(f"{out} holds a suite: choose another --out, or go on with --resume")
    else:
        found = read_json(kept)
        if not isinstance(found, dict) or found.get("key") != suite.key():
            raise RequestError(f"{out} holds another suite: choose another --out")
    write_json(kept, {"key": suite.key(), "suite": suite.model_dump(mode="json")})


def _default_jobs(suite: Suite) -> int:
    """As many processes as fit the cores, by the threads that each takes; one on a GPU."""
    first = next(iter(configurations(suite, groups(suite)[0]).values())).run
    if first.device != "cpu":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // first.threads)
