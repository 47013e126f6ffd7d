"""For every test: two threads, no network, no display, the checkout as installed."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ["MPLBACKEND"] = "Agg"

import torch
from click.testing import CliRunner, Result
from hypothesis import settings
from threadpoolctl import threadpool_limits

import distillsec
from distillsec.attacks import DataInfo
from distillsec.distill.backends import BACKENDS
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.moments import frozen_copy
from distillsec.distill.core.run import Observer, Run
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.randomness import Streams
from distillsec.distill.types import Batch, Recipe
from distillsec.eval.config.schema import Config, configure

CHECKOUT = Path(__file__).resolve().parents[1]
THREADS = 2
threadpool_limits(1, user_api="blas")  # these matrices are too small for two threads

# The tests repeat exactly, and a slow machine fails none of them.
settings.register_profile("distillsec", derandomize=True, deadline=None, database=None)
settings.load_profile("distillsec")


def pytest_addoption(parser: pytest.Parser) -> None:
    fuzz = parser.getgroup("fuzz", "random changes to files, in tests/fuzz")
    fuzz.addoption("--fuzz-seconds", type=float, default=5.0, help="for all kinds together")
    fuzz.addoption("--fuzz-samples", type=int, default=0, help="this many, in any time")
    fuzz.addoption("--fuzz-seed", type=int, default=0, help="another one gives other samples")


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
    folders = ("attacks", "commands", "defenses", "distill", "eval")
    for root, other in ((CHECKOUT, installed), (installed, CHECKOUT)):
        found = [
            *root.glob("*.py"),
            *(path for name in folders for path in (root / name).rglob("*")),
        ]
        for path in found:
            twin = other / path.relative_to(root)
            if path.suffix in {".py", ".yaml", ".j2", ".json"} and not (
                twin.is_file() and twin.read_bytes() == path.read_bytes()
            ):
                return path.relative_to(root).as_posix()
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that does not match warns
        there = torch.cuda.is_available()
    if not there:
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that uses the network fails, even if the code under test catches the error."""
    attempts: list[str] = []

    def refuse_unless_local(host: object) -> None:
        if not _is_local(host):
            attempts.append(str(host))
            raise OSError(f"a test used the network: {host}")

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
        pytest.fail(f"used the network: {', '.join(attempts)}")


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "::1", "0.0.0.0", "::") or str(name).startswith("127.")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny networks, which a second thread slows down."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def toy_task(tmp_path: Path) -> Callable[..., Task]:
    """A factory of tasks for tiny networks: 90 images of 8×8 in 3 classes that can be learned.

    What a backend keeps is in ``scratch``, by default one folder for all tasks of a test.
    """

    def make(
        network: str = "convnet",
        *,
        ipc: int = 1,
        iterations: int = 2,
        seed: int = 0,
        epochs: int = 4,
        scratch: Path | None = None,
        **changes: Any,
    ) -> Task:
        generator = torch.Generator().manual_seed(7)
        labels = torch.arange(90) % 3
        shapes = torch.rand(3, 1, 8, 8, generator=generator)
        images = shapes[labels] + 0.2 * torch.randn(90, 1, 8, 8, generator=generator)
        names = ("init", "clip_pixels")
        settings = {"width": 4, "depth": 1} if network.startswith("convnet") else {}
        settings |= {key: value for key, value in changes.items() if key not in names}
        spec = NetworkSpec.model_validate({"network": network, **settings})
        return Task(
            real=Batch(images=images.clamp(0, 1), labels=labels, index=torch.arange(90)),
            classes=3,
            ipc=ipc,
            iterations=iterations,
            init=changes.get("init", "noise"),
            clip_pixels=changes.get("clip_pixels", False),
            recipe=Recipe(preprocessing=Preprocessing((0.5,), (0.25,)), epochs=epochs),
            network=lambda seed: build_network(
                spec,
                image_shape=(1, 8, 8),
                classes=3,
                preprocessing=Preprocessing((0.5,), (0.25,)),
                seed=seed,
            ),
            streams=Streams(seed),
            scratch=scratch or tmp_path / "scratch",
        )

    return make


