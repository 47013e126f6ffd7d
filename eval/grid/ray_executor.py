"""An executor on a Ray cluster (extra ``distillsec[ray]``)."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from typing import Any, Self, final

from ...distill.types import RequestError
from .executors import Executor, Work, WorkerDied

LOCAL = "local"
_CONNECT_SECONDS = 5.0


@final
class RayExecutor(Executor):
    """Runs work as tasks on a Ray cluster, with fractional GPUs and memory.

    address: that of a running cluster (``auto``: the one on this machine), or ``local`` for a
    cluster that starts here and ends with this process. cpus, gpus, memory: the resources of one
    task; gpus may be a fraction, memory is in bytes. workers: the CPUs of the local cluster
    (default: all of this machine). Every node needs the package, and the output folder under the
    same path. Ray retries nothing: a lost worker or node gives ``WorkerDied``, as in all executors.
    Errors: ``RequestError`` without Ray, or where there is no such cluster.
    """

    def __init__(
        self,
        address: str,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        memory: int | None = None,
        workers: int | None = None,
    ) -> None:
        self._ray = _import_ray()
        _check_address(address)
        self._address, self._workers = address, workers
        self._cpus, self._gpus, self._memory = cpus, gpus, memory
        self._tickets: dict[Any, int] = {}

    def __enter__(self) -> Self:
        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(_own_paths())}},
        }
        if self._address == LOCAL:
            options |= {"num_cpus": self._workers, "include_dashboard": False}
        else:
            options |= {"address": self._address}
        try:
            self._ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise RequestError(f"no Ray cluster at {self._address}: {text}") from error
        resources = {"num_cpus": self._cpus, "num_gpus": self._gpus, "memory": self._memory}
        self._run = self._ray.remote(max_retries=0, **resources)(_call)
        return self

    @property
    def slots(self) -> int:
        """Twice what the cluster can run now: waiting tasks make an autoscaling cluster grow."""
        resources = self._ray.cluster_resources()
        fits = [resources.get("CPU", 0.0) / self._cpus] if self._cpus else []
        fits += [resources.get("GPU", 0.0) / self._gpus] if self._gpus else []
        return max(2, 2 * int(min(fits)))

    def submit(self, ticket: int, work: Work) -> None:
        self._tickets[self._run.remote(work)] = ticket

    def next_result(self) -> tuple[int, Any]:
        (found, *_), _ = self._ray.wait(list(self._tickets), num_returns=1)
        ticket = self._tickets.pop(found)
        errors = self._ray.exceptions
        try:
            return ticket, self._ray.get(found)
        except errors.RayTaskError:  # an error of the work
            raise
        except errors.RayError as error:
            return ticket, WorkerDied(type(error).__name__)

    def stop(self) -> None:
        for task in self._tickets:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address that does not answer: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise RequestError(f"--ray {address}: expected auto, local, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        raise RequestError(f"no Ray cluster at {address}: {error}") from error


def _own_paths() -> list[str]:
    """The import paths besides Python's own, where a user's attack may be."""
    own = {sys.prefix, sys.base_prefix}
    return [path for path in sys.path if path and not any(path.startswith(each) for each in own)]


def _call(work: Work) -> Any:
    return work()


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RequestError("--ray needs Ray: pip install 'distillsec[ray]'") from error
