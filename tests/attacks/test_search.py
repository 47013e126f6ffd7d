"""Trigger searches: the reference's procedure once more, and whether each lowers its own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distillsec.attacks.search import (
    OBJECTIVES,
    Carriers,
    ObjectiveName,
    SearchOptions,
    SearchSpace,
    neuron,
    neuron_reference,
    student,
    target_logit,
)
from distillsec.attacks.triggers import patch_mask
from distillsec.distill.core.hooks import Moment
from distillsec.distill.core.run import Run
from distillsec.distill.core.task import Task
from distillsec.distill.networks.registry import Network
from distillsec.distill.types import RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Moments = Callable[..., Moment]
MEAN, STD = 0.5, 0.25


def options(**changes: Any) -> SearchOptions:
    values = {"alpha": 10.0, "neurons": 1, "lr": 0.08, "steps": 20, "students": 2, **changes}
    return SearchOptions(**values)


@pytest.fixture
def carriers(toy_task: Tasks) -> Carriers:
    real = toy_task().real
    mask = patch_mask((8, 8), 3, "bottom-right", 1)
    pattern = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2)) * mask
    return Carriers(
        images=real.images[real.labels != 0][:16],
        targets=torch.zeros(16, dtype=torch.int64),
        pattern=pattern,
        space=SearchSpace(
            mask=mask,
            shift=torch.tensor([MEAN]).view(1, 1, 1),
            scale=torch.tensor([STD]).view(1, 1, 1),
            project=lambda pattern: pattern.clamp(0, 1),
            canvas=torch.zeros(1, 8, 8),
        ),
        stamp=lambda pattern, images: torch.where(mask.bool(), pattern, images),
    )


def without_bounds(carriers: Carriers) -> Carriers:
    return replace(carriers, space=replace(carriers.space, project=None))


def hidden_layer(network: nn.Module) -> nn.Linear:
    assert isinstance(network, Network)
    layer = network.trunk[-2]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    return layer


def baadd(task: Task, bias: float) -> Network:
    """A network whose heaviest hidden units have this bias."""
    network = task.network(0)
    hidden = hidden_layer(network)
    with torch.no_grad():
        hidden.bias[hidden.weight.abs().sum(1).topk(3).indices] = bias
    assert isinstance(network, Network)
    return network


def images_with(pattern: Tensor, carriers: Carriers) -> Tensor:
    return carriers.images * (1 - carriers.space.mask) + pattern * carriers.space.mask


# The reference's procedure ---------------------------------------------------------------------


def reference_update(
    network: Network, carriers: Carriers, topk: int, alpha: float, steps: int
) -> tuple[Tensor, int]:
    """The published update, on the normalised canvas, reading the layer through a hook."""
    hidden = hidden_layer(network)
    read: list[Tensor] = []
    handle = hidden.register_forward_hook(lambda _, __, output: read.append(output.relu()))
    sums = torch.stack([row.abs().sum() for row in hidden.weight])
    chosen = sums.argsort(descending=True)[:topk]
    black, bright = (0 - MEAN) / STD, (carriers.pattern - MEAN) / STD
    canvas = torch.where(carriers.space.mask.bool(), bright, black)[None].requires_grad_()
    optimiser = torch.optim.Adam([canvas], lr=0.08, betas=(0.9, 0.99))
    goal = torch.zeros(())
    done = 0
    for step in range(steps):
        read.clear()
        network.trunk(canvas)
        output = read[0][:, chosen]
        if step == 0:
            goal = alpha * output.detach()
        loss = functional.mse_loss(output, goal)
        if loss.item() < 0.5:
            break
        optimiser.zero_grad()
        loss.backward()
        assert canvas.grad is not None
        canvas.grad *= carriers.space.mask
        optimiser.step()
        done += 1
    handle.remove()
    return (canvas.detach()[0] * STD + MEAN) * carriers.space.mask, done


@pytest.mark.parametrize(("topk", "alpha", "bias"), [(1, 10.0, 0.5), (2, 5.0, 1.0), (1, 3.0, 0.5)])
def test_neuron_reference_is_the_published_update(
    toy_task: Tasks,
    toy_moment: Moments,
    carriers: Carriers,
    topk: int,
    alpha: float,
    bias: float,
) -> None:
    network = baadd(toy_task("convnet-baadd", head=16), bias)
    expected, done = reference_update(network, carriers, topk, alpha, 200)
    assert done > 3
    unbounded = without_bounds(carriers)
    settings = options(neurons=topk, alpha=alpha, steps=200)
    found = neuron_reference(toy_moment(network), unbounded, settings)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - carriers.pattern).abs().max() > 0.1


def test_it_stops_below_the_published_threshold_and_not_before(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers
) -> None:
    network = baadd(toy_task("convnet-baadd", head=16), bias=0.5)
    unit = int(hidden_layer(network).weight.abs().sum(1).argmax())
    unbounded = without_bounds(carriers)

    def loss(pattern: Tensor) -> float:
        with torch.no_grad():
            now, start = (
                network.embed((p * carriers.space.mask)[None])[0, unit]
                for p in (pattern, carriers.pattern)
            )
        return float((now - 5 * start) ** 2)

    found = neuron_reference(toy_moment(network), unbounded, options(alpha=5.0, steps=1000))
    _, done = reference_update(network, carriers, 1, 5.0, 1000)
    assert 0 < done < 1000
    earlier = neuron_reference(toy_moment(network), unbounded, options(alpha=5.0, steps=done - 1))
    assert loss(found) < 0.5 <= loss(earlier)


def test_a_small_enough_loss_stops_before_the_first_step(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers
) -> None:
    """The reference's early stop: with alpha 1 there is nothing to do, a dead unit is the same."""
    for bias, alpha in ((1.0, 1.0), (-1000.0, 10.0)):
        moment = toy_moment(baadd(toy_task("convnet-baadd", head=16), bias))
        found = neuron_reference(moment, carriers, options(alpha=alpha))
        assert torch.equal(found, carriers.pattern)


