"""Every backend in the loop: the order of events, resuming anywhere, the same seed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillsec.attacks import ATTACKS, DataInfo
from distillsec.distill.backends import BACKENDS
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.hooks import EVENTS, Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.types import Distillate, RunError

DISTILLING = [name for name, backend in BACKENDS.items() if not backend.keeps_rows]

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]


class Watcher(Observer):
    """Keeps all that an observer sees."""

    def __init__(self) -> None:
        self.experts: list[tuple[int, int]] = []
        self.steps: list[tuple[int, int]] = []
        self.made: list[Distillate] = []
        self.states: list[LoopState] = []

    def on_expert(self, done: int, total: int) -> None:
        self.experts.append((done, total))

    def on_step(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        assert loss > 0
        self.made.append(made)
        self.states.append(state())


# The order of events -----------------------------------------------------------------------------


@dataclass
class Log:
    """What a recorder heard: event, phase and step, with the network that was shown."""

    heard: list[tuple[str, str, int]] = field(default_factory=list)
    networks: list[nn.Module | None] = field(default_factory=list)


def recorder(log: Log) -> Hook:
    """A hook that notes every event and changes nothing."""

    def listen(event: str) -> Callable[..., Any]:
        def method(self: Hook, moment: Moment, *arguments: Any) -> Any:
            log.heard.append((event, moment.phase, moment.step))
            log.networks.append(moment.network)
            return None if event in ("on_loss", "on_network") else arguments[-1]

        return method

    return type("Recorder", (Hook,), {event: listen(event) for event in EVENTS})()  # type: ignore[no-any-return]


def step(number: int, *, draws: int, samples: int = 1, last: bool = False) -> list[Any]:
    """The events of one synthetic step; a draw offers ``samples`` classes' rows first."""
    events = [*["on_sample"] * samples, "on_draw"] * draws + ["on_loss", "on_synthetic"]
    return [(event, "distill", number) for event in events + ["on_network"] * (not last)]


def experts(at: int) -> list[Any]:
    """Two experts side by side for two epochs of three batches, all of which hold three classes."""
    batch = ["on_sample"] * 3 + ["on_draw"]
    first, last = [*batch * 3, "on_network"], batch * 3
    return [(event, "expert", at) for event in [*first * 2, *last * 2]]


def run_of(steps: int, *, draws: int = 3, samples: int = 1) -> list[Any]:
    """The events of a run without experts."""
    each = (step(n, draws=draws, samples=samples, last=n + 1 == steps) for n in range(steps))
    return [event for events in each for event in events]


# By backend: iterations, options, and what happens between on_start and on_finish.
TWO_ROUNDS = [
    *(*experts(0), *step(0, draws=0), *step(1, draws=0)),
    *(*experts(2), *step(2, draws=0, last=True)),
]
ORDERS: dict[str, tuple[int, dict[str, Any], list[Any]]] = {
    "dc": (2, {}, run_of(4)),
    "dsa": (2, {}, run_of(4)),
    "dm": (3, {}, run_of(3)),
    "mtt": (3, {"rounds": 2}, TWO_ROUNDS),
    "dd": (2, {"networks": 2, "batch_real": 60}, run_of(2, draws=2, samples=3)),
}


@pytest.mark.parametrize("name", DISTILLING)
def test_the_order_of_events(toy_task: Tasks, toy_backend: Backends, name: str) -> None:
    iterations, options, between = ORDERS[name]
    log, watcher = Log(), Watcher()
    task = toy_task(ipc=2, iterations=iterations)
    backend = toy_backend(name, task, **options)
    distil(task, backend, [recorder(log)], observer=watcher)
    total = iterations * backend.steps()
    first, last = ("on_start", "distill", 0), ("on_finish", "distill", total)
    assert log.heard == [first, *between, last]
    shown = {event for (event, *_), each in zip(log.heard, log.networks, strict=True) if each}
    assert shown == {"on_loss", "on_network"}
    assert watcher.steps == [(done, total) for done in range(1, total + 1)]
    assert len(watcher.made) == iterations
    assert watcher.experts == [(done, 4) for done in range(1, 5)] * (2 * (name == "mtt"))


# Resuming ----------------------------------------------------------------------------------------


def no_hooks(data: DataInfo) -> list[Hook]:
    return []


def naive(data: DataInfo) -> list[Hook]:
    attack = ATTACKS["naive"]
    options = {"poison_rate": 0.2, "target_share": 0.5}
    return [attack(attack.Options.model_validate(options), data)]


