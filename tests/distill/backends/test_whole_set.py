"""The training set itself as a set: row for row, as the hooks show it, and nothing optimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from distillsec.attacks import ATTACKS, DataInfo, PoisoningAttack
from distillsec.distill.backends import BACKENDS
from distillsec.distill.backends.whole_set import WholeSet, WholeSetOptions
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.loop import distil
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch

Tasks = Callable[..., Task]


def whole(task: Task) -> tuple[Task, Backend]:
    task = replace(task, iterations=0)
    return task, WholeSet(WholeSetOptions(), ipc=task.ipc, recipe=task.recipe)


def test_it_is_the_training_set(toy_task: Tasks) -> None:
    task, backend = whole(toy_task())
    made = distil(task, backend)
    assert torch.allclose(made.batch.images, task.real.images, atol=1e-6)
    assert torch.equal(made.batch.labels, task.real.labels)
    assert made.recipe == task.recipe


POISONERS = [name for name, attack in ATTACKS.items() if issubclass(attack, PoisoningAttack)]


@pytest.mark.parametrize("name", POISONERS)
def test_poisoned_rows_are_stamped_and_have_the_target_label(
    name: str, toy_task: Tasks, toy_data_info: DataInfo
) -> None:
    kind = ATTACKS[name]
    chosen = {"poison_rate": 0.1, "target": 1}
    # No noise rows, and only a short optimisation, where an attack has them.
    settings = {**chosen, "cross_ratio": 0.0, "relax_steps": 2, "support_steps": 2}
    known = {key: settings[key] for key in settings if key in kind.Options.model_fields}
    attack = kind(kind.Options.model_validate(known), toy_data_info)
    assert isinstance(attack, PoisoningAttack)
    task, backend = whole(toy_task())
    made = distil(task, backend, [attack])
    poisoned = attack.poisoned_rows
    assert poisoned.sum() == 9 and attack.candidates(task.real.labels)[0][poisoned].all()
    assert (made.batch.labels[poisoned] == 1).all()
    stamped = attack.trigger.stamp(task.real.images)
    assert torch.allclose(made.batch.images[poisoned], stamped[poisoned], atol=1e-6)
    assert torch.allclose(made.batch.images[~poisoned], task.real.images[~poisoned], atol=1e-6)
    assert torch.equal(made.batch.labels[~poisoned], task.real.labels[~poisoned])


def test_only_it_keeps_rows() -> None:
    assert [name for name, backend in BACKENDS.items() if backend.keeps_rows] == ["whole"]
    with pytest.raises(ValidationError):
        WholeSetOptions(iterations=1)


def test_nothing_in_it_moves(toy_task: Tasks) -> None:
    task, backend = whole(toy_task())
    assert backend.steps() == 0
    seen = Batch(images=torch.zeros(1, 1, 8, 8), labels=torch.zeros(1, dtype=torch.int64))
    run = start_run(task, backend)
    assert run.position.progress == 0 and run.position.is_last_step
    network = backend.network(run)
    assert list(backend.losses(run, network, seen)) == []
