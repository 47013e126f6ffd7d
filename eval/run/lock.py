"""A lock on a folder: one process at a time writes to a run, a sweep or a suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...distill.types import RequestError

_LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, timeout: float = 0.0) -> Iterator[None]:
    """Lock ``folder``, which exists, against other processes; the lock ends with the process.

    timeout: seconds to wait for the lock. Errors: ``RequestError`` where another process holds it,
    or where the folder cannot be written to.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout, poll_interval=0.2)
    except Timeout:
        raise RequestError(f"another process is using {folder}") from None
    except OSError as error:
        raise RequestError(f"cannot use {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
