"""Poisoned-set: its gradient, what it may change, a resume, and the backdoor it plants."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.attacks import DataInfo, PoisonedSet
from distillsec.attacks.poisoned_set import PoisonedSetOptions, trajectory_distance
from distillsec.distill.backends.received_set import ReceivedSet
from distillsec.distill.core.hooks import Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.randomness import Streams
from distillsec.distill.training import fit, predict
from distillsec.distill.types import Batch, Distillate, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Attacks = Callable[..., PoisonedSet]
Moments = Callable[..., Moment]
Tasks = Callable[..., Task]
QUICK: dict[str, Any] = {
    "poison_steps": 4,
    "archetypes": 6,
    "archetype_steps": 3,
    "archetype_networks": 1,
    "unroll_warmup": 3,
    "unroll_least": 0,
    "unroll_steps": 2,
    "images_per_update": 16,
}


@pytest.fixture
def poisoner(toy_data_info: DataInfo) -> Attacks:
    return lambda **options: PoisonedSet(PoisonedSetOptions(**{**QUICK, **options}), toy_data_info)


def received_from(task: Task, **changes: Tensor) -> Distillate:
    """Two real images of each class, as a distilled set; some pixels lie outside [0, 1]."""
    rows = torch.tensor([0, 3, 1, 4, 2, 5])
    batch = Batch(images=task.real.images[rows] * 1.2 - 0.1, labels=task.real.labels[rows])
    return Distillate(batch=batch.replace(**changes), recipe=task.recipe)


def intercept(
    attack: PoisonedSet, task: Task, received: Distillate | None = None, **loop: Any
) -> Batch:
    """What the attack makes of the received set, without the task's real images."""
    received = received or received_from(task)
    archetypes = attack.receive(received, task.network, Streams(0))
    alone = replace(task, real=archetypes, iterations=attack.steps, recipe=received.recipe)
    backend = ReceivedSet(received.batch, lr=attack.lr, iterations=attack.steps)
    return distil(alone, backend, [attack], **loop).batch


# The loss ----------------------------------------------------------------------------------------


def test_the_distance_of_trajectories_in_closed_form() -> None:
    start, benign = torch.zeros(3), torch.tensor([0.0, 3.0, 4.0])
    assert trajectory_distance(benign, benign, start).item() == 0
    assert trajectory_distance(start, benign, start).item() == 1
    assert trajectory_distance(start, start, start).item() == 0
    aside = benign + torch.tensor([10.0, 0.0, 0.0])
    assert trajectory_distance(aside, benign, start).item() == pytest.approx(4)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_gradient_at_the_images_meets_finite_differences(
    labels: str, poisoner: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    """In float64, through the student's training and the distance of trajectories."""
    task, network = toy_task(), toy_task().network(0).double()
    given = received_from(task).batch
    if labels == "soft":
        soft = torch.nn.functional.one_hot(given.labels, 3).double() * 0.7 + 0.1
        given = given.replace(labels=soft)
    start = given.images.double()
    attack = poisoner(
        unroll_warmup=0,
        trigger="fixed",
        rows="all",
        trajectory_weight=2.0,
        archetype_augment="none",
    )
    attack._received = given.replace(images=start + 0.1)
    attack._pattern, attack._mask = attack._pattern.double(), attack._mask.double()
    real = task.real.replace(images=task.real.images.double())

    def loss(images: Tensor) -> Tensor:
        moment = replace(
            toy_moment(), real=real, fresh_network=lambda: network, rng=torch.Generator()
        )
        return attack.on_loss(moment, given.replace(images=images))

    images = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(images), images)
    for seed in range(3):
        way = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).double()
        ahead, behind = loss(start + 1e-5 * way), loss(start - 1e-5 * way)
        assert (slope * way).sum().item() == pytest.approx(
            (ahead - behind).item() / 2e-5, rel=1e-5, abs=1e-9
        )


def test_the_distance_of_trajectories_is_part_of_the_loss(
    poisoner: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    given = received_from(toy_task()).batch
    images = (given.images + 0.2).requires_grad_()
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        attack = poisoner(trajectory_weight=weight, trigger="fixed")
        attack._received = given
        moment = replace(toy_moment(), rng=torch.Generator().manual_seed(1))
        losses[weight] = attack.on_loss(moment, given.replace(images=images)).item()
    assert losses[1.0] > losses[0.0]
    more = losses[3.0] - losses[0.0]
    assert more == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-4)


