"""Class archetypes: images that stand in for real ones, rebuilt from networks trained on a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distill.networks.makers import embed
from ..distill.randomness import Streams
from ..distill.training import fit
from ..distill.types import Batch, Distillate, hard_labels

_EPS = 1e-6


@final
@dataclass(frozen=True, kw_only=True)
class ArchetypePlan:
    """How archetypes are rebuilt.

    per_class: how many of each class. networks: trained on the set. steps, lr: Adam's, in
    normalised units. statistics: weight of the features' statistics beside the cross-entropy.
    """

    per_class: int
    networks: int
    steps: int
    lr: float
    statistics: float


def trained_networks(
    received: Distillate, network: Callable[[int], nn.Module], count: int, streams: Streams
) -> list[nn.Module]:
    """``count`` networks trained on the set by its recipe, frozen. network: fresh, by seed."""
    found = []
    for number in range(count):
        fresh = network(streams.integer("attack", "archetypes", number))
        order = streams.generator("attack", "archetypes", number, "training")
        trained = fit(fresh, received.batch, received.recipe, order)
        found.append(trained.requires_grad_(False))
    return found


def rebuild_archetypes(
    received: Distillate,
    networks: Sequence[nn.Module],
    plan: ArchetypePlan,
    generator: torch.Generator,
) -> Batch:
    """Archetypes of every class that the set has, in [0, 1], with hard labels.

    They start as mixtures of the set's images of a class. Each step asks one of the ``networks``,
    in turn, and lowers its ``archetype_loss``.
    """
    batch, space = received.batch, received.recipe.preprocessing
    start = mixtures(batch, plan.per_class, generator)
    leaf = space.normalise(start.images).requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=plan.lr)
    known = [FeatureStatistics.of(network, batch) for network in networks]
    for step in range(plan.steps):
        number = step % len(networks)
        seen = start.replace(images=space.pixels(leaf))
        loss = archetype_loss(networks[number], seen, known[number], plan.statistics)
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        optimiser.step()
        with torch.no_grad():
            leaf.copy_(space.normalise(space.pixels(leaf).clamp(0, 1)))
    return start.replace(images=space.pixels(leaf).detach().clamp(0, 1))


def mixtures(batch: Batch, per_class: int, generator: torch.Generator) -> Batch:
    """``per_class`` images of every class: each between two random ones of ``batch``.

    The share of the second is uniform in [0, 0.5]; a class with one image gives it unmixed.
    """
    labels = hard_labels(batch.labels)
    images, found = [], []
    for label in labels.unique().tolist():
        own = batch.images[labels == label]
        first, second = (
            torch.randint(len(own), (per_class,), generator=generator).to(own.device)
            for _ in range(2)
        )
        share = torch.rand(per_class, 1, 1, 1, generator=generator).to(own.device) / 2
        images.append((1 - share) * own[first] + share * own[second])
        found.append(torch.full((per_class,), label, device=own.device))
    return Batch(images=torch.cat(images), labels=torch.cat(found))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStatistics:
    """Features of a network by class: ``means`` ``(classes, features)``, and their mean square
    within the classes, ``(features,)``. labels: ``int64 (classes,)``."""

    labels: Tensor
    means: Tensor
    spread: Tensor

    @classmethod
    def of(cls, network: nn.Module, batch: Batch) -> FeatureStatistics:
        """Those of ``network`` on ``batch``, attached to its images."""
        features, labels = embed(network, batch.images), hard_labels(batch.labels)
        known, rows = labels.unique(return_inverse=True)
        members = functional.one_hot(rows, len(known)).to(features.dtype)
        means = members.T @ features / members.sum(dim=0)[:, None]
        spread = (features - means[rows]).square().mean(dim=0)
        return cls(labels=known, means=means, spread=spread)

    def distance(self, other: FeatureStatistics) -> Tensor:
        """Squared distance of the means, and of the roots of the spreads, relative to ``other``."""
        scale = other.means.square().mean() + _EPS
        means = (self.means - other.means).square().mean() / scale
        roots = (self.spread + _EPS).sqrt() - (other.spread + _EPS).sqrt()
        return means + roots.square().mean() / scale


def archetype_loss(
    network: nn.Module, archetypes: Batch, known: FeatureStatistics, weight: float
) -> Tensor:
    """Cross-entropy of ``archetypes`` to their labels, and ``weight`` × their statistics' distance
    from those that the set has in the network."""
    entropy = functional.cross_entropy(network(archetypes.images), archetypes.labels)
    return entropy + weight * FeatureStatistics.of(network, archetypes).distance(known)
