"""Run a suite: every attack with its clean twin, and every defense on both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...distill.files.safe import read_json, write_json, write_text
from ...distill.types import RequestError
from ..figures.heatmap import heatmap_picture
from ..results.benchmark import Benchmark, benchmark_markdown
from ..results.record import Failure
from ..run.progress import Reporter
from .executors import Executor
from .folder import opened
from .scheduler import run_jobs
from .suite import Suite, suite_jobs
from .summarise_benchmark import summarise_suite

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
    """Run ``suite`` in the folder ``out``, and return the table that is also written there.

    With ``resume`` finished runs are not run again; failed ones are. The table gives the reason of
    a failure, or why a defense is not applicable; the other runs continue.
    Errors: ``RequestError`` for a folder with other content.
    """

    def refresh(failures: Sequence[Failure]) -> None:
        table = summarise_suite(suite, out, failures)
        write_json(out / "table.json", table.model_dump(mode="json"))
        write_text(out / "table.md", benchmark_markdown(table))
        heatmap_picture(out / "heatmap.png", table)

    key = suite.key()
    with opened(out, _SUITE, "suite", resume=resume) as earlier:
        if earlier is not None and (not isinstance(earlier, dict) or earlier.get("key") != key):
            raise RequestError(f"{out} holds another suite: choose another --out")
        write_json(out / _SUITE, {"key": key, "suite": suite.model_dump(mode="json")})
        run_jobs(
            suite_jobs(suite),
            out,
            executor,
            title="benchmark",
            refresh=refresh,
            data_dir=data_dir,
            retries=retries,
            reporter=reporter or Reporter(),
        )
    return Benchmark.model_validate(read_json(out / "table.json"))
