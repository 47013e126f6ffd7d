"""The loop: the order of events, twins, resuming, what hooks can do to the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillsec.attacks import ATTACKS, Attack, DataInfo
from distillsec.distill.backends.gradient_matching import (
    DC,
    DSA,
    GradientMatchingOptions,
    SiameseOptions,
)
from distillsec.distill.core.hooks import EVENTS, Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer, Run
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch, Distillate, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
MEAN, STD, LR = 0.5, 0.25, 0.1


def dc(task: Task, **options: Any) -> DC:
    settings = {"batch_real": 16, "outer_loop": 2, "inner_loop": 1, **options}
    return DC(GradientMatchingOptions(**settings), ipc=task.ipc, recipe=task.recipe)


def dsa(task: Task) -> DSA:
    options = SiameseOptions(batch_real=16, outer_loop=2, inner_loop=1)
    return DSA(options, ipc=task.ipc, recipe=task.recipe)


def attack(name: str, data: DataInfo, **options: Any) -> Attack:
    options = {"poison_rate": 0.2, **options}
    return ATTACKS[name](ATTACKS[name].Options.model_validate(options), data)


class Watcher(Observer):
    """Keeps all that an observer sees."""

    def __init__(self) -> None:
        self.experts: list[tuple[int, int]] = []
        self.steps: list[tuple[int, int]] = []
        self.iterations: list[tuple[int, float]] = []
        self.sets: list[Tensor] = []
        self.states: list[LoopState] = []

    def on_expert(self, done: int, total: int) -> None:
        self.experts.append((done, total))

    def on_step(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        self.iterations.append((iteration, loss))
        self.sets.append(made.batch.images.clone())
        self.states.append(state())


# Events ----------------------------------------------------------------------------------------


def recorder(log: list[tuple[str, int]], networks: list[nn.Module | None]) -> Hook:
    """A hook that notes every event with its step and changes nothing."""

    def listen(event: str) -> Callable[..., Any]:
        def method(self: Hook, moment: Moment, *arguments: Any) -> Any:
            log.append((event, moment.step))
            networks.append(moment.network)
            if event in ("on_loss", "on_network"):
                return None
            return arguments[-1]

        return method

    return type("Recorder", (Hook,), {event: listen(event) for event in EVENTS})()  # type: ignore[no-any-return]


def test_the_order_of_events(toy_task: Tasks) -> None:
    log: list[tuple[str, int]] = []
    networks: list[nn.Module | None] = []
    task = toy_task(iterations=2)
    distil(task, dc(task), [recorder(log, networks)])
    expected = [("on_start", 0)]
    for step in range(4):
        expected += [("on_sample", step), ("on_draw", step)] * 3
        expected += [("on_loss", step), ("on_synthetic", step)]
        expected += [("on_network", step)] * (step < 3)
    assert log == [*expected, ("on_finish", 4)]
    shown = {event for (event, _), network in zip(log, networks, strict=True) if network}
    assert shown == {"on_loss", "on_network"}


def test_the_network_is_shown_at_ipc_1_but_never_after_the_last_step(toy_task: Tasks) -> None:
    log: list[tuple[str, int]] = []
    task = toy_task(iterations=4)
    backend = DC(GradientMatchingOptions(batch_real=16), ipc=1, recipe=task.recipe)
    assert backend.steps() == 1
    distil(task, backend, [recorder(log, [])])
    assert [step for event, step in log if event == "on_network"] == [0, 1, 2]


def test_hooks_see_a_frozen_copy_of_the_moved_network(toy_task: Tasks) -> None:
    networks: list[nn.Module | None] = []
    log: list[tuple[str, int]] = []
    task = toy_task(iterations=1)
    distil(task, dc(task), [recorder(log, networks)])
    fresh = task.network(task.streams.integer("network", 0, 0))
    (moved,) = (n for (e, _), n in zip(log, networks, strict=True) if e == "on_network")
    assert moved is not None
    assert not moved.training
    assert not any(weight.requires_grad for weight in moved.parameters())
    pairs = list(zip(moved.parameters(), fresh.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.allclose(a, b, atol=0.1) for a, b in pairs)  # lr 0.01: near where it began


def test_an_iterations_last_network_advances_only_for_a_hook(
    toy_task: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    advance = DC.advance

    def counted(self: DC, run: Run, network: nn.Module, synthetic: Batch) -> None:
        calls.append(run.position.step)
        advance(self, run, network, synthetic)

    monkeypatch.setattr(DC, "advance", counted)
    task = toy_task(iterations=3)
    plain = distil(task, dc(task)).batch.images
    assert calls == [0, 2, 4]
    calls.clear()
    listener = type("Listener", (Hook,), {"on_network": lambda self, moment: None})()
    watched = distil(task, dc(task), [listener]).batch.images
    assert calls == [0, 1, 2, 3, 4]
    assert torch.equal(plain, watched)  # the twin of an attack is the plain run, bit for bit


# Observers and resuming ------------------------------------------------------------------------


def test_the_observer_sees_every_step_and_iteration(toy_task: Tasks) -> None:
    task, watcher = toy_task(iterations=3), Watcher()
    found = distil(task, dc(task), observer=watcher).batch
    assert watcher.steps == [(done, 6) for done in range(1, 7)]
    assert [number for number, _ in watcher.iterations] == [1, 2, 3]
    assert all(loss > 0 for _, loss in watcher.iterations)
    assert torch.equal(watcher.sets[-1], found.images)
    assert found.labels.tolist() == [0, 1, 2]
    alone = Watcher()
    distil(task, dc(task, outer_loop=1), observer=alone)
    # The first step is the same, so that two steps' mean is not twice as large as one step.
    assert watcher.iterations[0][1] == pytest.approx(alone.iterations[0][1], rel=0.3)


class Noise(Hook):
    """Draws from its stream at the end, which must be the same after a resume."""

    def on_finish(self, moment: Moment, synthetic: Batch) -> Batch:
        noise = torch.rand(synthetic.images.shape, generator=moment.rng)
        return synthetic.replace(images=synthetic.images + moment.progress * noise)


def no_hooks(_: DataInfo) -> Sequence[Hook]:
    return []


def doorping(objective: str, **options: Any) -> Callable[[DataInfo], Sequence[Hook]]:
    settings = {"objective": objective, "trigger_steps": 3, "target_share": 0.5, **options}
    return lambda data: [attack("doorping", data, **settings), Noise()]


CASES: list[tuple[Any, Callable[[DataInfo], Sequence[Hook]], Mapping[str, Any]]] = [
    (dc, no_hooks, {}),
    (dsa, no_hooks, {"init": "real"}),
    (dc, doorping("neuron"), {"init": "poisoned"}),
    (dsa, doorping("target-logit"), {"clip_pixels": True}),
    (dc, doorping("student", update_every=2, freeze_at=1.0), {"norm": "batch"}),
]


@pytest.mark.parametrize(("make", "hooks", "changes"), CASES)
def test_a_run_resumed_anywhere_ends_bit_for_bit_the_same(
    toy_task: Tasks, toy_data_info: DataInfo, make: Any, hooks: Any, changes: Mapping[str, Any]
) -> None:
    task, watcher, first = toy_task(ipc=2, iterations=3, **changes), Watcher(), hooks(toy_data_info)
    whole = distil(task, make(task), first, observer=watcher).batch.images
    assert len(watcher.states) == 3
    for _ in range(2):  # a state is not used up by a run
        for state in watcher.states:
            again = hooks(toy_data_info)
            assert torch.equal(distil(task, make(task), again, state=state).batch.images, whole)
            for old, new in zip(first, again, strict=True):
                kept, regained = old.state_dict(), new.state_dict()
                assert kept.keys() == regained.keys()
                assert all(torch.equal(kept[key], regained[key]) for key in kept)


def test_the_same_seed_twice_and_another(toy_task: Tasks) -> None:
    def run(seed: int) -> Tensor:
        task = toy_task(seed=seed)
        return distil(task, dc(task)).batch.images

    assert torch.equal(run(0), run(0))
    assert not torch.allclose(run(0), run(1), atol=0.1)


# What goes wrong -------------------------------------------------------------------------------


def test_a_diverging_run_stops(toy_task: Tasks) -> None:
    task, watcher = toy_task(iterations=5), Watcher()
    message = r"^the distillation diverged: the loss is not finite at step 1$"
    with pytest.raises(RunError, match=message):
        distil(task, dc(task, lr_img=1e30), observer=watcher)
    assert watcher.steps == [(1, 10)]
    assert watcher.sets == []


def test_images_that_are_not_finite_stop_the_run(toy_task: Tasks) -> None:
    class Puller(Hook):
        def on_loss(self, moment: Moment, synthetic: Batch) -> Tensor:
            return 1e3 * synthetic.images.sum()

    task = toy_task()
    with pytest.raises(RunError, match=r"diverged: an image is not finite at step 0$"):
        distil(task, dc(task, lr_img=3e37), [Puller()])


# The images ------------------------------------------------------------------------------------


def test_clipped_pixels_stay_in_range(toy_task: Tasks) -> None:
    task = toy_task(clip_pixels=True, iterations=3)
    watcher = Watcher()
    distil(task, dc(task, lr_img=1.0), observer=watcher)
    assert all(images.min() >= 0 and images.max() <= 1 for images in watcher.sets)
    task = toy_task(iterations=3)
    assert distil(task, dc(task, lr_img=1.0)).batch.images.max() > 1


def test_an_extra_loss_moves_the_images_by_its_own_gradient(toy_task: Tasks) -> None:
    class Greyer(Hook):
        def on_loss(self, moment: Moment, synthetic: Batch) -> Tensor:
            return 3 * (synthetic.images - 0.7).square().sum()

    task = toy_task(iterations=1)
    start = start_run(task, dc(task)).synthetic.batch().images
    plain, greyer = (
        distil(task, dc(task, outer_loop=1), hooks).batch.images for hooks in ([], [Greyer()])
    )
    # d/dz of 3(x − 0.7)² with x = z·std + mean; the step in x is that in z times std.
    expected = -LR * 6 * (start - 0.7) * STD * STD
    torch.testing.assert_close(greyer - plain, expected, rtol=1e-4, atol=1e-6)


def test_on_loss_finds_the_gradient_of_the_backends_own_loss(toy_task: Tasks) -> None:
    found: list[Tensor] = []

    class Reader(Hook):
        def on_loss(self, moment: Moment, synthetic: Batch) -> None:
            assert synthetic.images.grad is not None
            found.append(synthetic.images.grad.clone())

    task = toy_task(iterations=1)
    start = start_run(task, dc(task)).synthetic.batch().images
    moved = distil(task, dc(task, outer_loop=1), [Reader()]).batch.images
    torch.testing.assert_close(moved - start, -LR * STD * STD * found[0], rtol=1e-4, atol=1e-6)


def test_on_synthetic_writes_and_leaves_the_optimisers_state(toy_task: Tasks) -> None:
    class Painter(Hook):
        def on_synthetic(self, moment: Moment, synthetic: Batch) -> Batch:
            return synthetic.replace(images=torch.full_like(synthetic.images, 0.2))

    task, plain, painted = toy_task(iterations=1), Watcher(), Watcher()
    distil(task, dc(task, outer_loop=1), observer=plain)
    found = distil(task, dc(task, outer_loop=1), [Painter()], observer=painted).batch.images
    torch.testing.assert_close(found, torch.full_like(found, 0.2))
    (ours,), (theirs,) = (w.states[0].optimiser.values() for w in (painted, plain))
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 0