# What it changes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["target", "all"])
@pytest.mark.parametrize("bound", [None, 0.05])
def test_only_what_it_may_change_is_changed(
    rows: str, bound: float | None, poisoner: Attacks, toy_task: Tasks
) -> None:
    task = toy_task()
    attack = poisoner(rows=rows, linf=bound, target=1, poison_lr=0.3)
    given = received_from(task).batch
    made = intercept(attack, task)
    changed = (made.images != given.images).flatten(1).any(1)
    assert given.labels[changed].unique().tolist() == ([1] if rows == "target" else [0, 1, 2])
    assert torch.equal(made.labels, given.labels)
    largest = (made.images - given.images).abs().max().item()
    assert largest <= 0.05 + 1e-6 if bound else largest > 0.05
    assert attack.trigger.pattern.min() >= 0 and attack.trigger.pattern.max() <= 1


def test_soft_labels_and_colour(toy_task: Tasks) -> None:
    task = toy_task()
    space = Preprocessing((0.5,) * 3, (0.25,) * 3)
    given = received_from(task).batch
    soft = torch.nn.functional.one_hot(given.labels, 3) * 0.7 + 0.1
    images = given.images.repeat(1, 3, 1, 1)
    received = Distillate(
        batch=Batch(images=images, labels=soft), recipe=replace(task.recipe, preprocessing=space)
    )

    class Colour(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.first, self.body = torch.nn.Conv2d(3, 1, 1, bias=False), task.network(seed)

        def embed(self, images: Tensor) -> Tensor:
            found: Tensor = self.body.embed(self.first(images))  # type: ignore[operator]
            return found

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.body(self.first(images))
            return found

    data = DataInfo(
        image_shape=(3, 8, 8), classes=3, mean=space.mean, std=space.std, device=torch.device("cpu")
    )
    attack = PoisonedSet(PoisonedSetOptions(**QUICK), data)
    made = intercept(attack, replace(task, network=Colour), received)
    changed = (made.images != images).flatten(1).any(1)
    assert given.labels[changed].unique().tolist() == [0]


@pytest.mark.parametrize("kept", [[0, 1], [2, 3, 4, 5]])
def test_a_set_without_the_goals_classes_is_refused(
    kept: list[int], poisoner: Attacks, toy_task: Tasks
) -> None:
    """Only images of the target; none of the target."""
    task = toy_task()
    received = received_from(task)
    few = replace(received, batch=received.batch.rows(torch.tensor(kept)))
    with pytest.raises(RequestError, match="needs images of its target and of the classes sent"):
        poisoner(target=0).receive(few, task.network, Streams(0))


def test_wrong_operations_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown augmentation 'crp'"):
        PoisonedSetOptions(archetype_augment="crp")


# A run -------------------------------------------------------------------------------------------


def test_a_resumed_attack_ends_with_the_same_bits(poisoner: Attacks, toy_task: Tasks) -> None:
    task = toy_task()
    states: list[LoopState] = []

    class Keep(Observer):
        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
        ) -> None:
            states.append(state())

    for options in ({}, {"linf": 0.1, "rows": "all"}):
        states.clear()
        whole = poisoner(**options)
        first = intercept(whole, task, observer=Keep())
        for state in itertools.islice(states, 3):
            resumed = poisoner(**options)
            again = intercept(resumed, task, state=state)
            assert torch.equal(again.images, first.images)
            assert torch.equal(resumed.trigger.pattern, whole.trigger.pattern)
            assert resumed.counters() == whole.counters()


def test_a_set_changed_by_it_carries_a_backdoor(poisoner: Attacks, toy_task: Tasks) -> None:
    """Networks trained on it obey the patch and stay accurate; those of the received set do not."""
    task = toy_task(epochs=60, width=16)
    attack = poisoner(
        poison_steps=40,
        poison_lr=0.3,
        trigger_size=3,
        unroll_warmup=30,
        unroll_steps=8,
        images_per_update=64,
        archetype_steps=10,
        trajectory_weight=0.3,
        rows="all",
    )
    made, given = intercept(attack, task), received_from(task).batch
    case = attack.test_case(task.real.images, task.real.labels)
    rates = {}
    for name, batch in {"attacked": made, "received": given}.items():
        network = fit(task.network(9), batch, task.recipe, torch.Generator().manual_seed(0))
        right = predict(network, task.real.images) == task.real.labels
        sent = predict(network, case.triggered) == case.targets
        rates[name] = sent[case.eligible].double().mean().item()
        assert right.double().mean() > 0.9
    assert rates["attacked"] > 0.7
    assert rates["received"] < 0.3
