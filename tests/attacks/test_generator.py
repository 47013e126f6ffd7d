"""The trigger ``generator`` and its training: against layers of PyTorch, scipy and brute force."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from distillsec.attacks.generator_training import (
    GeneratorOptions,
    GeneratorTask,
    contrast,
    earth_mover,
    train_generator,
)
from distillsec.attacks.triggers import GeneratorTrigger, trigger_from
from distillsec.attacks.triggers.generator import WIDEST, fresh_weights, perturb, weight_shapes
from distillsec.distill.core.task import Task
from distillsec.distill.types import RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generator(channels: int = 3, width: int = 4, side: int = 8) -> GeneratorTrigger:
    return GeneratorTrigger(
        weights=fresh_weights(channels, width, seeded()),
        epsilon=torch.full((channels, 1, 1), 0.2),
        example=torch.rand(channels, side, side, generator=seeded(1)),
    )


class Layers(nn.Module):
    """The same architecture as modules."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, padding=1)
        self.deep = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(width, width, 3, padding=1)
        self.exit = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        fine = torch.relu(self.enter((images - 0.5) / 0.5))
        coarse = torch.relu(self.deep(torch.relu(self.down(nn.AvgPool2d(2)(fine)))))
        larger: Tensor = nn.UpsamplingNearest2d(size=(fine.shape[2], fine.shape[3]))(coarse)
        answer: Tensor = self.exit(torch.relu(self.up(fine + larger)))
        return answer


@pytest.mark.parametrize("side", [2, 7, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_is_its_layers(channels: int, side: int) -> None:
    trigger = generator(channels, side=side)
    layers = Layers(channels, 4)
    layers.load_state_dict(OrderedDict(trigger.weights))
    images = torch.rand(5, channels, side, side, generator=seeded(2))
    with torch.no_grad():
        expected = 0.2 * torch.tanh(layers(images))
    found = perturb(trigger.weights, trigger.epsilon, images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-4)  # each image has its own
    stamped = trigger.stamp(images)
    torch.testing.assert_close(stamped, (images + expected).clamp(0, 1), rtol=1e-5, atol=1e-6)
    free = GeneratorTrigger(
        weights=trigger.weights, epsilon=trigger.epsilon * 9, example=images[0], range="unbounded"
    )
    assert free.stamp(torch.zeros_like(images)).min() < 0


def test_fresh_weights_are_within_pytorchs_bounds() -> None:
    weights, layers = fresh_weights(3, 16, seeded()), Layers(3, 16)
    assert weight_shapes(3, 16) == {n: tuple(v.shape) for n, v in layers.state_dict().items()}
    for name, value in weights.items():
        theirs = layers.state_dict()[name]
        inputs = getattr(layers, name.split(".")[0]).weight[0].numel()
        assert value.abs().max() <= 1 / math.sqrt(inputs)
        if value.numel() > 100:
            assert value.std() == pytest.approx(float(theirs.std()), rel=0.15)


def hostile() -> dict[str, tuple[dict[str, Tensor], str]]:
    huge = torch.zeros(1).expand(WIDEST + 1, 3, 3, 3)
    return {
        "too wide": ({"enter.weight": huge}, f"width of 1 to {WIDEST}"),
        "no width": ({"enter.weight": torch.zeros(0, 3, 3, 3)}, "none 0"),
        "flat": ({"enter.weight": torch.zeros(5)}, "expected \\(width, C, 3, 3\\)"),
        "kernel": (
            {"enter.weight": torch.zeros(4, 3, 5, 5)},
            r"enter.weight has .* \(4, 3, 3, 3\)",
        ),
        "layer": ({"deep.weight": torch.zeros(4, 9, 3, 3)}, r"deep.weight has .* \(4, 4, 3, 3\)"),
        "bias": ({"exit.bias": torch.zeros(4)}, r"exit.bias has the shape \(4,\), expected \(3,\)"),
        "epsilon": ({"epsilon": torch.zeros(3)}, r"epsilon has the shape \(3,\)"),
        "negative": ({"epsilon": torch.full((3, 1, 1), -1.0)}, "epsilon from 0 on"),
        "example": ({"example": torch.zeros(8, 8)}, r"expected \(C, H, W\)"),
        "point": ({"example": torch.zeros(3, 1, 8)}, "from 2×2 on"),
    }


@pytest.mark.parametrize("fault", hostile())
def test_files_with_another_architecture_are_refused(fault: str) -> None:
    tensors, message = hostile()[fault]
    info = {"kind": "generator", "range": "pixel"}
    with pytest.raises(RequestError, match=message):
        trigger_from(info, {**generator().tensors(), **tensors})
    missing = {k: v for k, v in generator().tensors().items() if k not in tensors}
    with pytest.raises(RequestError, match="the trigger lacks its "):
        trigger_from(info, missing)


# The losses --------------------------------------------------------------------------------------


def test_earth_mover_is_scipys_distance() -> None:
    found, wanted = torch.randn(2, 6, 5, generator=seeded(), dtype=torch.float64).softmax(-1)
    places = range(5)
    pairs = zip(found.tolist(), wanted.tolist(), strict=True)
    expected = [wasserstein_distance(places, places, ours, theirs) for ours, theirs in pairs]
    assert float(earth_mover(found, wanted)) == pytest.approx(sum(expected) / 6, rel=1e-9)


def test_contrast_is_the_papers_sum() -> None:
    found, near, far = torch.randn(3, 4, 7, generator=seeded(), dtype=torch.float64)

    def cosine(one: Tensor, two: Tensor) -> float:
        return float(one @ two / (one @ one).sqrt() / (two @ two).sqrt())

    expected = 0.0
    for row in range(4):
        top = math.exp(cosine(found[row], near[row]) / 0.3)
        bottom = sum(math.exp(cosine(found[row], other) / 0.3) for other in far)
        expected -= math.log(top / bottom) / 4
    assert float(contrast(found, near, far, 0.3)) == pytest.approx(expected, rel=1e-9)


def test_training_makes_the_network_take_sources_for_wanted_images(toy_task: Tasks) -> None:
    task = toy_task()
    network = task.network(0).eval().requires_grad_(False)
    with torch.no_grad():  # a network that knows the classes: their mean images as its head
        features = network.embed(task.real.images)  # type: ignore[operator]
        means = torch.stack([features[task.real.labels == label].mean(0) for label in range(3)])
        means = means - means.mean(0)
        network.head.weight.copy_(means * 4 / means.norm())  # type: ignore[union-attr, operator]
        network.head.bias.copy_(-(features.mean(0) @ network.head.weight.T))  # type: ignore[union-attr, operator]
    images, labels = task.real.images, task.real.labels
    std = torch.full((1, 1, 1), 0.25)
    made = GeneratorTask(
        network=network,
        sources=images[labels == 1],
        wanted=images[labels == 2],
        epsilon=2 * std,
        std=std,
    )

    def taken(weights: dict[str, Tensor]) -> float:
        stamped = (made.sources + perturb(weights, made.epsilon, made.sources)).clamp(0, 1)
        with torch.no_grad():
            return float(network(stamped).softmax(1)[:, 2].mean())

    options = GeneratorOptions(width=4, lr=0.01, images=3000)
    assert taken(train_generator(made, options, seeded())) > 1.3 * taken(
        fresh_weights(1, 4, seeded())
    )
