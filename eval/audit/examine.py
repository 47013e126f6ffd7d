"""Train victims on a set and collect the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final, final

import torch
from torch import Tensor, nn

from ...defenses.base import DefenderView
from ...distill.networks.architectures import NETWORKS
from ...distill.networks.makers import NetworkMaker
from ...distill.networks.registry import NetworkSpec
from ...distill.training import accuracy
from ...distill.types import Batch, DistilledSet
from ..run.setup import Setup
from ..run.victims import train_victim
from .evidence import last_layer, row_statistics
from .inversion import JointPatches, hit_rates, joint_patches, smallness

GROUPS: Final = 3
TOGETHER: Final = 2
STEPS: Final = 160
LARGEST_WIDTH: Final = 32
UNITS: Final = 2 * GROUPS + 1
_OTHER: Final = "mlp"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Examination:
    """What was found in a set.

    evidence: a number for each class ``(K,)`` by kind; larger means more likely a target.
    patches: of the first group of victims. held_out: for each class the share of carriers that its
    patch sends there on victims that the search did not see. other_network: the same on a victim
    of another architecture. sizes: the patches' sizes, as pixels. accuracy: the victims' mean
    accuracy on clean images, ``None`` without any. victims: the first group's.
    """

    evidence: Mapping[str, Tensor]
    patches: JointPatches
    held_out: Tensor
    other_network: Tensor
    sizes: Tensor
    accuracy: float | None
    victims: tuple[nn.Module, ...]
    seconds: float


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AuditedSet:
    """A set to be examined: with the data, and ``clean`` images of the receiver's, maybe none."""

    distilled: DistilledSet
    setup: Setup
    clean: Batch

    @property
    def carriers(self) -> Batch:
        """The images that patches are tried on: the clean ones, or without any the set's own."""
        return self.clean if len(self.clean) else self.distilled.batch

    @property
    def network(self) -> NetworkMaker:
        """The victims' architecture: the set's, at most 32 channels wide."""
        maker = self.setup.primary_network
        spec, known = maker.spec, NETWORKS.get(maker.spec.network)
        width = spec.width or (known.published.get("width") if known else None)
        if not isinstance(width, int) or width <= LARGEST_WIDTH:
            return maker
        return replace(maker, spec=spec.model_copy(update={"width": LARGEST_WIDTH}))

    @property
    def other_network(self) -> NetworkMaker:
        """Another architecture, for a victim that the search does not see."""
        return replace(self.network, spec=NetworkSpec(network=_OTHER))


def examine(audited: AuditedSet, progress: Callable[[int], None]) -> Examination:
    """Train ``GROUPS`` × ``TOGETHER`` victims and one of another architecture; collect evidence.

    Each group of victims is inverted jointly; sizes are averaged over the groups, as logarithms.
    A group's patches are tried on the next group's victims. progress: called with the number of
    finished units, of ``UNITS``; it may raise to end the examination.
    Errors: ``RunError`` where a victim's training diverges.
    """
    began, classes = time.monotonic(), len(audited.distilled.classes)
    groups, searched = [], []
    for number in range(GROUPS):
        groups.append(_train_group(audited, number))
        progress(2 * number + 1)
        generator = audited.setup.streams.generator("defense", "audit", "inversion", number)
        searched.append(joint_patches(groups[-1], audited.carriers, classes, STEPS, generator))
        progress(2 * number + 2)
    sizes = torch.stack([each.sizes for each in searched]).log().mean(dim=0).exp()
    victims = [victim for group in groups for victim in group]
    evidence = {
        "inversion": smallness(sizes).double().cpu(),
        "rows": row_statistics(_views(audited, victims)),
        "weights": last_layer(victims, classes),
    }
    other = train_victim(audited.distilled, audited.other_network, audited.setup.streams, 0)
    held_out = [
        hit_rates(victim, patches, audited.carriers, classes)
        for number, patches in enumerate(searched)
        for victim in groups[(number + 1) % GROUPS]
    ]
    progress(UNITS)
    return Examination(
        evidence={name: value for name, value in evidence.items() if value is not None},
        patches=searched[0],
        held_out=torch.stack(held_out).mean(dim=0),
        other_network=hit_rates(other, searched[0], audited.carriers, classes),
        sizes=sizes,
        accuracy=_accuracy(victims, audited.clean),
        victims=tuple(groups[0]),
        seconds=time.monotonic() - began,
    )


def _train_group(audited: AuditedSet, number: int) -> list[nn.Module]:
    numbers = range(TOGETHER * number, TOGETHER * (number + 1))
    return [
        train_victim(
            audited.distilled, audited.network, audited.setup.streams, each
        ).requires_grad_(False)
        for each in numbers
    ]


def _views(audited: AuditedSet, victims: list[nn.Module]) -> list[DefenderView]:
    return [
        DefenderView(
            distilled=audited.distilled,
            victim=victim,
            network=audited.network,
            holdout=audited.clean,
            entropy=audited.setup.streams.integer("defense", "audit", "view", number),
        )
        for number, victim in enumerate(victims)
    ]


def _accuracy(victims: list[nn.Module], clean: Batch) -> float | None:
    return fmean(accuracy(victim, clean) for victim in victims) if len(clean) else None
