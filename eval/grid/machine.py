"""Which executor a plan gets, by what its cells want and what the user has."""

from __future__ import annotations

import os

import torch

from ...distill.types import RequestError
from ..config.schema import RunSection
from .executors import Executor, Here, Processes
from .on_ray import OnRay

_GIB = 2**30


def executor_for(
    run: RunSection,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    gpus: float | None = None,
    memory: float | None = None,
) -> Executor:
    """Processes on this machine, or tasks on the Ray cluster at ``ray``.

    run: what the first cell says of its machine. jobs: processes, by default as many as fit the
    cores by the cell's threads, or one for each GPU; with a local Ray cluster its CPUs.
    gpus, memory: what a cell takes of a Ray cluster, a share of a GPU (default: a whole one for
    cells on ``cuda``) and GiB.
    Errors: ``RequestError`` for wishes that contradict each other.
    """
    on_gpu = run.device != "cpu"
    if ray is not None:
        if gpus and not on_gpu:
            raise RequestError(f"--gpus {gpus:g}: the cells run on the CPU: say device: cuda")
        return OnRay(
            ray,
            cpus=run.threads,
            gpus=(1.0 if gpus is None else gpus) if on_gpu else 0.0,
            memory=None if memory is None else int(memory * _GIB),
            workers=jobs,
        )
    if gpus is not None or memory is not None:
        raise RequestError("--gpus and --memory are what a cell takes of a Ray cluster: --ray")
    here = torch.cuda.device_count() if on_gpu else 0
    jobs = jobs or (max(1, here) if on_gpu else max(1, _cores() // run.threads))
    return Here() if jobs == 1 else Processes(jobs, gpus=here if run.device == "cuda" else 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