def test_neuron_reference_needs_a_hidden_layer(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers
) -> None:
    with pytest.raises(RequestError, match=r"needs a network with a hidden .*try objective neuron"):
        neuron_reference(toy_moment(toy_task().network(0)), carriers, options())


def test_a_backend_without_a_live_network_is_refused(
    toy_moment: Moments, carriers: Carriers
) -> None:
    for search in (neuron, neuron_reference, target_logit):
        with pytest.raises(RequestError, match="no live network"):
            search(toy_moment(None), carriers, options())


# Each lowers its own loss ----------------------------------------------------------------------


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("network", ["convnet", "convnet-baadd", "mlp"])
def test_neuron_drives_the_heaviest_live_units(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers, network: str, bounded: bool
) -> None:
    live = toy_task(network).network(0)
    assert isinstance(live, Network)
    if network != "convnet":  # the heaviest unit is dead: the next ones are driven
        hidden = hidden_layer(live)
        with torch.no_grad():
            hidden.bias[hidden.weight.abs().sum(1).argmax()] = -1000
    with torch.no_grad():
        before = live.embed(images_with(carriers.pattern, carriers))
    if network == "convnet":
        weights = live.head.weight.abs().sum(0)
    else:
        weights = hidden_layer(live).weight.abs().sum(1)
    order = [u for u in weights.argsort(descending=True).tolist() if before[:, u].sum() > 0][:2]
    assert network == "convnet" or int(weights.argmax()) not in order
    settings = options(neurons=2, alpha=2.0, steps=40)
    found = neuron(toy_moment(live), carriers if bounded else without_bounds(carriers), settings)
    with torch.no_grad():
        after = live.embed(images_with(found, carriers))
    goal = 2 * before.mean(0)[order]

    def distance(activations: Tensor) -> float:
        return float((activations.mean(0)[order] - goal).square().mean())

    assert distance(after) < 0.95 * distance(before)
    if network != "convnet":
        alone = neuron(toy_moment(live), carriers, options(neurons=1))
        assert not torch.equal(alone, carriers.pattern)


def test_neuron_changes_nothing_where_every_unit_is_dead(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers
) -> None:
    network = toy_task("convnet-baadd", head=8).network(0)
    with torch.no_grad():
        hidden_layer(network).bias.fill_(-1000)
    found = neuron(toy_moment(network), carriers, options())
    assert torch.equal(found, carriers.pattern)


def fooling(networks: list[nn.Module], pattern: Tensor, carriers: Carriers) -> float:
    images, target = images_with(pattern, carriers), torch.zeros(16, dtype=torch.int64)
    with torch.no_grad():
        losses = [functional.cross_entropy(network(images), target) for network in networks]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("bounded", [True, False])
def test_target_logit_lowers_the_cross_entropy_to_the_target(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers, bounded: bool
) -> None:
    network = toy_task().network(0)
    moment, own = toy_moment(network), carriers if bounded else without_bounds(carriers)
    found = target_logit(moment, own, options())
    assert fooling([network], found, own) < fooling([network], carriers.pattern, own) - 1e-3
    more = target_logit(moment, own, options(steps=60))
    assert fooling([network], more, own) < fooling([network], found, own)


def test_student_lowers_the_mean_over_its_students(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers
) -> None:
    networks = [toy_task().network(seed).eval() for seed in range(3)]
    made = iter(networks)
    found = student(
        toy_moment(train_student=lambda: next(made)), carriers, options(students=3, steps=40)
    )
    assert next(made, None) is None
    assert fooling(networks, found, carriers) < fooling(networks, carriers.pattern, carriers) - 1e-3


def test_the_students_of_a_moment_are_fresh_networks_trained_on_the_set(
    toy_task: Tasks, toy_run: Callable[..., Run]
) -> None:
    def weights(seed: int) -> list[Tensor]:
        run = toy_run(toy_task(seed=seed))
        moment = run.moments.at("on_network")()
        students = [moment.train_student() for _ in range(2)]
        assert not any(student.training for student in students)
        return [torch.cat([w.flatten() for w in each.parameters()]) for each in students]

    one, two = weights(0)
    assert not torch.allclose(one, two, atol=0.1)
    assert all(torch.equal(a, b) for a, b in zip((one, two), weights(0), strict=True))
    assert not torch.allclose(one, weights(1)[0], atol=0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_search_changes_nothing_but_its_answer(
    toy_task: Tasks, toy_moment: Moments, carriers: Carriers, name: ObjectiveName
) -> None:
    network = baadd(toy_task("convnet-baadd", head=16), bias=0.5)
    moment = toy_moment(network, train_student=lambda: network)
    kept = [carriers.pattern.clone(), carriers.images.clone(), carriers.space.mask.clone()]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    found = OBJECTIVES[name].search(moment, carriers, options())
    assert all(
        torch.equal(a, b)
        for a, b in zip(kept, [carriers.pattern, carriers.images, carriers.space.mask], strict=True)
    )
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert not found.requires_grad
    assert not torch.equal(found, carriers.pattern)
