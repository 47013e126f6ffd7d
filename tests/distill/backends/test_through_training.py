"""Back-propagation through training: the recipe's steps, the gradient, whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distillsec.distill import weights as flat
from distillsec.distill.backends.through_training import DD, ThroughTrainingOptions
from distillsec.distill.backends.unroll import StudentStep, unroll
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.loop import distil
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.files.artifact import load_set, save_set
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.training import accuracy, fit
from distillsec.distill.types import Batch, DistilledSet, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]
MEAN, STD = 0.5, 0.25


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# Steps and rates ---------------------------------------------------------------------------------


def test_each_step_sees_some_images_of_every_class(toy_task: Tasks, toy_backend: Backends) -> None:
    task = toy_task(ipc=4)
    backend = toy_backend("dd", task, per_step=2, passes=3)
    made = start_run(task, backend).synthetic.distillate()
    groups = [(0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)]
    assert [step.rows for step in made.recipe.steps] == groups * 3
    assert made.batch.labels[list(groups[0])].tolist() == [0, 0, 1, 1, 2, 2]
    alone = start_run(task, toy_backend("dd", task, passes=1)).synthetic.distillate().recipe.steps
    assert [step.rows for step in alone] == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]


@pytest.mark.parametrize("rate", [1e-4, 0.02, 3.0])
def test_rates_start_at_the_given_value(
    toy_task: Tasks, toy_backend: Backends, rate: float
) -> None:
    task = toy_task(ipc=2)
    backend = toy_backend("dd", task, rate=rate)
    raw = backend.learned()["raw_rates"]
    assert raw.shape == (4,) and raw.dtype == torch.float32
    assert raw.tolist() == pytest.approx([math.log(math.expm1(rate))] * 4, rel=1e-6)
    recipe = start_run(task, backend).synthetic.recipe
    assert [step.rate for step in recipe.steps] == pytest.approx([rate] * 4, rel=1e-5)
    assert (recipe.initial, recipe.augment) == (None, "")


def test_ipc_must_be_a_multiple_of_per_step(toy_task: Tasks, toy_backend: Backends) -> None:
    with pytest.raises(RequestError) as refused:
        toy_backend("dd", toy_task(ipc=3), per_step=2)
    assert "IPC 3 is no multiple" in str(refused.value) and "\n" not in str(refused.value)


def test_the_rate_of_images_and_steps_is_halved_in_time(
    toy_task: Tasks, toy_backend: Backends
) -> None:
    backend = toy_backend("dd", toy_task(), decay_every=3)
    assert [backend.pace(i) for i in range(8)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


# The gradient ------------------------------------------------------------------------------------


def by_the_paper(
    task: Task, images: Tensor, raw: Tensor, iteration: int, number: int, rows: Tensor
) -> Tensor:
    """One student's loss on real ``rows``, its training written out; autograd through it all."""
    seed = task.streams.integer("network", iteration, number)
    network = task.network(seed).train()
    now = {name: weight.detach() for name, weight in network.named_parameters()}
    now = {name: weight.requires_grad_() for name, weight in now.items()}
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    order = [[0, 2, 4], [1, 3, 5]] * 2
    for step, rate in zip(order, (1 + raw.exp()).log(), strict=True):
        answer = torch.func.functional_call(network, now, (images[step],))
        loss = functional.cross_entropy(answer, labels[step])
        slopes = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        now = {n: w - rate * s for (n, w), s in zip(now.items(), slopes, strict=True)}
    answer = torch.func.functional_call(network, now, (task.real.images[rows],))
    return functional.cross_entropy(answer, task.real.labels[rows])


@pytest.mark.parametrize("gradient", ["exact", "recompute"])
@pytest.mark.parametrize("networks", [1, 2])
def test_dd_is_the_papers_algorithm(
    toy_task: Tasks, toy_backend: Backends, networks: int, gradient: str
) -> None:
    """Adam on images and raw rates, halved on the way; 40 real images are two pieces on a CPU."""
    task = toy_task(ipc=2, iterations=3)
    settings = {"batch_real": 40, "rate": 0.3, "lr_img": 0.05, "decay_every": 2}
    backend = toy_backend("dd", task, **settings, networks=networks, gradient=gradient)
    made = distil(task, backend)
    leaves = [torch.randn(6, 1, 8, 8, generator=task.streams.generator("init")), torch.zeros(4)]
    leaves[1] += math.log(math.expm1(0.3))
    start = leaves[0].clone()
    moments = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in leaves]
    for step in range(3):
        here = [leaf.clone().requires_grad_() for leaf in leaves]
        draws = task.streams.generator("draw", step)
        total = torch.zeros(())
        for number in range(networks):
            rows = torch.randperm(90, generator=draws)[:40]
            pixels = here[0] * STD + MEAN
            total = total + by_the_paper(task, pixels, here[1], step, number, rows) / networks
        rate = 0.05 * (0.5 if step == 2 else 1)
        for place, slope in enumerate(torch.autograd.grad(total, here)):
            mean, square = moments[place]
            mean, square = 0.5 * mean + 0.5 * slope, 0.999 * square + 0.001 * slope**2
            moments[place] = mean, square
            whole = mean / (1 - 0.5 ** (step + 1))
            spread = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            leaves[place] = leaves[place] - rate * whole / spread
    assert (leaves[0] - start).abs().mean() > 0.05
    # Adam divides by the slope's own size: where that is next to nothing, rounding decides.
    apart = (made.batch.images - (leaves[0] * STD + MEAN)).abs()
    assert apart.mean() < 1e-4 and apart.median() < 1e-5
    rates = [step.rate for step in made.recipe.steps]
    assert rates == pytest.approx((1 + leaves[1].exp()).log().tolist(), rel=1e-3)
    assert len({round(rate, 4) for rate in rates}) > 1


