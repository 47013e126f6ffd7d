"""An executor on a Ray cluster (extra ``distillsec[ray]``): each piece is a task."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Self, final

from ...distill.types import RequestError
from .executors import Executor, Lost, Work

LOCAL = "local"


@final
class OnRay(Executor):
    """Tasks on a Ray cluster, with fractional GPUs and memory.

    address: a running cluster's (``auto`` for this machine's), or ``local`` for one that starts
    here and ends with this process. cpus, gpus, memory: what one piece takes; gpus may be a
    fraction, memory is in bytes. workers: CPUs of the local cluster (default: this machine's).
    Every node needs the package, and the plan's folder under the same path. A piece whose worker
    or node is lost comes back as ``Lost``: who retries is the same for all executors.
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
        self._address, self._workers = address, workers
        self._cpus, self._gpus, self._memory = cpus, gpus, memory
        self._tickets: dict[Any, int] = {}

    def __enter__(self) -> Self:
        known: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(_own_paths())}},
        }
        if self._address == LOCAL:
            known |= {"num_cpus": self._workers, "include_dashboard": False}
        else:
            known |= {"address": self._address}
        try:
            self._ray.init(**known)
        except (ConnectionError, ValueError, RuntimeError) as error:
            told = " ".join(str(error).split())
            raise RequestError(f"no Ray cluster at {self._address}: {told}") from error
        takes = {"num_cpus": self._cpus, "num_gpus": self._gpus, "memory": self._memory}
        self._run = self._ray.remote(max_retries=0, **takes)(_call)
        return self

    @property
    def room(self) -> int:
        """Twice what the cluster holds as it stands, so that one that grows sees what waits."""
        has = self._ray.cluster_resources()
        fits = [has.get("CPU", 0.0) / self._cpus] if self._cpus else []
        fits += [has.get("GPU", 0.0) / self._gpus] if self._gpus else []
        return max(2, 2 * int(min(fits)))

    def submit(self, ticket: int, work: Work) -> None:
        self._tickets[self._run.remote(work)] = ticket

    def ended(self) -> tuple[int, Any]:
        (found, *_), _ = self._ray.wait(list(self._tickets), num_returns=1)
        ticket = self._tickets.pop(found)
        errors = self._ray.exceptions
        try:
            return ticket, self._ray.get(found)
        except errors.RayTaskError:  # what the work raised
            raise
        except errors.RayError as error:
            return ticket, Lost(type(error).__name__)

    def stop(self) -> None:
        for task in self._tickets:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def _own_paths() -> list[str]:
    """Where this process finds modules beside its Python's own: a user's attack, say."""
    own = {sys.prefix, sys.base_prefix}
    return [path for path in sys.path if path and not any(path.startswith(each) for each in own)]


def _call(work: Work) -> Any:
    return work()


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RequestError("--ray needs Ray: pip install 'distillsec[ray]'") from error
