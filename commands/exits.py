"""How the program ends: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import click


def leave(ctx: click.Context, code: int, line: str) -> NoReturn:
    """End the program with one line on stderr and an exit code."""
    with suppress(OSError):
        click.echo(f"distillsec: {printable(' '.join(line.split()))}", err=True)
    ctx.exit(code)


def write_out(text: str, *, newline: bool = True) -> None:
    """Write a result to stdout.

    A reader that closed the other end, as ``head`` does, has what it wanted: the rest is dropped.
    """
    try:
        click.echo(text, nl=newline)
    except BrokenPipeError:
        # Python writes what is left when it ends, and would fail again.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def printable(text: str) -> str:
    """``text`` with escapes for what could control a terminal: records may hold it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


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

    if _disk_is_full(error):
        return 1, f"the disk is full: {error}"
    if isinstance(error, RequestError | OSError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, f"the run failed: {error}"
    if out_of_memory(error):
        return 1, "out of memory: a smaller --width, --ipc or --set batch_real=N needs less"
    return None


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it was raised for, says that there is no room on a disk."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors writes in Rust, and says the number only.
        if full or f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