def test_the_gradient_is_the_finite_difference_in_float64(
    toy_task: Tasks, toy_backend: Backends
) -> None:
    task = toy_task(ipc=2, activation="swish")
    exact = replace(
        task,
        real=task.real.replace(images=task.real.images.double()),
        network=lambda seed: task.network(seed).double(),
    )
    backend = toy_backend("dd", exact, batch_real=40, rate=0.3)
    run = start_run(exact, backend)
    run.position.enter(1, 0)
    raw = run.synthetic.learned["raw_rates"]
    start = run.synthetic.batch().images.double()

    def loss(images: Tensor) -> Tensor:
        synthetic = Batch(images=images, labels=run.synthetic.labels)
        (found,) = backend.losses(run, backend.network(run), synthetic)
        return found

    images = start.clone().requires_grad_()
    to_images, to_rates = torch.autograd.grad(loss(images), (images, raw))
    for seed in range(5):
        way = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).double()
        numbers = (loss(start + 1e-5 * way) - loss(start - 1e-5 * way)).item() / 2e-5
        # The rates are float32, and so is what their softplus makes of the steps.
        assert (to_images * way).sum().item() == pytest.approx(numbers, rel=1e-5)
        assert abs(numbers) > 1e-3
    assert to_rates.shape == (4,) and bool((to_rates != 0).all())


# The recipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("student_init", ["random", "fixed"])
def test_training_by_the_recipe_gives_the_same_student(
    toy_task: Tasks, toy_backend: Backends, tmp_path: Path, student_init: str
) -> None:
    task = toy_task(ipc=2, iterations=2)
    made = distil(task, toy_backend("dd", task, rate=0.3, student_init=student_init))
    path = tmp_path / "set.safetensors"
    save_set(path, DistilledSet(batch=made.batch, classes=("a", "b", "c"), recipe=made.recipe))
    received = load_set(path)
    fixed = student_init == "fixed"
    assert (received.recipe.initial is not None) == fixed
    ours = task.network(task.streams.integer("network", 0, 0)) if fixed else task.network(5)
    start = flat.laid_out(ours)
    steps = [StudentStep(rows=torch.tensor(step.rows)) for step in made.recipe.steps]
    rates = torch.tensor([step.rate for step in made.recipe.steps])
    last = unroll(ours, start, made.batch, steps, rates)
    victim = fit(task.network(5), received.batch, received.recipe, rng())
    torch.testing.assert_close(flat.laid_out(victim), last.detach(), rtol=1e-5, atol=1e-6)
    assert (last - start).abs().max() > 1e-2
    if fixed:
        assert received.recipe.initial is not None
        assert torch.equal(received.recipe.initial, start)
        other = fit(task.network(6), received.batch, received.recipe, rng())
        assert torch.equal(flat.laid_out(other), flat.laid_out(victim))


def test_another_architecture_starts_from_its_own_weights(
    toy_task: Tasks, toy_backend: Backends
) -> None:
    task = toy_task(ipc=2, iterations=1)
    made = distil(task, toy_backend("dd", task, rate=0.3, student_init="fixed"))
    spec = NetworkSpec(network="mlp", width=5, depth=1)
    space = Preprocessing((MEAN,), (STD,))
    shape: dict[str, Any] = {"image_shape": (1, 8, 8), "classes": 3, "preprocessing": space}
    one, same = (
        fit(build_network(spec, **shape, seed=9), made.batch, recipe, rng())
        for recipe in (made.recipe, replace(made.recipe, initial=None))
    )
    assert torch.equal(flat.laid_out(one), flat.laid_out(same))


def test_fixed_students_learn_to_tell_the_classes(toy_task: Tasks, toy_backend: Backends) -> None:
    task = toy_task(ipc=1, iterations=40, width=8)
    settings = {"rate": 0.1, "lr_img": 0.1, "batch_real": 60, "student_init": "fixed"}
    backend = toy_backend("dd", task, **settings)
    start = start_run(task, backend).synthetic.distillate()
    made = distil(task, backend)
    before, after = (
        accuracy(fit(task.network(1), each.batch, each.recipe, rng()), task.real)
        for each in (start, made)
    )
    assert after > 0.9 and after > before + 0.2


def test_the_published_defaults() -> None:
    ours = ThroughTrainingOptions()
    assert (ours.iterations, ours.decay_every, ours.init) == (23_600, 2_360, "noise")
    assert (ours.lr_img, ours.batch_real, ours.passes, ours.rate) == (0.01, 1024, 3, 0.02)
    assert (ours.per_step, ours.student_init, ours.gradient) == (1, "random", "recompute")
    assert (DD.victim_epochs, DD.victim_lr, DD.victim_augment) == (None, None, "")
