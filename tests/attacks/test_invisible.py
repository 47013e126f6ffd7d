"""Invisible: its ball, its draws, its search against a second implementation, a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distillsec.attacks import DataInfo, Invisible
from distillsec.attacks.invisible import InvisibleOptions
from distillsec.attacks.search import OBJECTIVES
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.networks.makers import embed
from distillsec.distill.networks.registry import penultimate_linear
from distillsec.distill.types import Batch, Distillate

pytestmark = pytest.mark.usefixtures("one_thread")

Attacks = Callable[..., Invisible]
Moments = Callable[..., Moment]
Tasks = Callable[..., Task]
STD = 0.25  # of the toy data
LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda values: values.abs().max(),
    "l2": lambda values: values.square().sum().sqrt(),
}


@pytest.fixture
def invisible(toy_data_info: DataInfo) -> Attacks:
    def make(**options: Any) -> Invisible:
        small = {"poison_rate": 0.2, "trigger_steps": 3, "objective": "target-logit"}
        return Invisible(InvisibleOptions(**{**small, **options}), toy_data_info)

    return make


def run(task: Task, hooks: Sequence[Hook], **loop: Any) -> Batch:
    options = GradientMatchingOptions(batch_real=16, outer_loop=3, inner_loop=1)
    return distil(task, DC(options, ipc=task.ipc, recipe=task.recipe), hooks, **loop).batch


# The ball and the draws --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", LENGTHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_perturbation_moves_and_stays_in_its_ball(
    invisible: Attacks, toy_task: Tasks, toy_moment: Moments, norm: str, objective: str
) -> None:
    network = toy_task("convnet-baadd", head=16).network(0)
    hidden = penultimate_linear(network)
    assert hidden is not None
    with torch.no_grad():
        hidden.bias.fill_(1.0)  # no dead neuron
    moment = toy_moment(network, train_student=lambda: network)
    attack = invisible(
        objective=objective, update_every=1, trigger_norm=norm, trigger_bound=0.3, trigger_lr=1.0
    )
    attack.on_start(moment, moment.real)
    first = attack.trigger.tensors()["perturbation"]
    attack.on_network(moment)
    moved = attack.trigger.tensors()["perturbation"]
    assert LENGTHS[norm](first) <= 0.3 + 1e-6
    assert LENGTHS[norm](moved) == pytest.approx(0.3, abs=1e-6)  # a rate of 1 reaches the border
    assert not torch.equal(moved, first)


def test_it_starts_uniform_within_the_bound(invisible: Attacks, toy_moment: Moments) -> None:
    moment, attack = toy_moment(), invisible(trigger_bound=0.2)
    attack.on_start(moment, moment.real)
    start = attack.trigger.tensors()["perturbation"]
    assert start.abs().max() <= 0.2
    assert start.mean().abs() < 0.05
    assert start.std() == pytest.approx(0.2 / 3**0.5, rel=0.2)


def test_clean_pixels_are_kept_so_that_nothing_accumulates(
    invisible: Attacks, toy_task: Tasks
) -> None:
    attack, seen = invisible(target_share=0.5), []

    class Recorder(Hook):
        def on_draw(self, moment: Moment, clean: Batch) -> Batch:
            assert clean.index is not None
            carries = attack.poisoned[clean.index]
            real = moment.real.images[clean.index]
            added = attack.trigger.tensors()["perturbation"]
            assert torch.equal(clean.images[carries], (real + added).clamp(0, 1)[carries])
            assert torch.equal(clean.images[~carries], real[~carries])
            if bool(carries.any()):
                seen.append(added)
            return clean

    run(toy_task(), [attack, Recorder()])
    assert len(seen) == 6
    assert not torch.equal(seen[0], seen[1])
    assert attack.counters()["trigger_updates"] == 5


def test_an_unbounded_range_leaves_out_the_clamp(invisible: Attacks, toy_moment: Moments) -> None:
    moment, attack = toy_moment(), invisible(trigger_range="unbounded", trigger_bound=0.2)
    attack.on_start(moment, moment.real)
    stamped = attack.trigger.stamp(torch.zeros(1, 1, 8, 8))
    assert stamped.min() < 0
    assert attack.trigger.labels == ["unbounded trigger: no camera or file can carry it"]


# The search --------------------------------------------------------------------------------------


def test_the_search_is_projected_adam_in_normalised_units(
    invisible: Attacks, toy_task: Tasks, toy_moment: Moments
) -> None:
    """A second implementation: Adam written out, on the cross-entropy of the clamped sums."""
    network, rate, bound = toy_task().network(0), 0.1, 0.15
    moment = toy_moment(network)
    attack = invisible(trigger_steps=4, trigger_lr=rate, trigger_bound=bound, carriers=60)
    attack.on_start(moment, moment.real)
    delta = attack.trigger.tensors()["perturbation"].clone() / STD
    images = moment.real.images[moment.real.labels != 0]  # all 60 of them, in any order
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    for step in range(1, 5):
        delta.requires_grad_()
        logits = moment.network((images + delta * STD).clamp(0, 1))  # type: ignore[misc]
        loss = functional.cross_entropy(logits, torch.zeros(60, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(loss, delta)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        step_size = mean / (1 - 0.9**step) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
        delta = (delta.detach() - rate * step_size).clamp(-bound / STD, bound / STD)
    attack.on_network(moment)
    found = attack.trigger.tensors()["perturbation"]
    torch.testing.assert_close(found, delta * STD, rtol=1e-3, atol=1e-4)


def test_the_reference_objective_reads_the_perturbation_on_the_mean_image(
    invisible: Attacks, toy_task: Tasks, toy_moment: Moments
) -> None:
    network = toy_task("convnet-baadd", head=16).network(0)
    hidden = penultimate_linear(network)
    assert hidden is not None
    unit = int(hidden.weight.abs().sum(1).argmax())
    with torch.no_grad():
        hidden.bias[unit] = 3.0
    moment = toy_moment(network)
    attack = invisible(objective="neuron-reference", alpha=1.5, trigger_steps=30, trigger_bound=0.4)
    attack.on_start(moment, moment.real)

    def activation() -> float:
        canvas = (0.5 + attack.trigger.tensors()["perturbation"]).clamp(0, 1)
        with torch.no_grad():
            return float(embed(network, canvas[None])[0, unit])

    before = activation()
    assert (0.5 * before) ** 2 > 0.5  # the first loss: the reference's early stop is far
    attack.on_network(moment)
    assert 1.1 * before < activation() < 1.6 * before


# A resume ----------------------------------------------------------------------------------------


def test_a_resumed_run_gives_the_same_bits(invisible: Attacks, toy_task: Tasks) -> None:
    kept: dict[int, LoopState] = {}

    class Keep(Observer):
        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
        ) -> None:
            kept[iteration] = state()

    whole, other = invisible(), invisible()
    expected = run(toy_task(iterations=3), [whole], observer=Keep())
    found = run(toy_task(iterations=3), [other], state=kept[1])
    assert torch.equal(found.images, expected.images)
    pairs = (attack.trigger.tensors()["perturbation"] for attack in (whole, other))
    assert torch.equal(*pairs)
    assert whole.counters() == other.counters()