def doorping(data: DataInfo) -> list[Hook]:
    attack = ATTACKS["doorping"]
    options = {"poison_rate": 0.2, "objective": "target-logit", "trigger_steps": 2}
    return [attack(attack.Options.model_validate(options), data)]


# What each backend has that a resumed run could lose.
RESUMED: dict[str, list[dict[str, Any]]] = {
    "dc": [{}],
    "dsa": [{}],
    "dm": [{"norm": "batch"}],
    "mtt": [{"rounds": 2}, {"norm": "batch", "gradient": "recompute"}],
    "dd": [{"networks": 2, "decay_every": 2}, {"norm": "batch", "student_init": "fixed"}],
}
CASES = [(name, options) for name in DISTILLING for options in RESUMED[name]]


def check_same(one: Distillate, other: Distillate) -> None:
    assert torch.equal(one.batch.images, other.batch.images)
    assert torch.equal(one.batch.labels, other.batch.labels)
    assert one.recipe == other.recipe


@pytest.mark.parametrize("hooks", [naive, doorping])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_run_resumed_anywhere_ends_bit_for_bit_the_same(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    toy_backend: Backends,
    name: str,
    options: dict[str, Any],
    hooks: Callable[[DataInfo], Sequence[Hook]],
) -> None:
    options = dict(options)
    norm = options.pop("norm", "instance")
    task, watcher = toy_task(ipc=2, iterations=4, norm=norm), Watcher()
    first = hooks(toy_data_info)
    whole = distil(task, toy_backend(name, task, **options), first, observer=watcher)
    check_same(watcher.made[-1], whole)
    assert len(watcher.states) == 4
    assert not torch.equal(watcher.states[0].leaf, watcher.states[1].leaf)
    for state in watcher.states:
        again = hooks(toy_data_info)
        check_same(distil(task, toy_backend(name, task, **options), again, state=state), whole)
        for old, new in zip(first, again, strict=True):
            kept, regained = old.state_dict(), new.state_dict()
            assert kept.keys() == regained.keys()
            assert all(torch.equal(kept[key], regained[key]) for key in kept)


@pytest.mark.parametrize("name", DISTILLING)
def test_what_is_learned_beside_the_images_is_in_the_state(
    toy_task: Tasks, toy_backend: Backends, name: str
) -> None:
    task, watcher = toy_task(ipc=2, iterations=2), Watcher()
    backend = toy_backend(name, task)
    distil(task, backend, observer=watcher)
    begun = backend.learned()
    for state, made in zip(watcher.states, watcher.made, strict=True):
        assert state.learned.keys() == begun.keys()
        assert all(not torch.equal(begun[key], state.learned[key]) for key in begun)
        if not begun:
            assert made.recipe == task.recipe
    assert len({made.recipe for made in watcher.made}) == (2 if begun else 1)
    leaf = watcher.states[-1].leaf
    expected = watcher.made[-1].batch.images
    torch.testing.assert_close(task.recipe.preprocessing.pixels(leaf), expected)


# Seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", [no_hooks, doorping])
@pytest.mark.parametrize("name", DISTILLING)
def test_the_same_seed_twice_and_another(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    toy_backend: Backends,
    tmp_path: Path,
    name: str,
    hooks: Callable[[DataInfo], Sequence[Hook]],
) -> None:
    def run(seed: int, place: str) -> Tensor:
        task = toy_task(ipc=2, seed=seed, scratch=tmp_path / place)
        return distil(task, toy_backend(name, task), hooks(toy_data_info)).batch.images

    one = run(0, "one")
    assert torch.equal(run(0, "two"), one)
    assert torch.equal(run(0, "one"), one)  # with the experts of the first run
    assert not torch.allclose(run(1, "three"), one, atol=0.1)


@pytest.mark.parametrize("name", DISTILLING)
def test_a_hook_that_changes_nothing_changes_nothing(
    toy_task: Tasks, toy_backend: Backends, tmp_path: Path, name: str
) -> None:
    """The twin of an attack is the plain run, bit for bit."""
    tasks = [toy_task(ipc=2, iterations=3, scratch=tmp_path / place) for place in ("a", "b")]
    plain, watched = (
        distil(task, toy_backend(name, task), hooks)
        for task, hooks in zip(tasks, ([], [recorder(Log())]), strict=True)
    )
    check_same(watched, plain)


@pytest.mark.parametrize("name", DISTILLING)
def test_images_that_diverge_stop_the_run(
    toy_task: Tasks, toy_backend: Backends, name: str
) -> None:
    task = toy_task(ipc=2, iterations=5)
    with pytest.raises(RunError, match="diverged"):
        distil(task, toy_backend(name, task, lr_img=1e38))
