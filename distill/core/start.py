"""The start of a run: hooks change the training set, and the synthetic images get first values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..types import RequestError
from .backend import Backend
from .finite import FiniteChecks
from .hooks import Hook, fold
from .moments import Moments
from .position import Position
from .real import RealData
from .run import Observer, Run
from .synthetic import SyntheticSet
from .task import Task


def start_run(
    task: Task, backend: Backend, hooks: Sequence[Hook] = (), observer: Observer | None = None
) -> Run:
    """A run of ``task`` before its first step: ``on_start`` was called, the images have values.

    Without further steps this validates that the data suffices, and an attack among ``hooks``
    knows its poisoned rows afterwards.
    Errors: ``RequestError`` where a class has too few rows; ``RunError`` where a hook fails.
    """
    device, space = task.real.images.device, task.recipe.preprocessing
    position = Position(task.streams, task.iterations, backend.steps())
    learned = {name: value.to(device) for name, value in backend.learned().items()}
    synthetic = SyntheticSet(space, learned, partial(backend.recipe, task))
    moments = Moments(task, position, synthetic)
    left = fold(hooks, "on_start", moments.at("on_start"), task.real)
    checks = FiniteChecks()
    real = RealData(left, task.classes, hooks, moments, checks)
    start = backend.start(real)
    if start is None:
        labels = torch.arange(task.classes, device=device).repeat_interleave(task.ipc)
        synthetic.place(_initial_images(task, real), labels)
    else:
        synthetic.place(space.normalise(start.images), start.labels)
    return Run(
        task=task,
        position=position,
        real=real,
        synthetic=synthetic,
        moments=moments,
        hooks=hooks,
        observer=observer or Observer(),
        checks=checks,
    )


def _initial_images(task: Task, real: RealData) -> Tensor:
    """The images that ``task.init`` asks for, in normalised space."""
    generator = task.streams.generator("init")
    if task.init == "noise":
        shape = (task.classes * task.ipc, *task.real.images.shape[1:])
        return torch.randn(shape, generator=generator).to(task.real.images.device)
    if task.init == "poisoned":
        drawn = [real.draw(label, task.ipc, generator).images for label in range(task.classes)]
    else:
        drawn = _clean_images(task, real, generator)
    for label, images in enumerate(drawn):
        if len(images) < task.ipc:
            raise RequestError(
                f"class {label} has {len(images)} rows to start {task.ipc} images per class "
                f"from: lower --ipc or start from noise (--init noise)"
            )
    return task.recipe.preprocessing.normalise(torch.cat(drawn))


def _clean_images(task: Task, real: RealData, generator: torch.Generator) -> list[Tensor]:
    """Clean pixels of rows that kept their label, class by class.

    One order of all rows is drawn and each class takes its first: the clean twin, whose rows
    all kept their label, then starts from nearly the same images.
    """
    clean = task.real
    order = torch.randperm(len(clean), generator=generator).to(clean.labels.device)
    kept = order[real.batch.labels[order] == clean.labels[order]]
    return [
        clean.images[kept[clean.labels[kept] == label][: task.ipc]] for label in range(task.classes)
    ]
