"""What holds for every test: two threads, no network, no display, the checkout as installed."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["MPLBACKEND"] = "Agg"

import torch
from hypothesis import settings

import distillsec

CHECKOUT = Path(__file__).resolve().parents[1]
THREADS = 2

# The suite repeats exactly, and a busy machine fails no test by its slowness.
settings.register_profile("distillsec", derandomize=True, deadline=None, database=None)
settings.load_profile("distillsec")


def pytest_configure(config: pytest.Config) -> None:
    stale = _stale()
    if stale:
        raise pytest.UsageError(
            f"the installed distillsec is not this checkout's ({stale} differs): run `make install`"
        )


def _stale() -> str | None:
    """The first package file in which the checkout and the installed package differ."""
    installed = Path(distillsec.__path__[0]).resolve()
    if installed == CHECKOUT:  # an editable install
        return None
    folders = ("attacks", "defenses", "distill", "eval")
    for root, other in ((CHECKOUT, installed), (installed, CHECKOUT)):
        found = [
            *root.glob("*.py"),
            *(path for name in folders for path in (root / name).rglob("*")),
        ]
        for path in found:
            twin = other / path.relative_to(root)
            if path.suffix in {".py", ".yaml"} and not (
                twin.is_file() and twin.read_bytes() == path.read_bytes()
            ):
                return path.relative_to(root).as_posix()
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that does not fit is no GPU
        there = torch.cuda.is_available()
    if not there:
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that reaches for the network fails, even where the code under test catches errors."""
    attempts: list[str] = []

    def refuse_unless_local(host: object) -> None:
        if not _is_local(host):
            attempts.append(str(host))
            raise OSError(f"a test reached for the network: {host}")

    def guarded(name: str) -> Any:
        original = getattr(socket.socket, name)

        def guard(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse_unless_local(args[-1][0])  # the address comes last
            return original(self, *args)

        return guard

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **options: Any) -> Any:
        refuse_unless_local(host)
        return look_up(host, *args, **options)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    if attempts:
        pytest.fail(f"reached for the network: {', '.join(attempts)}")


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "::1", "0.0.0.0", "::") or str(name).startswith("127.")
