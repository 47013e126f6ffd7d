"""What defenses of the model compute, against closed forms, brute force and finite differences."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from distillsec.defenses.common import channels
from distillsec.defenses.common.maps import blocks
from distillsec.defenses.models import anp, clp, ft_sam, i_bau, mm_bd, nad, rnp
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import Network, NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.training import accuracy
from distillsec.distill.types import Batch

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def made(number: int = 0, shape: tuple[int, int, int] = (1, 8, 8), **spec: Any) -> nn.Module:
    """A random network in evaluation mode, whose batch statistics are those of random images."""
    convnet = {"network": "convnet", "width": 6, "depth": 2, "norm": "batch"}
    values = spec if "network" in spec else convnet | spec
    maker = NetworkMaker(
        spec=NetworkSpec.model_validate(values),
        image_shape=shape,
        classes=4,
        preprocessing=Preprocessing(mean=(0.5,) * shape[0], std=(0.3,) * shape[0]),
    )
    network = maker(number)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(number)))
    network.train()(torch.rand(16, *shape, generator=seeded(number)))
    return network.eval()


def images_of(count: int = 12, shape: tuple[int, int, int] = (1, 8, 8)) -> Batch:
    labels = torch.arange(count) % 4
    return Batch(images=torch.rand(count, *shape, generator=seeded(3)), labels=labels)


# Channels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ({}, 2),
        ({"norm": "instance"}, 2),
        ({"norm": "none"}, 2),
        ({"network": "resnet18", "norm": "batch"}, 20),
        ({"network": "mlp"}, 2),
        ({"network": "lenet"}, 4),
    ],
)
def test_every_layer_but_the_last_has_channels(spec: dict[str, Any], layers: int) -> None:
    network, images = made(shape=(1, 28, 28), **spec), images_of(4, (1, 28, 28)).images
    found = channels.channels(network)
    assert len(found) == layers
    ones = {layer.layer: torch.ones(layer.count) for layer in found}
    before = network(images)
    assert torch.allclose(channels.forward_with(network, images, ones, ones), before, atol=1e-6)
    last = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
    assert last not in ones
    for layer in (found[0], found[-1]):
        # A silenced channel is what a factor of 0 makes of it; its source no longer matters.
        factors = torch.ones(layer.count)
        factors[1] = 0
        wanted = channels.forward_with(
            network, images, {layer.layer: factors}, {layer.layer: factors}
        )
        pruned = copy.deepcopy(network)
        channels.prune(pruned, {layer.layer: torch.tensor([1])}, biases=True)
        assert torch.allclose(pruned(images), wanted, atol=1e-6)
        assert not torch.allclose(wanted, before, atol=1e-4)
        source: Any = pruned.get_submodule(layer.source)
        if layer.source != layer.layer:
            with torch.no_grad():
                source.weight[1].normal_(generator=seeded(1))
            assert torch.allclose(pruned(images), wanted, atol=1e-6)


def test_masks_up_to_the_threshold_are_low() -> None:
    masks = {"a": torch.tensor([0.1, 0.9, 0.3]), "b": torch.tensor([0.2, 0.05])}
    found = channels.low_masks(masks, 0.25)
    assert found["a"].tolist() == [True, False, False] and found["b"].tolist() == [True, True]
    assert channels.low_masks(masks, float(masks["b"][0]))["b"].tolist() == [True, True]


# CLP ---------------------------------------------------------------------------------------------


def test_clp_bounds_each_channel() -> None:
    network = made()
    layer = channels.convolutions(network)[1]
    kernel = network.get_submodule(layer.source).weight
    norm = network.get_submodule(layer.layer)
    assert isinstance(kernel, Tensor) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    bounds = clp.lipschitz(network, layer)
    assert bounds is not None
    for number in range(layer.count):
        matrix = kernel[number].detach().numpy().reshape(kernel.shape[1], -1)
        largest = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[0]
        scale = norm.weight[number].item() / np.sqrt(float(norm.running_var[number]))
        assert float(bounds[number]) == pytest.approx(largest * abs(scale), rel=1e-6)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_clp_has_no_bound_before_other_norms(norm: str) -> None:
    network = made(norm=norm)
    bounds = clp.lipschitz(network, channels.convolutions(network)[0])
    assert (bounds is None) == (norm == "instance")


# ANP and RNP -------------------------------------------------------------------------------------


def test_perturbations_increase_the_loss_along_the_sign() -> None:
    network, batch, options = made().double(), images_of(), anp.AnpOptions(budget=1e-3)
    images = batch.images.double()
    masks = {
        layer.layer: torch.ones(layer.count, dtype=torch.float64)
        for layer in channels.channels(network)
    }

    def loss(weights: dict[str, Tensor], biases: dict[str, Tensor]) -> float:
        pushed = {name: 1 + push.double() for name, push in weights.items()}
        shifted = {name: 1 + push.double() for name, push in biases.items()}
        logits = channels.forward_with(network, images, pushed, shifted)
        return functional.cross_entropy(logits, batch.labels).item()

    weights, biases = anp.perturbations(network, masks, images, batch.labels, options, seeded())
    zero = {name: torch.zeros(len(mask)) for name, mask in masks.items()}
    assert loss(weights, biases) > loss(zero, zero)
    for pushes, kind in ((weights, 0), (biases, 1)):
        for name, push in pushes.items():
            assert push.abs().max() <= 2 * options.budget + 1e-9
            for number in range(len(push)):
                step = torch.zeros(len(push), dtype=torch.float64)
                step[number] = 1e-6
                moved = [zero | {name: sign * step} for sign in (1, -1)]
                slopes = [loss(m, zero) if kind == 0 else loss(zero, m) for m in moved]
                slope = (slopes[0] - slopes[1]) / 2e-6
                if abs(slope) > 1e-4:
                    assert float(push[number]) * slope > 0


def test_masks_stay_in_bounds_and_the_victim_unchanged(badnets: Case) -> None:
    view = badnets.fresh()
    before = copy.deepcopy(view.victim.state_dict())
    few = view.holdout.rows(torch.arange(64))
    recipe, options = view.distilled.recipe, rnp.RnpOptions(batch=32, recovering_epochs=5)
    masks = anp.learn_masks(
        view.trainable_victim(), few, recipe, anp.AnpOptions(iterations=15, batch=32), seeded()
    )
    empty = rnp.unlearn_clean(view.trainable_victim(), few, recipe, options, seeded())
    assert accuracy(empty, few) <= 0.4 < 0.9 < accuracy(view.victim, few)
    recovered = rnp.recover(empty, few, recipe, options, seeded())
    for found in (masks, recovered):
        values = torch.cat(list(found.values()))
        assert values.min() >= 0 and values.max() <= 1 and values.std() > 0
        assert len(values) == sum(layer.count for layer in channels.channels(view.victim))
    assert all(torch.equal(value, view.victim.state_dict()[name]) for name, value in before.items())


# FT-SAM ------------------------------------------------------------------------------------------


def test_the_ascent_is_adaptive_and_increases_the_loss() -> None:
    """ε = ρ T² g / ‖T g‖ with T = |w|, so that ‖T⁻¹ ε‖ = ρ; no step of that length rises more."""
    weights = [nn.Parameter(torch.randn(5, 3, dtype=torch.float64, generator=seeded(1)))]
    weights.append(nn.Parameter(torch.randn(4, dtype=torch.float64, generator=seeded(2))))
    slopes = [torch.randn(w.shape, dtype=torch.float64, generator=seeded(9)) for w in weights]
    starts = [w.detach().clone() for w in weights]
    for weight, slope in zip(weights, slopes, strict=True):
        weight.grad = slope.clone()
    moved = ft_sam.ascend(weights, 0.3)
    flat_w = torch.cat([w.flatten() for w in starts]).numpy()
    flat_g = torch.cat([g.flatten() for g in slopes]).numpy()
    change = torch.cat([move.flatten() for _, move in moved]).numpy()
    wanted = 0.3 * flat_w**2 * flat_g / np.linalg.norm(np.abs(flat_w) * flat_g)
    assert np.allclose(change, wanted, rtol=1e-9)
    assert np.linalg.norm(change / np.abs(flat_w)) == pytest.approx(0.3)
    rival = np.random.default_rng(0).normal(size=(200, len(flat_w)))
    rival = 0.3 * np.abs(flat_w) * rival / np.linalg.norm(rival, axis=1, keepdims=True)
    assert (rival @ flat_g).max() < change @ flat_g
    assert all(
        torch.allclose(w, start + move) for (w, move), start in zip(moved, starts, strict=True)
    )


# I-BAU -------------------------------------------------------------------------------------------


def test_the_hypergradient_is_that_of_the_solution() -> None:
    """Inner ½δᵀAδ − δᵀBθ, so δ(θ) = A⁻¹Bθ; outer ½‖δ − c‖² + ½‖θ‖²."""
    root = torch.randn(4, 4, dtype=torch.float64, generator=seeded(1))
    curve = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
    cross = torch.randn(4, 3, dtype=torch.float64, generator=seeded(2))
    goal = torch.randn(4, dtype=torch.float64, generator=seeded(3))
    theta = torch.randn(3, dtype=torch.float64, generator=seeded(4)).requires_grad_()

    def outer(push: Tensor) -> Tensor:
        return 0.5 * (push - goal).square().sum() + 0.5 * theta.square().sum()

    def inner(push: Tensor) -> Tensor:
        return 0.5 * push @ curve @ push - push @ (cross @ theta)

    solution = torch.linalg.solve(curve, cross @ theta.detach())
    answer = torch.linalg.solve(curve, cross)
    wanted = theta.detach() + answer.T @ (solution - goal)
    (found,) = i_bau.hypergradient(outer, inner, solution, [theta], 0.2, 400)
    assert torch.allclose(found, wanted, atol=1e-8)
    # Cut short it is the Neumann series cut short; with none it is the direct part alone.
    (direct,) = i_bau.hypergradient(outer, inner, solution, [theta], 0.2, 0)
    assert torch.allclose(direct, theta.detach())
    (once,) = i_bau.hypergradient(outer, inner, solution, [theta], 0.2, 1)
    assert torch.allclose(once, theta.detach() + 0.2 * cross.T @ (solution - goal))


@pytest.mark.parametrize("radius", [1.0, None])
def test_a_perturbation_changes_predictions_within_its_radius(
    radius: float | None, badnets: Case
) -> None:
    view = badnets.view
    images = view.holdout.images[:64]
    options = i_bau.IBauOptions(radius=radius, climbs=15)
    push = i_bau.find_perturbation(view.victim, list(images.split(32)), options)
    size = float(push.norm())
    assert push.shape == (1, 1, 8, 8) and (size > 1.1 if radius is None else size <= 1 + 1e-6)
    before = view.victim(images).argmax(dim=1)
    noise = size / 8 * torch.randn(push.shape, generator=seeded(1)).sign()
    changed = (view.victim(images + push).argmax(dim=1) != before).double().mean()
    assert changed > (view.victim(images + noise).argmax(dim=1) != before).double().mean()


# NAD ---------------------------------------------------------------------------------------------


def test_attention_is_the_normalised_sum_over_channels() -> None:
    maps = torch.randn(3, 5, 4, 4, dtype=torch.float64, generator=seeded(1))
    found = nad.attention(maps, 2.0)
    for number in range(3):
        summed = sum(maps[number, channel] ** 2 for channel in range(5))
        assert isinstance(summed, Tensor)
        assert torch.allclose(found[number, 0], summed / summed.norm(), atol=1e-6)


@pytest.mark.parametrize("spec", [{}, {"network": "resnet18"}, {"network": "alexnet"}])
def test_blocks_together_are_the_network(spec: dict[str, Any]) -> None:
    network, images = made(shape=(3, 32, 32), **spec), images_of(4, (3, 32, 32)).images
    pieces = blocks(network)
    assert pieces is not None and isinstance(network, Network)
    maps, logits = nad.attention_maps(network, images, 2.0)
    assert torch.allclose(logits, network(images), atol=1e-5)
    assert len(maps) == len(pieces) - 1 and all(found.shape[:2] == (4, 1) for found in maps)
    assert blocks(made(network="mlp")) is None


# MM-BD -------------------------------------------------------------------------------------------


def test_margins_of_a_linear_network_are_maximal_in_a_corner() -> None:
    """Rows of weights with supports of their own: the largest margin is the own positive part."""
    weights = torch.zeros(4, 64)
    for number in range(4):
        weights[number, 16 * number : 16 * number + 16] = torch.linspace(-1, 2, 16) * (number + 1)
    linear = nn.Linear(64, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weights)
    network = nn.Sequential(nn.Flatten(), linear)
    starts = torch.rand(4, 3, 1, 8, 8, generator=seeded())
    found = mm_bd.largest_margins(network, starts, 300, 0.05)
    # Less the least that the best other class can have: the sum of its negative weights.
    negative = weights.clamp(max=0).sum(dim=1)
    for number in range(4):
        others = negative[torch.arange(4) != number].max()
        assert float(found[number]) <= float(weights[number].clamp(min=0).sum() - others) + 1e-4
        assert float(found[number]) >= 0.9 * float(weights[number].clamp(min=0).sum())


def test_a_margin_is_to_the_next_class() -> None:
    logits = torch.tensor([[[3.0, 1.0, 2.0]], [[3.0, 1.0, 2.0]]])
    own, other = mm_bd.own_and_next(logits, torch.tensor([0, 1]))
    assert (own - other).tolist() == [[1.0], [-2.0]]


def test_the_p_value_is_that_of_the_largest_of_a_gamma() -> None:
    others = stats.gamma.rvs(4, loc=1, scale=2, size=200, random_state=0)
    fitted = stats.gamma.fit(others)
    for highest in (25.0, 60.0):
        values = torch.tensor([*others[others < highest], highest])
        shape = fitted if len(values) == 201 else stats.gamma.fit(others[others < highest])
        wanted = 1 - stats.gamma.cdf(highest, *shape) ** len(values)
        assert mm_bd.p_value_of_largest(values) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert mm_bd.p_value_of_largest(torch.tensor([1.0, 1.0, 1.0, 1.0])) == 1
    assert mm_bd.p_value_of_largest(torch.tensor([1.0, 1.0, 1.0, 2.0])) == 0
