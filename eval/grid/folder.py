"""The folders of sweeps and suites: opened by one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...distill.files.safe import read_json
from ...distill.types import RequestError
from ..run.lock import locked


@contextmanager
def opened(out: Path, file: str, kind: str, *, resume: bool) -> Iterator[Any]:
    """Lock ``out``: a new folder, or with ``resume`` one of this kind, which holds ``file``.

    Yields the content of ``file``, ``None`` in a new folder. kind: sweep or suite, for messages.
    Errors: ``RequestError`` for any other folder, and where another process holds the lock.
    """
    path = out / file
    try:
        out.mkdir(parents=True, exist_ok=True)
        used = any(not entry.name.startswith(".") for entry in out.iterdir())
    except OSError as error:
        raise RequestError(f"cannot use {out}: {error.strerror}") from error
    if used and not path.exists():
        raise RequestError(f"{out} is not empty, and holds no {kind}: choose another --out")
    if used and not resume:
        raise RequestError(f"{out} holds a {kind}: choose another --out, or continue with --resume")
    with locked(out):
        yield read_json(path) if used else None
