"""The choice of an executor, by the device and threads of the jobs and the user's options."""

from __future__ import annotations

import torch
from joblib import cpu_count

from ...distill.types import RequestError
from ..config.schema import RunSection
from .executors import Executor, ProcessExecutor, SerialExecutor
from .ray_executor import RayExecutor

_GIB = 2**30


def choose_executor(
    run: RunSection,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    gpus: float | None = None,
    memory: float | None = None,
) -> Executor:
    """Processes on this machine, or tasks on the Ray cluster at ``ray``.

    run: device and threads of the first cell. jobs: the number of processes, by default as many as
    the cores allow with that many threads, or one for each GPU; for a local Ray cluster its CPUs.
    gpus, memory: the resources of a cell on a Ray cluster, GPUs (may be a fraction; default: one
    for cells on ``cuda``) and GiB.
    Errors: ``RequestError`` for options that contradict each other.
    """
    on_gpu = run.device != "cpu"
    if ray is not None:
        if gpus and not on_gpu:
            raise RequestError(f"--gpus {gpus:g}: the cells run on the CPU: set device: cuda")
        return RayExecutor(
            ray,
            cpus=run.threads,
            gpus=(1.0 if gpus is None else gpus) if on_gpu else 0.0,
            memory=None if memory is None else int(memory * _GIB),
            workers=jobs,
        )
    if gpus is not None or memory is not None:
        raise RequestError("--gpus and --memory are a cell's resources on a Ray cluster: --ray")
    count = torch.cuda.device_count() if on_gpu else 0
    jobs = jobs or (max(1, count) if on_gpu else max(1, cpu_count() // run.threads))
    if jobs == 1:
        return SerialExecutor()
    return ProcessExecutor(jobs, gpus=count if run.device == "cuda" else 0)
