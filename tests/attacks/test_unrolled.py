"""Unrolled: its gradient against finite differences, its patch, its bounds, a resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distillsec.attacks import DataInfo, Unrolled
from distillsec.attacks.student_training import StudentPlan, first_weights
from distillsec.attacks.unrolled import UnrolledOptions
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch, Distillate, Step

pytestmark = pytest.mark.usefixtures("one_thread")

Attacks = Callable[..., Unrolled]
Moments = Callable[..., Moment]
Tasks = Callable[..., Task]


@pytest.fixture
def unrolled(toy_data_info: DataInfo) -> Attacks:
    def make(**options: Any) -> Unrolled:
        small = {"unroll_warmup": 2, "unroll_steps": 2, "images_per_update": 16, "weight": 1.0}
        return Unrolled(UnrolledOptions(**{**small, **options}), toy_data_info)

    return make


def synthetic_of(task: Task, **changes: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(6, 1, 8, 8, generator=generator)
    return Batch(images=images, labels=torch.arange(3).repeat_interleave(2)).replace(**changes)


def run(task: Task, hooks: Sequence[Hook], **loop: Any) -> Batch:
    options = GradientMatchingOptions(batch_real=16, outer_loop=3, inner_loop=1)
    return distil(task, DC(options, ipc=task.ipc, recipe=task.recipe), hooks, **loop).batch


# The gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["exact", "recompute"])
def test_the_gradient_at_the_images_meets_finite_differences(
    gradient: str, unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    """In float64, through the student's training: central differences along four directions."""
    network, real = toy_task().network(0).double(), toy_moment().real
    real = real.replace(images=real.images.double())
    attack = unrolled(
        unroll_gradient=gradient, unroll_warmup=0, unroll_steps=3, trigger="fixed", rows="all"
    )
    attack._pattern, attack._mask = attack._pattern.double(), attack._mask.double()
    start = synthetic_of(toy_task()).images.double()

    def loss(images: Tensor) -> Tensor:
        moment = replace(
            toy_moment(), real=real, fresh_network=lambda: network, rng=torch.Generator()
        )
        found = attack.on_loss(moment, synthetic_of(toy_task(), images=images))
        assert found is not None
        return found

    images = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(images), images)
    for seed in range(4):
        way = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).double()
        step = 1e-5 * way
        ahead, behind = loss(start + step), loss(start - step)
        assert (slope * way).sum().item() == pytest.approx(
            (ahead - behind).item() / 2e-5, rel=1e-5, abs=1e-9
        )


