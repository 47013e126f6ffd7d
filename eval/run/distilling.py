"""One distillation in a run folder, which a stopped run resumes."""

from __future__ import annotations

from collections.abc import Callable

from ...attacks import Attack
from ...distill.core.backend import Backend
from ...distill.core.loop import distil
from ...distill.core.task import Task
from ...distill.files.artifact import save_set
from ...distill.types import Distillate, DistilledSet
from .folder import RunFolder
from .observer import Watcher
from .progress import Reporter
from .setup import Setup


def distil_in(
    folder: RunFolder,
    setup: Setup,
    task: Task,
    backend: Backend,
    attack: Attack | None,
    finish: Callable[[Distillate], DistilledSet],
    reporter: Reporter,
    title: str,
) -> tuple[DistilledSet, float]:
    """Distil ``task`` in ``folder``, from its checkpoint if there is one, and write the set.

    finish: makes the set from what was distilled. title: of the progress. Returns the set, and the
    seconds of work on it, earlier sessions included.
    """
    saved = folder.load(setup.config.key(), task.real.images.device)
    state, spent = saved or (None, 0.0)
    total = task.iterations * backend.steps()
    done = state.iteration * backend.steps() if state else 0
    with reporter.phase(title, total, done) as phase:
        watcher = Watcher(setup, folder, attack, phase, spent, finish)
        hooks = [attack] if attack else []
        made = distil(task, backend, hooks, observer=watcher, state=state)
    distilled = finish(made)
    save_set(folder.distilled, distilled)
    return distilled, watcher.seconds()
