"""Archetypes: mixtures, feature statistics against loops, and a loss that falls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillsec.attacks.archetypes import (
    ArchetypePlan,
    FeatureStatistics,
    archetype_loss,
    mixtures,
    rebuild_archetypes,
    trained_networks,
)
from distillsec.distill.core.task import Task
from distillsec.distill.networks.makers import embed
from distillsec.distill.randomness import Streams
from distillsec.distill.training import accuracy
from distillsec.distill.types import Batch, Distillate

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
PLAN = ArchetypePlan(per_class=4, networks=2, steps=20, lr=0.1, statistics=1.0)


@pytest.fixture
def received(toy_task: Tasks) -> Distillate:
    """Six images of three classes, as a distilled set."""
    task = toy_task(epochs=30)
    real = task.real.rows(torch.arange(6))
    return Distillate(batch=Batch(images=real.images, labels=real.labels), recipe=task.recipe)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mixtures_lie_between_two_images_of_their_class(received: Distillate) -> None:
    mixed = mixtures(received.batch, 5, generator())
    assert mixed.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for image, label in zip(mixed.images, mixed.labels, strict=True):
        one, two = received.batch.images[received.batch.labels == label]
        shares = [_share(image, first, second) for first, second in ((one, two), (two, one))]
        assert any(0 <= share <= 0.5 for share in shares)
    alone = Batch(images=received.batch.images[:1], labels=torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(
        mixtures(alone, 3, generator()).images, alone.images.repeat(3, 1, 1, 1)
    )


def _share(image: Tensor, first: Tensor, second: Tensor) -> float:
    """The share of ``second`` in ``image``; −1 where it is no mixture of the two."""
    apart = second - first
    share = float(((image - first) * apart).sum() / apart.square().sum())
    is_mixture = torch.allclose(image, first + share * apart, atol=1e-5)
    return round(share, 5) if is_mixture else -1.0


def test_mixtures_of_soft_labels(received: Distillate) -> None:
    soft = torch.nn.functional.one_hot(received.batch.labels, 3) * 0.7 + 0.1
    mixed = mixtures(received.batch.replace(labels=soft), 2, generator())
    assert mixed.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_statistics_meet_a_loop(received: Distillate, toy_task: Tasks) -> None:
    network, batch = toy_task().network(0).eval(), received.batch
    found = FeatureStatistics.of(network, batch)
    features = embed(network, batch.images).detach().double()
    squares = torch.zeros(features.shape[1], dtype=torch.float64)
    for label in range(3):
        rows = [row for row in range(6) if batch.labels[row] == label]
        mean = sum(features[row] for row in rows) / len(rows)
        torch.testing.assert_close(found.means[label].double(), mean)
        squares += sum((features[row] - mean) ** 2 for row in rows)
    torch.testing.assert_close(found.spread.double(), squares / 6, rtol=1e-4, atol=1e-6)
    assert found.distance(found).item() == 0


def test_the_distance_of_statistics_in_closed_form() -> None:
    """Means of 1 and 2, spreads of 4 and 9, relative to means of 1."""
    labels = torch.arange(2)
    one = FeatureStatistics(labels=labels, means=torch.ones(2, 3), spread=torch.full((3,), 4.0))
    two = FeatureStatistics(
        labels=labels, means=torch.full((2, 3), 2.0), spread=torch.full((3,), 9.0)
    )
    assert two.distance(one).item() == pytest.approx(1 + 1, rel=1e-4)
    assert one.distance(two).item() == pytest.approx((1 + 1) / 4, rel=1e-4)


def test_archetypes_are_known_to_the_networks(received: Distillate, toy_task: Tasks) -> None:
    task = toy_task()
    networks = trained_networks(received, task.network, 2, Streams(0))
    assert not any(p.requires_grad for network in networks for p in network.parameters())
    first, second = (network.state_dict().values() for network in networks)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    start = mixtures(received.batch, PLAN.per_class, generator())
    found = rebuild_archetypes(received, networks, PLAN, generator())
    again = rebuild_archetypes(received, networks, PLAN, generator())
    assert torch.equal(found.images, again.images)
    assert found.images.min() >= 0 and found.images.max() <= 1
    assert not torch.allclose(found.images, start.images, atol=0.05)
    for network in networks:
        known = FeatureStatistics.of(network, received.batch)
        before, after = (archetype_loss(network, batch, known, 1.0) for batch in (start, found))
        assert after < before
        assert accuracy(network, found) == 1.0
