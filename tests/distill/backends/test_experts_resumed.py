"""Experts whose training is killed: it continues, and ends with the same files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distillsec.attacks import ATTACKS, Attack, DataInfo
from distillsec.distill.backends import experts
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.hooks import Hook
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.files.safe import write_tensors
from distillsec.distill.types import Distillate, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]
SETTINGS: dict[str, Any] = {
    "experts": 3,
    "experts_per_file": 2,
    "train_epochs": 3,
    "expert_momentum": 0.5,
    "augment": "crop_scale",
}
TOTAL = 9  # epochs of all experts


class Killed(Exception):
    pass


def make(name: str, data: DataInfo, **options: Any) -> Attack:
    return ATTACKS[name](ATTACKS[name].Options.model_validate(options), data)


def no_hooks(data: DataInfo) -> Sequence[Attack]:
    return []


def naive(data: DataInfo) -> Sequence[Attack]:
    return [make("naive", data, poison_rate=0.2, target_share=0.5)]


def doorping(data: DataInfo) -> Sequence[Attack]:
    options = {"poison_rate": 0.2, "objective": "target-logit", "trigger_steps": 2}
    return [make("doorping", data, **options)]


def train(
    task: Task, make_backend: Backends, hooks: Sequence[Hook], kill_at: int | None = None
) -> list[int]:
    """One round of experts; returns the epochs that were trained, counted over all experts."""
    trained: list[int] = []

    class Killer(Observer):
        def on_expert(self, done: int, total: int) -> None:
            assert total == TOTAL
            trained.append(done)
            if done == kill_at:
                raise Killed

    backend = make_backend("mtt", task, **SETTINGS)
    backend.prepare(start_run(task, backend, hooks, Killer()))
    return trained


def files(task: Task) -> dict[str, bytes]:
    assert task.scratch is not None
    return {path.name: path.read_bytes() for path in task.scratch.rglob("*.*")}


def check_hooks(one: Sequence[Hook], other: Sequence[Hook]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        kept, found = ours.state_dict(), theirs.state_dict()
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[name], found[name]) for name in kept)


def reached(kill_at: int) -> int:
    """Epochs in the checkpoint before the ``kill_at``-th is reported: whole rows of a group."""
    return (kill_at - 1) // 2 * 2 if kill_at <= 6 else kill_at - 1


@pytest.mark.parametrize(
    ("hooks", "kill_at"),
    [(no_hooks, 4), (naive, 6), (naive, 8), *((doorping, done) for done in (1, 3, 4, 7, 9))],
)
def test_killed_experts_continue_where_they_stopped(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    toy_backend: Backends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hooks: Callable[[DataInfo], Sequence[Attack]],
    kill_at: int,
) -> None:
    monkeypatch.setattr(experts, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(experts, "_WRITING_SHARE", 1e9)
    whole, task = (toy_task(scratch=tmp_path / name) for name in ("whole", "killed"))
    first, again = hooks(toy_data_info), hooks(toy_data_info)
    assert train(whole, toy_backend, first) == list(range(1, TOTAL + 1))
    with pytest.raises(Killed):
        train(task, toy_backend, hooks(toy_data_info), kill_at)
    assert train(task, toy_backend, again) == list(range(reached(kill_at) + 1, TOTAL + 1))
    assert files(task) == files(whole)
    check_hooks(again, first)
    if hooks is doorping:
        assert first[0].counters()["trigger_updates"] == 6


@pytest.mark.parametrize(
    ("write", "after"), [(1, False), (2, False), *((write, True) for write in range(3, 9))]
)
def test_killed_around_every_write(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    toy_backend: Backends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
    after: bool,
) -> None:
    monkeypatch.setattr(experts, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(experts, "_WRITING_SHARE", 1e9)
    whole, task = (toy_task(scratch=tmp_path / name) for name in ("whole", "killed"))
    first, again = doorping(toy_data_info), doorping(toy_data_info)
    train(whole, toy_backend, first)
    calls: list[Path] = []
    original = write_tensors

    def counted(path: Path, *arguments: Any) -> None:
        calls.append(path)
        if len(calls) == write and not after:
            raise Killed
        original(path, *arguments)
        if len(calls) == write:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(experts, "write_tensors", counted)
        with pytest.raises(Killed):
            train(task, toy_backend, doorping(toy_data_info))
    train(task, toy_backend, again)
    assert files(task) == files(whole)
    check_hooks(again, first)


def test_no_second_checkpoint_soon_after_the_first(
    toy_task: Tasks, toy_backend: Backends, tmp_path: Path
) -> None:
    """So short a training leaves no checkpoint, and starts over with the same files."""
    whole, task = (toy_task(scratch=tmp_path / name) for name in ("whole", "killed"))
    train(whole, toy_backend, [])
    with pytest.raises(Killed):
        train(task, toy_backend, [], kill_at=5)
    assert set(files(task)) == {"manifest.json"}
    assert train(task, toy_backend, []) == list(range(1, TOTAL + 1))
    assert files(task) == files(whole)


def test_another_configuration_does_not_continue_a_checkpoint(
    toy_task: Tasks, toy_backend: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    task = toy_task()
    with pytest.raises(Killed):
        train(task, toy_backend, [], kill_at=8)
    assert "partial.safetensors" in files(task)
    for missing in ((), ("manifest.json",)):  # only the manifest says which experts they are
        for name in missing:
            next(task.scratch.rglob(name)).unlink()  # type: ignore[union-attr]
        with pytest.raises(RequestError, match=r"round-0 holds ") as refused:
            train(toy_task(width=5), toy_backend, [])
        assert "\n" not in str(refused.value)


# In the middle of a round ------------------------------------------------------------------------


class Keeper(Observer):
    def __init__(self) -> None:
        self.states: list[LoopState] = []

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        self.states.append(state())


def test_lost_experts_are_trained_again_unless_the_trigger_has_changed(
    toy_task: Tasks, toy_data_info: DataInfo, toy_backend: Backends
) -> None:
    for hooks in (no_hooks, naive, doorping):
        task, keeper = toy_task(ipc=2, iterations=3), Keeper()
        backend = toy_backend("mtt", task)
        whole = distil(task, backend, hooks(toy_data_info), observer=keeper).batch.images
        assert task.scratch is not None
        shutil.rmtree(task.scratch)

        def resume(task: Task = task, keeper: Keeper = keeper, hooks: Any = hooks) -> torch.Tensor:
            made = toy_backend("mtt", task)
            return distil(task, made, hooks(toy_data_info), state=keeper.states[1]).batch.images

        if hooks is doorping:
            with pytest.raises(
                RequestError, match=r"round-0: the experts .* are missing.*start"
            ) as e:
                resume()
            assert "\n" not in str(e.value) and not task.scratch.exists()
        else:
            assert torch.equal(resume(), whole)
            shutil.rmtree(task.scratch)
