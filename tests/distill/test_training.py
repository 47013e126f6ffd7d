"""Training a network by a recipe against a plain loop; predicting in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distillsec.distill.core.task import Task
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.training import (
    accuracy,
    drop_at_half,
    drop_epoch,
    fit,
    predict,
    shuffled,
)
from distillsec.distill.types import Batch, Recipe, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]


@pytest.fixture
def batch(toy_task: Tasks) -> Batch:
    return toy_task().real.rows(torch.arange(12))


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_loop(network: nn.Module, batch: Batch, recipe: Recipe, drop_after: int) -> nn.Module:
    """Full-batch SGD with momentum and weight decay, by the formulas."""
    weights = list(network.parameters())
    velocities = [torch.zeros_like(w) for w in weights]
    for epoch in range(1, recipe.epochs + 1):
        rate = recipe.lr if epoch <= drop_after else recipe.lr / 10
        loss = functional.cross_entropy(network(batch.images), batch.labels)
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, weights)
            for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
                slope = gradient + recipe.weight_decay * weight
                velocity.mul_(recipe.momentum).add_(slope)
                weight.sub_(rate * velocity)
    return network


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


RECIPE = Recipe(preprocessing=Preprocessing((0.5,), (0.25,)), epochs=9, lr=0.05, weight_decay=0.01)


def test_fit_is_sgd_with_momentum_decay_and_a_drop_at_half(toy_task: Tasks, batch: Batch) -> None:
    task = toy_task()
    fitted = fit(task.network(0), batch, RECIPE, rng())
    # Published: the rate falls after epoch 9 // 2 + 1.
    assert difference(fitted, plain_loop(task.network(0), batch, RECIPE, 5)) < 1e-5
    assert difference(fitted, plain_loop(task.network(0), batch, RECIPE, 4)) > 1e-3
    assert difference(fitted, task.network(0)) > 0.01
    assert not fitted.training


def test_the_rate_is_a_tenth_from_the_drop_epoch_on() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = drop_at_half(optimiser, 5), []
    for _ in range(5):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert drop_epoch(5) == 3 and rates == pytest.approx([1, 1, 1, 0.1, 0.1])


@pytest.mark.parametrize("change", [{"momentum": 0.0}, {"weight_decay": 0.3}, {"lr": 0.02}])
def test_every_number_of_the_recipe_counts(
    toy_task: Tasks, batch: Batch, change: dict[str, Any]
) -> None:
    recipe = replace(RECIPE, **change)
    fitted = fit(toy_task().network(0), batch, recipe, rng())
    assert difference(fitted, plain_loop(toy_task().network(0), batch, recipe, 5)) < 1e-5
    assert difference(fitted, plain_loop(toy_task().network(0), batch, RECIPE, 5)) > 1e-3


def test_training_repeats_and_depends_on_its_generator(toy_task: Tasks, batch: Batch) -> None:
    recipe = replace(RECIPE, batch_size=5, augment="crop_scale_rotate")
    one, same, other = (fit(toy_task().network(0), batch, recipe, rng(seed)) for seed in (1, 1, 2))
    assert difference(one, same) == 0
    assert difference(one, other) > 1e-4


def test_augmentation_changes_what_is_trained_on(toy_task: Tasks, batch: Batch) -> None:
    plain = fit(toy_task().network(0), batch, RECIPE, rng())
    augmented = fit(toy_task().network(0), batch, replace(RECIPE, augment="cutout"), rng())
    assert difference(plain, augmented) > 1e-3


def test_an_epoch_sees_every_row_once(batch: Batch) -> None:
    pieces = list(shuffled(10, 4, rng(), torch.device("cpu")))
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    assert sorted(torch.cat(pieces).tolist()) == list(range(10))
    assert torch.cat(pieces).tolist() != list(range(10))


def test_soft_labels(toy_task: Tasks, batch: Batch) -> None:
    task = toy_task()
    one_hot = batch.replace(labels=functional.one_hot(batch.labels, 3).float())
    hard, soft = (fit(task.network(0), each, RECIPE, rng()) for each in (batch, one_hot))
    assert difference(hard, soft) < 1e-5
    mixed = batch.replace(labels=torch.softmax(torch.rand(12, 3, generator=rng()), dim=1))
    fitted = fit(task.network(0), mixed, RECIPE, rng())
    network, labels = task.network(0), mixed.labels

    def loss(images: Tensor) -> float:
        return float(-(labels * network(images).detach().log_softmax(1)).sum(1).mean())

    plain = plain_loop(network, mixed, RECIPE, 5)
    assert difference(fitted, plain) < 1e-5
    trained = loss(mixed.images)
    network.load_state_dict(task.network(0).state_dict())
    assert trained < loss(mixed.images)


def test_diverging_training_is_no_number(toy_task: Tasks, batch: Batch) -> None:
    with pytest.raises(RunError, match="training did not converge: the loss is nan"):
        fit(toy_task().network(0), batch, replace(RECIPE, lr=1e20, epochs=5), rng())
    # One step: its loss was still finite.
    network = fit(toy_task().network(0), batch, replace(RECIPE, lr=1e30, epochs=1), rng())
    with pytest.raises(RunError, match="logits are not finite"):
        accuracy(network, batch)


# Predicting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_predicting_in_pieces_is_one_forward_pass_and_keeps_the_mode(
    toy_task: Tasks, training: bool
) -> None:
    task = toy_task(norm="batch")
    network = fit(task.network(0), task.real, RECIPE, rng()).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = predict(network, task.real.images)  # 90 images: three pieces
    assert network.training is training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    expected = network.eval()(task.real.images).argmax(1)
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 1
    assert found.dtype == torch.int64
    assert accuracy(network, task.real) == (expected == task.real.labels).double().mean().item()


def test_predicting_nothing(toy_task: Tasks) -> None:
    found = predict(toy_task().network(0), torch.zeros(0, 1, 8, 8))
    assert found.shape == (0,)
    assert found.dtype == torch.int64