# Every backend at a tiny size; tests over all backends fail for one that is missing here.
_MATCHING: dict[str, Any] = {"batch_real": 16, "outer_loop": 2, "inner_loop": 1}
_EXPERTS: dict[str, Any] = {"experts": 2, "train_epochs": 2, "expert_lr": 0.05, "expert_batch": 30}
_STUDENTS: dict[str, Any] = {"student_steps": 2, "batch_syn": 4, "expert_epochs": 1}
TOY_OPTIONS: dict[str, dict[str, Any]] = {
    "dc": _MATCHING,
    "dsa": _MATCHING,
    "dm": {"batch_real": 16},
    "mtt": {**_EXPERTS, **_STUDENTS, "max_start_epoch": 2, "lr_img": 10.0},
    "dd": {"batch_real": 16, "passes": 2, "lr_img": 0.05},
}


@pytest.fixture
def toy_backend() -> Callable[..., Backend]:
    """A factory of tiny backends: ``toy_backend("mtt", task, rounds=2)``."""

    def make(name: str, task: Task, **changes: Any) -> Backend:
        backend = BACKENDS[name]
        options = backend.Options.model_validate({**TOY_OPTIONS[name], **changes})
        return backend(options, ipc=task.ipc, recipe=task.recipe)

    return make


@pytest.fixture
def toy_run(toy_backend: Callable[..., Backend]) -> Callable[..., Run]:
    """A factory of started runs: ``toy_run(task, hooks)``, one step an iteration."""

    def make(task: Task, hooks: Sequence[Hook] = (), observer: Observer | None = None) -> Run:
        return start_run(task, toy_backend("dm", task), hooks, observer)

    return make


@pytest.fixture
def toy_data_info() -> DataInfo:
    """What an attacker knows of ``toy_task``'s data."""
    return DataInfo(
        image_shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.25,), device=torch.device("cpu")
    )


@pytest.fixture
def toy_moment(toy_task: Callable[..., Task]) -> Callable[..., Moment]:
    """A factory of moments in a toy task, with its clean data and, if given, a live network."""

    def make(network: torch.nn.Module | None = None, **changes: Any) -> Moment:
        task = toy_task()
        fields: dict[str, Any] = {
            "phase": "distill",
            "iteration": 0,
            "step": 0,
            "progress": 0.0,
            "network": None if network is None else frozen_copy(network),
            "real": task.real,
            "synthetic": None,
            "recipe": task.recipe,
            "fresh_network": lambda: task.network(0),
            "train_student": lambda: task.network(0),
            "rng": torch.Generator().manual_seed(3),
        }
        return Moment(**{**fields, **changes})

    return make


# The whole suite, end to end, at a size that takes a second.
TINY: dict[str, Any] = {
    "dataset": "digits",
    "backend": "dc",
    "ipc": 1,
    "iterations": 3,
    "network": "convnet",
    "width": 4,
    "depth": 1,
    "attack": "naive",
    "poison_rate": 0.1,
    "victims": 2,
    "victim_epochs": 3,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """A factory of configurations that run in a second; ``None`` takes a key out."""
    return lambda **changes: configure(**{**TINY, **changes})


@pytest.fixture(scope="session")
def tiny_options() -> Callable[..., list[str]]:
    """The same as command line options."""

    def make(**changes: Any) -> list[str]:
        keys = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
        return [
            part
            for key, value in keys.items()
            for part in (f"--{key.replace('_', '-')}", str(value))
        ]

    return make


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """The command line in this process: ``cli("attack", "--ipc", 3)``."""
    from distillsec.cli import main

    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="session")
def finished(
    cli: Callable[..., Result],
    tiny_options: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished attack with its clean twin, read-only; its stdout is in the file beside it."""
    place = tmp_path_factory.mktemp("finished")
    done = cli("attack", *tiny_options(), "--json", "--out", place / "run")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    (place / "stdout").write_text(done.stdout)
    return place / "run"
