"""The command that shows what runs, sweeps and suites measured: ``report``."""

from __future__ import annotations

from pathlib import Path

import click

from ..distill.files.safe import write_text
from ..distill.types import RequestError
from ..eval.report.compare import compare
from ..eval.report.load import gather_source
from ..eval.report.page import page
from ..eval.report.tables import FORMATS
from ..eval.results.record import command_line
from ..eval.run.progress import Reporter
from . import options

_PAGE = "html"
_OUT = Path("report.html")
# Files that runs are read from: a slip of the hand after -o must not cost one.
_KEPT = ("record.json", "table.json", "sweep.json", "suite.json", "progress.jsonl", "ledger.jsonl")


@click.command()
@click.argument("sources", type=options.PATH, nargs=-1, required=True, metavar="RUN|SWEEP...")
@click.option("-o", "--out", type=options.PATH, help="File (default: report.html; tables: stdout).")
@click.option(
    "--format",
    "kind",
    type=click.Choice([_PAGE, *FORMATS]),
    default=_PAGE,
    show_default=True,
    help="A page, or tables alone.",
)
@click.option("--baseline", type=options.PATH, help="A run, sweep or suite to compare with.")
@click.option("--quiet", is_flag=True, help="No progress.")
def report(
    sources: tuple[Path, ...], out: Path | None, kind: str, baseline: Path | None, quiet: bool
) -> None:
    """One page about runs, sweeps and suites: figures, charts, pictures, commands.

    \b
    Of a sweep, finished or not:
        distillsec report runs/quick -o report.html
    Of several runs, one beside the other:
        distillsec report runs/a runs/b runs/classic -o report.html
    What changed, and is it more than noise? Paired by distillation seed:
        distillsec report runs/new --baseline runs/old -o changes.html
    Tables for a paper or a program:
        distillsec report runs/quick --format latex -o table.tex
        distillsec report runs/quick --format csv > table.csv

    The page is one file below 5 MB that reaches for no network. See docs/report.md.
    """
    if kind == _PAGE:
        out = out or _OUT
    if out is not None:
        _check(out)
    gathered = [gather_source(path) for path in sources]
    comparisons = [] if baseline is None else compare(gathered, gather_source(baseline))
    if kind != _PAGE:
        text = FORMATS[kind](gathered, comparisons)
    else:
        text = page(gathered, comparisons, command=command_line(), reporter=Reporter(quiet=quiet))
    if out is None:
        click.echo(text, nl=False)
        return
    write_text(out, text)
    click.echo(f"{out} ({len(text.encode()) / 1e6:.1f} MB)" if kind == _PAGE else str(out))


def _check(out: Path) -> None:
    """Refuse, before the work, a place that can't be written or that holds a run's own file."""
    if out.name in _KEPT or out.suffix == ".safetensors":
        raise RequestError(f"{out} would overwrite a run's own file: choose another -o")
    if out.is_dir():
        raise RequestError(f"cannot write {out}: it is a folder, -o wants a file")
    if not out.parent.is_dir():
        raise RequestError(f"cannot write {out}: there is no folder {out.parent}")
