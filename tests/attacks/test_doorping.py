"""Doorping: when its trigger moves, what the draws carry, what a resume takes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distillsec.attacks import DataInfo, Doorping
from distillsec.attacks.doorping import DoorpingOptions
from distillsec.attacks.search import OBJECTIVES
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.task import Task
from distillsec.distill.networks.registry import Network
from distillsec.distill.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Moments = Callable[..., Moment]


@pytest.fixture
def doorping(toy_data_info: DataInfo) -> Callable[..., Doorping]:
    def make(**options: Any) -> Doorping:
        options = {"poison_rate": 0.2, "trigger_steps": 3, **options}
        return Doorping(DoorpingOptions(**options), toy_data_info)

    return make


Doorpings = Callable[..., Doorping]


def run(task: Task, hooks: list[Hook], outer: int = 3) -> Batch:
    options = GradientMatchingOptions(batch_real=16, outer_loop=outer, inner_loop=1)
    return distil(task, DC(options, ipc=task.ipc, recipe=task.recipe), hooks).batch


def baadd(task: Task, bias: float) -> Network:
    """A network with a hidden layer whose heaviest unit has this bias."""
    network = task.network(0)
    assert isinstance(network, Network)
    hidden = network.trunk[-2]  # type: ignore[index]
    with torch.no_grad():
        hidden.bias[hidden.weight.abs().sum(1).argmax()] = bias
    return network


# The start and the draws -----------------------------------------------------------------------


def test_it_starts_from_random_8_bit_pixels_under_the_mask(
    doorping: Doorpings, toy_moment: Moments
) -> None:
    moment = toy_moment()
    attack = doorping(trigger_size=6, trigger_margin=1)
    attack.on_start(moment, moment.real)
    inside = attack.trigger.pattern[:, 1:7, 1:7] * 255
    torch.testing.assert_close(inside, inside.round(), rtol=0, atol=1e-4)
    assert inside.min() >= 1
    assert len(inside.unique()) > 20
    assert attack.trigger.pattern.sum() * 255 == pytest.approx(inside.sum().item())


def test_the_start_relabels_rows_and_keeps_every_pixel(
    doorping: Doorpings, toy_moment: Moments
) -> None:
    moment = toy_moment()
    attack = doorping(target=1)
    given = attack.on_start(moment, moment.real)
    assert torch.equal(given.images, moment.real.images)
    changed = given.labels != moment.real.labels
    assert torch.equal(changed, attack.poisoned)
    assert changed.sum() == 18
    assert bool((given.labels[changed] == 1).all())


def test_every_draw_is_stamped_afresh_with_the_present_trigger(
    doorping: Doorpings, toy_moment: Moments
) -> None:
    moment = toy_moment()
    attack = doorping()
    attack.on_start(moment, moment.real)
    rows = torch.cat([attack.poisoned.nonzero()[:5, 0], (~attack.poisoned).nonzero()[:5, 0]])
    clean = moment.real.rows(rows)
    first = attack.on_draw(moment, clean)
    assert torch.equal(first.images[:5], attack.trigger.stamp(clean.images[:5]))
    assert torch.equal(first.images[5:], clean.images[5:])
    assert torch.equal(attack.on_draw(moment, first).images, first.images)
    old = attack.trigger.pattern
    attack.load_state_dict({"pattern": 1 - old, "counts": torch.tensor([0, 0, 0, 0])})
    second = attack.on_draw(moment, clean)
    assert torch.equal(second.images[:, :, 5:7, 5:7][5:], clean.images[:, :, 5:7, 5:7][5:])
    assert torch.equal(second.images[0, :, 5:7, 5:7], 1 - old[:, 5:7, 5:7])
    assert torch.equal(clean.images, moment.real.rows(rows).images)


def test_the_draws_of_a_run_carry_the_trigger_of_their_step(
    doorping: Doorpings, toy_task: Tasks
) -> None:
    attack, seen = doorping(target_share=0.5), []

    class Recorder(Hook):
        def on_draw(self, moment: Moment, clean: Batch) -> Batch:
            assert clean.index is not None
            stamped = attack.poisoned[clean.index]
            expected = attack.trigger.stamp(moment.real.images[clean.index[stamped]])
            assert torch.equal(clean.images[stamped], expected)
            whole = moment.real.images[clean.index[~stamped]]
            assert torch.equal(clean.images[~stamped], whole)
            if bool(stamped.any()):
                seen.append(attack.trigger.pattern)
            return clean

    run(toy_task(), [attack, Recorder()])
    assert len(seen) == 6
    assert not torch.equal(seen[0], seen[1])


# When it moves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({}, 5),  # after each of the 6 steps but the last
        ({"update_every": 2}, 2),  # after steps 2 and 4 of 6
        ({"update_every": 4}, 1),
        ({"update_every": 7}, 0),
        ({"freeze_at": 0.5}, 3),  # after steps 1, 2 and 3 of 6
        ({"freeze_at": 0.0}, 0),
        ({"freeze_at": 0.5, "update_every": 2}, 1),
        ({"objective": "student", "students": 1}, 0),  # its own: every 20 steps
        ({"objective": "student", "students": 1, "update_every": 1}, 3),  # its own: half the run
    ],
)
def test_updates_happen_when_they_are_due(
    doorping: Doorpings, toy_task: Tasks, options: dict[str, Any], updates: int
) -> None:
    attack = doorping(**options)
    run(toy_task(), [attack])
    counters = attack.counters()
    assert counters == {
        "poisoned_rows": 18,
        "trigger_updates": updates,
        "idle_trigger_updates": 0,
    }


def test_it_updates_at_ipc_1_but_not_after_the_last_step(
    doorping: Doorpings, toy_task: Tasks
) -> None:
    """The reference code's trigger never moves at IPC 1."""
    attack = doorping()
    run(toy_task(iterations=4), [attack], outer=1)
    assert attack.counters()["trigger_updates"] == 3


