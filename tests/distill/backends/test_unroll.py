"""The gradient through a student's training: finite differences in float64, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from distillsec.distill import weights as flat
from distillsec.distill.augment import Augmentation
from distillsec.distill.backends.unroll import GradientName, StudentStep, unroll
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

Objective = Callable[[Tensor, Tensor], Tensor]
MEAN, STD, COUNT, SHAPE = 0.4, 0.3, 6, (1, 4, 4)
SMOOTH: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "width": 5, "depth": 1, "activation": "sigmoid"},
    "convnet": {"width": 3, "depth": 1, "activation": "swish"},
}
# Different rows in each step, and the same rows in several.
ROWS = [[0, 1, 2], [3, 4], [0, 5], [1, 2, 3, 4, 5], [0, 1, 2]]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Student:
    """A smooth student in float64, the steps it takes, and a curved function of where it ends."""

    network: nn.Module
    start: Tensor
    images: Tensor
    labels: Tensor
    rates: Tensor
    steps: Sequence[StudentStep]

    def unrolled(self, images: Tensor, rates: Tensor, gradient: GradientName = "exact") -> Tensor:
        synthetic = Batch(images=images, labels=self.labels)
        return unroll(self.network, self.start, synthetic, self.steps, rates, gradient)

    def value(self, last: Tensor) -> Tensor:
        weights = torch.randn(len(last), generator=rng(4), dtype=torch.float64)
        return (weights * last).sum() + (last * last.roll(1)).sum()

    def gradients(self, gradient: GradientName) -> tuple[Tensor, Tensor]:
        """To the images and to the rates."""
        images = self.images.clone().requires_grad_()
        rates = self.rates.clone().requires_grad_()
        self.value(self.unrolled(images, rates, gradient)).backward()
        assert images.grad is not None and rates.grad is not None
        return images.grad, rates.grad


def student(name: str = "mlp", steps: int = len(ROWS), *, transform: str = "color") -> Student:
    spec = NetworkSpec.model_validate(SMOOTH[name])
    network = build_network(
        spec, image_shape=SHAPE, classes=3, preprocessing=Preprocessing((MEAN,), (STD,)), seed=3
    ).double()
    augmentation = Augmentation((transform,), Preprocessing((MEAN,), (STD,)))
    drawn = augmentation.draw((len(ROWS[1]), *SHAPE), rng(1), shared=False)
    return Student(
        network=network,
        start=flat.laid_out(network),
        images=torch.rand(COUNT, *SHAPE, generator=rng(0), dtype=torch.float64),
        labels=torch.arange(COUNT) % 3,
        rates=torch.linspace(0.3, 0.9, len(ROWS), dtype=torch.float64)[:steps],
        steps=[
            StudentStep(rows=torch.tensor(rows), transform=drawn if number == 1 else None)
            for number, rows in enumerate(ROWS[:steps])
        ],
    )


def differences(objective: Objective, images: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``objective`` by central differences, coordinate by coordinate."""
    found = []
    for number, point in enumerate((images, rates)):
        slope = torch.zeros_like(point)
        for place in range(point.numel()):
            step = torch.zeros_like(point)
            step.view(-1)[place] = 1e-5
            here = [images, rates]
            ends = []
            for moved in (point + step, point - step):
                here[number] = moved
                ends.append(objective(*here).item())
            slope.view(-1)[place] = (ends[0] - ends[1]) / 2e-5
        found.append(slope)
    return found[0], found[1]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# The forward pass --------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", get_args(GradientName))
@pytest.mark.parametrize("name", SMOOTH)
def test_the_student_is_a_module_trained_by_plain_sgd(name: str, gradient: GradientName) -> None:
    made = student(name)
    before = flat.laid_out(made.network)
    last = made.unrolled(made.images.clone().requires_grad_(), made.rates, gradient)
    assert torch.equal(flat.laid_out(made.network), before)  # unroll only borrows it
    optimiser = torch.optim.SGD(made.network.parameters(), lr=1.0)
    for step, rate in zip(made.steps, made.rates.tolist(), strict=True):
        seen = made.images[step.rows]
        seen = seen if step.transform is None else step.transform(seen)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        functional.cross_entropy(made.network(seen), made.labels[step.rows]).backward()
        optimiser.step()
    torch.testing.assert_close(last, flat.laid_out(made.network), rtol=1e-12, atol=1e-13)
    assert (last - before).abs().max() > 0.01


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["color", "rotate"])
@pytest.mark.parametrize("name", SMOOTH)
def test_exact_and_recompute_are_the_finite_difference(name: str, transform: str) -> None:
    made = student(name, transform=transform)

    def objective(images: Tensor, rates: Tensor) -> Tensor:
        return made.value(made.unrolled(images, rates))

    wanted = differences(objective, made.images, made.rates)
    exact, recomputed = made.gradients("exact"), made.gradients("recompute")
    for ours, theirs, numbers in zip(exact, recomputed, wanted, strict=True):
        assert numbers.abs().max() > 1e-3
        assert apart(ours, numbers) < 1e-6
        assert apart(theirs, numbers) < 1e-6
        assert apart(theirs, ours) < 1e-11


