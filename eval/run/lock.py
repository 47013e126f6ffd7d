"""Locks: one process at a time writes to a run, a sweep, a suite or a file of shadows."""

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
    with _held(folder / _LOCK, folder, timeout):
        yield


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Lock the file ``path``, which need not exist, in a folder that does; as ``locked``."""
    with _held(path.with_name(f".{path.name}{_LOCK}"), path, 0.0):
        yield


@contextmanager
def _held(place: Path, what: Path, timeout: float) -> Iterator[None]:
    lock = FileLock(place)
    try:
        lock.acquire(timeout, poll_interval=0.2)
    except Timeout:
        raise RequestError(f"another process is using {what}") from None
    except OSError as error:
        raise RequestError(f"cannot use {what}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
