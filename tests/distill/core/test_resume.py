"""A kept state that is of another run is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.attacks import ATTACKS, DataInfo
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.hooks import Hook
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.types import Distillate, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]


class Keeper(Observer):
    """Keeps the last state."""

    state: LoopState

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        self.state = state()


def kept(task: Task, backend: Backend, hooks: list[Hook]) -> LoopState:
    keeper = Keeper()
    distil(task, backend, hooks, observer=keeper)
    return keeper.state


def changed(tensors: Mapping[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    others = {key: each for key, each in tensors.items() if key != name}
    return others if value is None else {**others, name: value}


CHANGES: dict[str, tuple[Callable[[LoopState], dict[str, Any]], str]] = {
    "one image for all": (
        lambda state: {"leaf": state.leaf[:1]},
        "leaf is torch.float32 (1, 1, 8, 8), expected torch.float32 (3, 1, 8, 8)",
    ),
    "a type": (lambda state: {"leaf": state.leaf.double()}, "leaf is torch.float64"),
    "NaN": (lambda state: {"leaf": state.leaf / 0}, "the images holds NaN or infinite"),
    "no rates": (lambda state: {"learned": {}}, "raw_rates is absent"),
    "another rate": (
        lambda state: {"learned": {**state.learned, "x": torch.ones(1)}},
        "x is torch.float32 (1,), expected absent",
    ),
    "no moments": (
        lambda state: {"optimiser": changed(state.optimiser, "0.exp_avg", None)},
        "0.exp_avg is absent",
    ),
    "of no parameter": (
        lambda state: {"optimiser": {**state.optimiser, "x": torch.ones(1)}},
        "x is torch.float32 (1,), expected absent",
    ),
    "steps below 0": (
        lambda state: {"optimiser": changed(state.optimiser, "0.step", torch.tensor(-1e30))},
        "the optimiser is not one",
    ),
    "no step": (
        lambda state: {"optimiser": changed(state.optimiser, "0.step", torch.tensor(-1.0))},
        "the optimiser is not one",
    ),
    "more iterations": (lambda state: {"iteration": 3}, "of 3 iterations, the run has 2"),
}


@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
def test_another_state_is_refused(
    toy_task: Tasks,
    toy_backend: Backends,
    change: Callable[[LoopState], dict[str, Any]],
    text: str,
) -> None:
    task = toy_task()
    state = kept(replace(task, iterations=1), toy_backend("dd", task), [])
    distil(task, toy_backend("dd", task), state=state)
    with pytest.raises(RequestError) as refused:
        distil(task, toy_backend("dd", task), state=replace(state, **change(state)))
    assert text in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "hooks",
    [
        {},
        {"hook.0.pattern": torch.ones(1, 8, 8)},
        {"hook.0.pattern": torch.ones(1, 1, 1), "hook.0.counts": torch.zeros(4)},
        {"hook.0.pattern": torch.ones(1, 8, 8) / 0, "hook.0.counts": torch.zeros(4)},
        {"hook.0.pattern": torch.ones(1, 8, 8), "hook.0.counts": torch.zeros(9)},
    ],
)
def test_hooks_that_cannot_take_their_state(
    toy_task: Tasks, toy_backend: Backends, toy_data_info: DataInfo, hooks: dict[str, Tensor]
) -> None:
    doorping = ATTACKS["doorping"]
    options = doorping.Options.model_validate({"poison_rate": 0.2, "objective": "target-logit"})

    def attack() -> list[Hook]:
        return [doorping(options, toy_data_info)]

    task = toy_task()
    state = kept(replace(task, iterations=1), toy_backend("dc", task), attack())
    distil(task, toy_backend("dc", task), attack(), state=state)
    with pytest.raises(RequestError, match=r"^Doorping cannot take its kept state \("):
        distil(task, toy_backend("dc", task), attack(), state=replace(state, hooks=hooks))


def test_a_state_before_the_start_is_none() -> None:
    with pytest.raises(ValueError, match="-1 iterations"):
        LoopState.from_tensors(-1, {"leaf": torch.zeros(1)})
    with pytest.raises(KeyError, match="leaf"):
        LoopState.from_tensors(0, {})