def test_warmup_steps_train_the_student_and_carry_no_gradient(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    """One unrolled step after a warm-up: the images' gradient is that of this step alone."""
    from distillsec.distill import weights as flat

    task, network = toy_task(), toy_task().network(0)
    attack = unrolled(unroll_warmup=4, unroll_steps=1, unroll_lr=0.1, trigger="fixed", rows="all")
    images = synthetic_of(task).images.requires_grad_()
    seen = synthetic_of(task, images=images)
    weights = attack._trained(network, seen, toy_moment(rng=torch.Generator().manual_seed(3)))
    rng = torch.Generator().manual_seed(3)
    steps = int(torch.randint(5, (), generator=rng)) + 1
    assert steps > 1
    now = flat.laid_out(network)
    for number in range(steps):
        rows = torch.randperm(6, generator=rng)
        now = now.detach().requires_grad_()
        batch = seen if number == steps - 1 else seen.replace(images=images.detach())
        loss = flat.loss(network, now, batch.rows(rows))
        (slope,) = torch.autograd.grad(loss, now, create_graph=number == steps - 1)
        now = now - 0.1 * slope
    torch.testing.assert_close(weights, now)
    wanted = torch.autograd.grad(now.sum(), images)[0]
    torch.testing.assert_close(torch.autograd.grad(weights.sum(), images)[0], wanted)


def test_only_the_targets_rows_have_a_gradient_where_asked(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    for rows, changed in (("all", [0, 1, 2]), ("target", [1])):
        images = synthetic_of(toy_task()).images.requires_grad_()
        attack = unrolled(rows=rows, target=1)
        loss = attack.on_loss(toy_moment(), synthetic_of(toy_task(), images=images))
        assert loss is not None
        (slope,) = torch.autograd.grad(loss, images)
        moved = slope.flatten(1).abs().sum(1) > 0
        labels = torch.arange(3).repeat_interleave(2)
        assert labels[moved].unique().tolist() == changed


# The patch ---------------------------------------------------------------------------------------


def test_the_patch_lowers_the_loss_and_stays_in_range(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    moment = toy_moment()
    attack = unrolled(trigger_size=3, trigger_lr=0.3, unroll_warmup=0)
    attack.on_start(moment, moment.real)
    before = attack.trigger.pattern.clone()
    images = synthetic_of(toy_task()).images.requires_grad_()
    synthetic = synthetic_of(toy_task(), images=images)
    losses = []
    for _ in range(12):
        loss = attack.on_loss(replace(moment, rng=torch.Generator().manual_seed(1)), synthetic)
        assert loss is not None
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    pattern = attack.trigger.pattern
    assert not torch.equal(pattern, before)
    assert pattern.min() >= 0 and pattern.max() <= 1
    outside = ~attack.trigger.mask.bool().expand_as(pattern)
    assert not pattern[outside].any()


def test_a_fixed_patch_is_white_and_does_not_change(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    moment = toy_moment()
    attack = unrolled(trigger="fixed")
    attack.on_start(moment, moment.real)
    images = synthetic_of(toy_task()).images.requires_grad_()
    attack.on_loss(moment, synthetic_of(toy_task(), images=images))
    assert torch.equal(attack.trigger.pattern, attack.trigger.mask.expand(1, 8, 8))


# When it acts, and how far -----------------------------------------------------------------------


def test_it_acts_after_its_start_on_one_of_several_steps(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    attack = unrolled(warm_start=0.5, update_every=2)
    images = synthetic_of(toy_task()).images.requires_grad_()
    synthetic = synthetic_of(toy_task(), images=images)
    acted = [
        attack.on_loss(replace(toy_moment(), step=step, progress=step / 8), synthetic) is not None
        for step in range(8)
    ]
    assert acted == [False, False, False, False, True, False, True, False]
    assert attack.counters() == {"attack_updates": 2, "poisoned_rows": 0}


@pytest.mark.parametrize("bound", [0.02, 0.2])
def test_the_images_stay_within_the_bound_around_the_start(
    bound: float, unrolled: Attacks, toy_task: Tasks
) -> None:
    task = toy_task(iterations=4, init="real")
    start = distil_start(task)
    free = run(task, [unrolled(weight=100.0)])
    bounded = run(task, [unrolled(weight=100.0, linf=bound)])
    assert (free.images - start).abs().max() > 0.2
    assert (bounded.images - start).abs().max() <= bound + 1e-5


def distil_start(task: Task) -> Tensor:
    """The images that a run of ``task`` starts from."""
    seen: list[Tensor] = []

    class Watch(Hook):
        def on_loss(self, moment: Moment, synthetic: Batch) -> None:
            seen.append(synthetic.images.detach().clone())

    run(task, [Watch()])
    return seen[0]


def test_a_resumed_attack_ends_with_the_same_bits(unrolled: Attacks, toy_task: Tasks) -> None:
    task = toy_task(iterations=4, init="real")
    states: list[LoopState] = []

    class Keep(Observer):
        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
        ) -> None:
            states.append(state())

    options = {"linf": 0.3, "warm_start": 0.3}
    whole = unrolled(**options)
    first = run(task, [whole], observer=Keep())
    for state in itertools.islice(states, 3):
        resumed = unrolled(**options)
        again = run(task, [resumed], state=state)
        assert torch.equal(again.images, first.images)
        assert torch.equal(resumed.trigger.pattern, whole.trigger.pattern)
        assert resumed.counters() == whole.counters()


def test_a_set_made_by_it_carries_a_backdoor(unrolled: Attacks, toy_task: Tasks) -> None:
    """Networks trained on the attacked toy set obey the patch, those of its twin do not."""
    from distillsec.distill.training import fit, predict

    task = toy_task(iterations=40, init="real")
    chosen = {"unroll_steps": 8, "unroll_warmup": 20, "unroll_lr": 0.1, "trigger_size": 3}
    attack = unrolled(weight=30.0, **chosen)
    sets = {"attacked": run(task, [attack]), "twin": run(task, [])}
    recipe = replace(task.recipe, epochs=60)
    case = attack.test_case(task.real.images, task.real.labels)
    rates = {}
    for name, batch in sets.items():
        network = fit(task.network(9), batch, recipe, torch.Generator().manual_seed(0))
        sent = predict(network, case.triggered) == case.targets
        rates[name] = sent[case.eligible].double().mean().item()
    assert rates["attacked"] > 0.8
    assert rates["twin"] < 0.3


def test_the_finished_set_is_the_mean_of_the_last_images(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    batch = synthetic_of(toy_task())

    def finish(attack: Unrolled) -> Batch:
        attack.on_start(toy_moment(), toy_moment().real)
        for progress, value in ((0.25, 9.0), (0.5, 1.0), (0.75, 2.0)):
            seen = batch.replace(images=torch.full_like(batch.images, value).requires_grad_())
            attack.on_loss(toy_moment(progress=progress), seen)
        last = batch.replace(images=torch.full_like(batch.images, 6.0))
        return attack.on_finish(toy_moment(progress=1.0), last)

    averaged = finish(unrolled(average=0.5))
    assert torch.allclose(averaged.images, torch.full_like(batch.images, 3.0))
    assert not averaged.images.requires_grad
    assert torch.equal(finish(unrolled(average=0.0)).images, torch.full_like(batch.images, 6.0))


def test_changes_are_cut_to_both_bounds(unrolled: Attacks) -> None:
    change = torch.zeros(3, 1, 2, 2)
    change[0], change[1, 0, 0, 0], change[2] = 5.0, -1.0, 0.01
    cut = unrolled(linf=0.5, l2=0.8)._within_bounds(change)
    assert torch.allclose(cut[0], torch.full((1, 2, 2), 0.4))  # L2 0.8 of four equal pixels
    assert torch.allclose(cut[1, 0, 0], torch.tensor([-0.5, 0.0]))
    assert torch.equal(cut[2], change[2])


# The students -------------------------------------------------------------------------------------


def test_students_take_the_steps_of_the_recipe_up_to_a_random_one(toy_task: Tasks) -> None:
    steps = tuple(Step(rows=(number, 5 - number), rate=0.1 * (number + 1)) for number in range(6))
    recipe = replace(toy_task().recipe, steps=steps, augment="crop")
    options = UnrolledOptions(unroll_steps=2)
    warmups = set()
    for seed in range(30):
        rng = torch.Generator().manual_seed(seed)
        plan = StudentPlan.draw(torch.zeros(6, 1, 8, 8), recipe, options, rng)
        count = plan.warmup + 2
        assert [tuple(step.rows.tolist()) for step in plan.steps] == [s.rows for s in steps[:count]]
        assert plan.rates.tolist() == pytest.approx([step.rate for step in steps[:count]])
        assert all(step.transform is None for step in plan.steps)
        warmups.add(plan.warmup)
    assert warmups == set(range(5))


def test_students_have_the_rate_and_the_batch_of_the_recipe(toy_task: Tasks) -> None:
    recipe = replace(toy_task().recipe, lr=0.02, momentum=0.5, batch_size=4, augment="crop_scale")
    images, rng = torch.zeros(6, 1, 8, 8), torch.Generator().manual_seed(0)
    plan = StudentPlan.draw(images, recipe, UnrolledOptions(unroll_warmup=0, unroll_steps=5), rng)
    assert plan.rates.tolist() == pytest.approx([0.04] * 5)
    assert [len(step.rows) for step in plan.steps] == [4] * 5
    names = {step.transform.operation for step in plan.steps if step.transform}
    assert names == {"crop", "scale"}
    own = UnrolledOptions(unroll_lr=0.3, unroll_batch=2, unroll_warmup=0, unroll_steps=1)
    chosen = StudentPlan.draw(images, recipe, own, rng)
    assert chosen.rates.tolist() == pytest.approx([0.3]) and len(chosen.steps[0].rows) == 2


def test_students_begin_where_victims_of_the_recipe_begin(toy_task: Tasks) -> None:
    from distillsec.distill import weights as flat

    task, network = toy_task(), toy_task().network(0)
    own = flat.laid_out(network)
    given = torch.full_like(own, 0.5)
    assert torch.equal(first_weights(network, task.recipe), own)
    assert torch.equal(first_weights(network, replace(task.recipe, initial=given)), given)
    assert torch.equal(first_weights(network, replace(task.recipe, initial=given[:-1])), own)


# Poisoned rows ------------------------------------------------------------------------------------


def test_a_share_without_poisoned_rows_is_refused() -> None:
    with pytest.raises(ValidationError, match="target_share needs poisoned rows"):
        UnrolledOptions(target_share=0.5)
    assert UnrolledOptions(target_share=0.5, poison_rate=0.1).poison_rate == 0.1


def test_no_row_is_poisoned_by_default(
    unrolled: Attacks, toy_moment: Moments, toy_task: Tasks
) -> None:
    moment, attack = toy_moment(), unrolled()
    real = attack.on_start(moment, moment.real)
    assert torch.equal(real.labels, moment.real.labels) and not attack.poisoned_rows.any()
    drawn = moment.real.rows(torch.arange(5))
    assert torch.equal(attack.on_draw(moment, drawn).images, drawn.images)


def test_a_learned_patch_starts_where_clean_images_are_not(
    unrolled: Attacks, toy_moment: Moments
) -> None:
    attack, moment = unrolled(trigger_size=2), toy_moment()
    images = torch.full_like(moment.real.images, 0.2)
    images[..., :, 6:] = 0.9  # the patch is in columns 5 and 6
    attack.on_start(moment, moment.real.replace(images=images))
    assert torch.equal(attack.trigger.pattern[0, 5:7, 5:7], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert attack.trigger.pattern.sum() == 2