def frozen_path(made: Student) -> Objective:
    """The function whose gradient tesla gives: each step's slope at the weights of the real path.

    By the formulas, with a plain module: nothing of ``unroll`` is used.
    """

    def slope(now: Tensor, step: StudentStep, images: Tensor) -> Tensor:
        flat.write(made.network, now)
        seen = images[step.rows]
        seen = seen if step.transform is None else step.transform(seen)
        loss = functional.cross_entropy(made.network(seen), made.labels[step.rows])
        found = torch.autograd.grad(loss, list(made.network.parameters()))
        return torch.cat([part.flatten() for part in found])

    path = [made.start]
    for step, rate in zip(made.steps, made.rates, strict=True):
        path.append(path[-1] - rate * slope(path[-1], step, made.images))

    def objective(images: Tensor, rates: Tensor) -> Tensor:
        last = made.start
        for now, step, rate in zip(path[:-1], made.steps, rates, strict=True):
            last = last - rate * slope(now, step, images)
        return made.value(last)

    return objective


@pytest.mark.parametrize("name", SMOOTH)
def test_tesla_is_the_gradient_with_the_path_held_still(name: str) -> None:
    made = student(name)
    wanted = differences(frozen_path(made), made.images, made.rates)
    exact = made.gradients("exact")
    for ours, numbers, whole in zip(made.gradients("tesla"), wanted, exact, strict=True):
        assert apart(ours, numbers) < 1e-6
        assert apart(ours, whole) > 1e-2  # no exact gradient over several steps


def test_tesla_is_exact_for_a_single_step() -> None:
    made = student(steps=1)
    for ours, whole in zip(made.gradients("tesla"), made.gradients("exact"), strict=True):
        assert whole.abs().max() > 1e-3
        assert apart(ours, whole) < 1e-12


def test_images_in_no_step_have_no_gradient() -> None:
    made = student(steps=2)
    for gradient in get_args(GradientName):
        images, _ = made.gradients(gradient)
        seen = images.flatten(1).abs().amax(1) > 0
        assert seen.tolist() == [True] * 5 + [False]


# Memory ------------------------------------------------------------------------------------------


def saved_bytes(gradient: GradientName, steps: int) -> tuple[int, int]:
    """What autograd keeps after the forward pass, and the most that it keeps at any time."""
    network = build_network(
        NetworkSpec(width=4, depth=1),
        image_shape=(1, 8, 8),
        classes=3,
        preprocessing=Preprocessing((0,), (1,)),
        seed=0,
    )
    images = torch.rand(16, 1, 8, 8, generator=rng(0)).requires_grad_()
    rates = torch.full((steps,), 0.1).requires_grad_()
    synthetic = Batch(images=images, labels=torch.arange(16) % 3)
    live = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, most
            self.tensor = tensor.detach()
            self.size = tensor.numel() * tensor.element_size()
            live += self.size
            most = max(most, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    taken = [StudentStep(rows=torch.arange(16))] * steps
    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        last = unroll(network, flat.laid_out(network), synthetic, taken, rates, gradient)
        held = live
        last.sum().backward()
    return held, most


@pytest.mark.parametrize("gradient", ["recompute", "tesla"])
def test_only_the_weights_of_each_step_are_kept(gradient: GradientName) -> None:
    network = NetworkSpec(width=4, depth=1)
    made = build_network(
        network, image_shape=(1, 8, 8), classes=3, preprocessing=Preprocessing((0,), (1,)), seed=0
    )
    weights = 4 * flat.count(made)  # bytes of one step's
    (few, few_most), (many, many_most) = (saved_bytes(gradient, steps) for steps in (3, 9))
    rates = 4 * (9 - 3)
    assert many - few == 6 * weights + rates
    assert many_most - few_most == 6 * weights + rates
    (exact_few, _), (exact_many, exact_most) = (saved_bytes("exact", steps) for steps in (3, 9))
    step = (exact_many - exact_few) / 6  # activations of one
    assert step > 50 * weights
    assert exact_many == pytest.approx(3 * exact_few, rel=0.1)
    assert many_most < exact_most / 4