def test_a_run_of_one_step_keeps_the_first_trigger(doorping: Doorpings, toy_task: Tasks) -> None:
    attack, moved = doorping(), doorping()
    run(toy_task(iterations=1), [attack], outer=1)
    assert attack.counters()["trigger_updates"] == 0
    run(toy_task(iterations=2), [moved], outer=1)
    assert not torch.equal(attack.trigger.pattern, moved.trigger.pattern)


def test_the_objectives_have_their_own_defaults(doorping: Doorpings) -> None:
    found = {name: (o.steps, o.update_every, o.freeze_at) for name, o in OBJECTIVES.items()}
    assert found["neuron-reference"] == (1000, 1, 1.0)  # the reference code's
    assert found["student"][1] > 1
    assert found["student"][2] < 1
    options = DoorpingOptions()
    assert (options.alpha, options.neurons, options.trigger_lr) == (10, 1, 0.08)


# Dead neurons, ranges, states ------------------------------------------------------------------


def test_an_update_on_a_dead_neuron_is_idle_and_counted(
    doorping: Doorpings, toy_task: Tasks, toy_moment: Moments
) -> None:
    task = toy_task("convnet-baadd", head=8)
    moment = toy_moment(baadd(task, bias=-1000.0))
    attack = doorping(objective="neuron-reference")
    attack.on_start(moment, moment.real)
    before = attack.trigger.pattern.clone()
    attack.on_network(moment)
    assert torch.equal(attack.trigger.pattern, before)
    assert attack.counters()["idle_trigger_updates"] == 1
    assert attack.counters()["trigger_updates"] == 1
    attack.on_network(toy_moment(baadd(task, bias=1.0)))
    assert not torch.equal(attack.trigger.pattern, before)
    assert attack.counters()["idle_trigger_updates"] == 1
    assert attack.counters()["trigger_updates"] == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_pixel_range_is_left_only_where_that_is_asked_for(
    doorping: Doorpings, toy_task: Tasks, toy_moment: Moments, objective: str
) -> None:
    network = baadd(toy_task("convnet-baadd", head=8), bias=1.0)
    moment = toy_moment(network, train_student=lambda: network)
    extremes = {}
    for kind in ("pixel", "unbounded"):
        options: dict[str, Any] = {"trigger_steps": 30, "trigger_lr": 1.0, "update_every": 1}
        attack = doorping(objective=objective, trigger_range=kind, **options)
        attack.on_start(moment, moment.real)
        attack.on_network(moment)
        pattern = attack.trigger.pattern
        assert attack.trigger.range == kind
        assert torch.equal(pattern * attack.trigger.mask, pattern)
        extremes[kind] = pattern.min().item(), pattern.max().item()
    low, high = extremes["pixel"]
    assert 0 <= low <= high <= 1
    low, high = extremes["unbounded"]
    assert low < -0.5 or high > 1.5


def test_the_state_holds_the_trigger_and_the_counts(doorping: Doorpings, toy_task: Tasks) -> None:
    attack, other = doorping(), doorping()
    run(toy_task(), [attack])
    state = {name: value.clone() for name, value in attack.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other.trigger.pattern, attack.trigger.pattern)
    assert other.counters()["trigger_updates"] == 5
    assert other.counters()["idle_trigger_updates"] == 0
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_it_takes_a_distiller(doorping: Doorpings) -> None:
    assert doorping().threat_model == "distiller"
