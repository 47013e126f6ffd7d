"""The command that shows what runs, sweeps and suites measured: ``report``."""

from __future__ import annotations

from pathlib import Path

import click

from ..distill.files.safe import write_bytes
from ..distill.types import RequestError
from ..eval.report.charts import write_charts
from ..eval.report.compare import compare
from ..eval.report.export import FORMATS, WIDE
from ..eval.report.load import load_experiment
from ..eval.report.page import page
from ..eval.results.record import command_line
from ..eval.run.progress import Reporter
from . import options
from .exits import write_out

_PAGE = "html"
_BINARY = "parquet"
_OUT = Path("report.html")
# Files of a run that a mistyped -o must not overwrite.
_KEPT = ("record.json", "table.json", "sweep.json", "suite.json", "progress.jsonl", "ledger.jsonl")


@click.command()
@click.argument("sources", type=options.PATH, nargs=-1, required=True, metavar="RUN|SWEEP...")
@click.option("-o", "--out", type=options.PATH, help="File (default: report.html; tables: stdout).")
@click.option(
    "--format",
    "kind",
    type=click.Choice([_PAGE, *FORMATS]),
    help="A page (html, the default) or only its tables.",
)
@click.option("--wide", is_flag=True, help="With --format csv: one line a row, not one a figure.")
@click.option("--baseline", type=options.PATH, help="A run, sweep or suite to compare with.")
@click.option(
    "--charts",
    type=options.PATH,
    help="Write the charts as SVG files into this folder; without -o or --format nothing else.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
def report(
    sources: tuple[Path, ...],
    out: Path | None,
    kind: str | None,
    wide: bool,
    baseline: Path | None,
    charts: Path | None,
    quiet: bool,
) -> None:
    """Make one page from runs, sweeps and suites.

    It holds figures, charts, pictures, and the commands that made them.

    \b
    A sweep, finished or not:
        distillsec report runs/quick -o report.html
    Several runs side by side:
        distillsec report runs/a runs/b runs/classic -o report.html
    What changed, and whether it is more than noise, paired by distillation seed:
        distillsec report runs/b --baseline runs/a -o changes.html
    Tables for a paper or a program:
        distillsec report runs/quick --format latex -o table.tex
        distillsec report runs/quick --format csv > table.csv
        distillsec report runs/quick --format parquet -o table.parquet
    Charts for a paper:
        distillsec report runs/quick --charts charts/

    The page is one file below 5 MB that needs no network. See docs/report.md.
    """
    charts_only = charts is not None and out is None and kind is None
    kind = kind or _PAGE
    if kind == _PAGE and not charts_only:
        out = out or _OUT
    if wide and kind not in WIDE:
        raise RequestError(f"--wide is for --format {', '.join(WIDE)}, not for {kind}")
    if kind == _BINARY and out is None:
        raise RequestError(f"--format {kind} is no text: name a file with -o")
    if out is not None:
        _check(out)
    experiments = [load_experiment(path) for path in sources]
    comparisons = [] if baseline is None else compare(experiments, load_experiment(baseline))
    if charts is not None:
        count = len(write_charts(experiments, charts))
        line = f"{charts}: {count} charts"
        if charts_only:
            write_out(line)
        else:  # a table may be on stdout
            Reporter().say(line)
    if charts_only:
        return
    text: str | bytes
    if kind != _PAGE:
        text = (WIDE if wide else FORMATS)[kind](experiments, comparisons)
    else:
        text = page(
            experiments, comparisons, command=command_line(), reporter=Reporter(quiet=quiet)
        )
    if out is None:
        assert isinstance(text, str)
        write_out(text, newline=False)
        return
    content = text.encode() if isinstance(text, str) else text
    write_bytes(out, content)
    write_out(f"{out} ({len(content) / 1e6:.1f} MB)" if kind == _PAGE else str(out))


def _check(out: Path) -> None:
    """Refuse early a path that can't be written or that is a run's own file."""
    if out.name in _KEPT or out.suffix == ".safetensors":
        raise RequestError(f"{out} would overwrite a run's own file: choose another -o")
    if out.is_dir():
        raise RequestError(f"cannot write {out}: it is a folder, -o takes a file")
    if not out.parent.is_dir():
        raise RequestError(f"cannot write {out}: there is no folder {out.parent}")
