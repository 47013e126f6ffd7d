"""How the program ends: one line on stderr and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click


def leave(ctx: click.Context, code: int, line: str) -> NoReturn:
    """End the program with one line on stderr and an exit code."""
    click.echo(f"distillsec: {' '.join(line.split())}", err=True)
    ctx.exit(code)


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Ctrl-C ends the program with a line that says how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        how = f"; resume with the same command and --out {out} --resume" if out.exists() else ""
        leave(click.get_current_context(), 1, f"stopped{how}")


def explain(error: Exception) -> tuple[int, str] | None:
    """The exit code and the line for ``error``; ``None`` for a fault of the suite itself."""
    # Only a command raises these, and it has imported torch already; ``--help`` has not.
    from ..distill.types import RequestError, RunError
    from ..eval.run.checks import out_of_memory

    if isinstance(error, RequestError | OSError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, f"the run failed: {error}"
    if out_of_memory(error):
        return 1, "out of memory: a smaller --width, --ipc or --set batch_real=N needs less"
    return None
