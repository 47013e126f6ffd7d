"""Run a suite: every attack with its clean twin, every defense on both, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...distill.files.safe import read_json, write_json, write_text
from ...distill.types import RequestError
from ..figures.heatmap import heatmap_picture
from ..results.record import Failure
from ..run.progress import Reporter
from .benchmark_table import Benchmark, as_markdown, summarise_suite
from .executors import Executor
from .ledger import entered
from .scheduler import carry_out
from .suite import Suite, plan

_SUITE = "suite.json"


def benchmark(
    suite: Suite,
    out: Path,
    executor: Executor,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    retries: int = 1,
    reporter: Reporter | None = None,
) -> Benchmark:
    """Run ``suite`` in the folder ``out`` and return its table, which also lies there.

    Cells that are done are not run again with ``resume``; failed ones are. A cell that fails or
    does not apply is in the table with its reason, and keeps no other from running.
    Errors: ``RequestError`` for a folder that holds something else.
    """

    def refresh(failures: Sequence[Failure]) -> None:
        write_benchmark(out, summarise_suite(suite, out, failures))

    with entered(out, _SUITE, "suite", resume=resume) as earlier:
        if earlier is not None and earlier.get("key") != suite.key():
            raise RequestError(f"{out} holds another suite: choose another --out")
        write_json(out / _SUITE, {"key": suite.key(), "suite": suite.model_dump(mode="json")})
        carry_out(
            plan(suite),
            out,
            executor,
            title="benchmark",
            refresh=refresh,
            data_dir=data_dir,
            retries=retries,
            reporter=reporter or Reporter(),
        )
    return Benchmark.model_validate(read_json(out / "table.json"))


def write_benchmark(out: Path, found: Benchmark) -> None:
    """``table.json``, ``table.md`` and ``heatmap.png`` in ``out``."""
    write_json(out / "table.json", found.model_dump(mode="json"))
    write_text(out / "table.md", as_markdown(found))
    heatmap_picture(out / "heatmap.png", found)
