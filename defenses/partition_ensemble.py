"""Deep partition aggregation: networks that each saw a part of the set, and their vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.networks import batch_norm_layers
from ..distill.training import fit
from ..distill.types import Batch
from .base import DefenderView, DefenseOptions, Trainer

_LEVELS = 255
_TIE = 1e-3  # less than a vote, even times the number of classes


@final
class PartitionEnsembleOptions(DefenseOptions):
    """The paper's smallest number for CIFAR-10."""

    partitions: int = Field(50, ge=3, description="parts of the set, a network each")


@final
class PartitionEnsemble(Trainer):
    """DPA, deep partition aggregation (Levine, Feizi, "Deep Partition Aggregation: Provable
    Defenses against General Poisoning Attacks", ICLR 2021).

    In words: hash the rows into partitions by their pixels, train a network on each, and answer
    what most of them say. A poisoned row reaches one network alone: a lead of more than twice as
    many votes as there are poisoned rows can't be overturned (``certified_radius``).

    Needs many rows for each partition. The certificate counts rows put in or taken out (a row whose
    pixels are changed counts twice); in a distilled set every row of the target class may carry the
    backdoor, and then it says nothing.

    Deviations: 8-bit pixels are hashed, since distilled ones are no whole numbers; the base
    networks follow the set's recipe (by epochs where its learned steps name rows that a partition
    lacks): its epochs are fewer steps on fewer rows, and its normalisation is the set's, where the
    official code trains 200 epochs and normalises by each partition.
    """

    name = "partition-ensemble"
    Options = PartitionEnsembleOptions
    needs = "many rows for each of its partitions (the paper's smallest have 50)"
    quick: ClassVar[Mapping[str, Any]] = {"partitions": 5}

    def __init__(self, options: PartitionEnsembleOptions) -> None:
        self.options: PartitionEnsembleOptions = options

    def objection(self, view: DefenderView) -> str | None:
        parts = partition(view.distilled.batch.images, self.options.partitions)
        empty = sum(not len(rows) for rows in parts)
        if empty:
            return f"{len(view.labels)} rows leave {empty} of {len(parts)} partitions empty"
        alone = sum(len(rows) == 1 for rows in parts)
        if alone and batch_norm_layers(view.victim):
            return f"{alone} of {len(parts)} partitions hold a single row: too few for batch norm"
        return None

    def caution(self, view: DefenderView) -> str | None:
        parts = partition(view.distilled.batch.images, self.options.partitions)
        lacking = sum(len(view.labels[rows].unique()) < view.classes for rows in parts)
        if lacking:
            return f"{lacking} of {len(parts)} partitions lack a class"
        return None

    def train(self, view: DefenderView) -> nn.Module:
        batch, recipe = view.distilled.batch, view.distilled.recipe.by_epochs()
        networks = []
        for number, rows in enumerate(partition(batch.images, self.options.partitions)):
            seed = view.seed(self.name, number)
            order = view.generator(self.name, number)
            networks.append(fit(view.network(seed), in_order(batch.rows(rows)), recipe, order))
        return Vote(networks, view.classes).eval()


@final
class Vote(nn.Module):
    """Networks that vote. Its logits are the votes, less a little for the class's number, so that
    of classes that are even the first one wins."""

    def __init__(self, networks: Sequence[nn.Module], classes: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.classes = classes

    def votes(self, images: Tensor) -> Tensor:
        """How many networks say what, ``(N, classes)``."""
        counts = torch.zeros(len(images), self.classes, device=images.device)
        for network in self.networks:
            answers = network(images).argmax(dim=1, keepdim=True)
            counts.scatter_add_(1, answers, torch.ones_like(counts[:, :1]))
        return counts

    def forward(self, images: Tensor) -> Tensor:
        """Votes with ties broken, ``(N, classes)``."""
        tie = torch.arange(self.classes, device=images.device) * (_TIE / self.classes)
        return self.votes(images) - tie


def partition(images: Tensor, count: int) -> list[Tensor]:
    """The rows of each of ``count`` partitions: a row's is the sum of its 8-bit pixels modulo
    ``count``, whatever its place or label."""
    sums = (images.double() * _LEVELS).round().long().flatten(1).sum(dim=1) % count
    return [torch.nonzero(sums == number)[:, 0] for number in range(count)]


def in_order(batch: Batch) -> Batch:
    """The same rows by their labels and pixels: their order in the set leaves no trace."""
    labels = batch.labels.double().view(len(batch), -1)
    keys = torch.cat([labels, batch.images.double().flatten(1)], dim=1).cpu().numpy()
    order = np.lexsort(keys.T[::-1])
    return batch.rows(torch.from_numpy(order).to(batch.images.device))


def certified_radius(votes: Tensor) -> Tensor:
    """How many rows put in or taken out can't change the answer, ``(N,)``, for ``votes`` (N,
    classes).

    Each changes one network's vote at most: from the winner to another class. Ties go to the
    smaller class number.
    """
    numbers = torch.arange(votes.shape[1], device=votes.device)
    best = (votes - numbers * _TIE / votes.shape[1]).argmax(dim=1, keepdim=True)
    own = votes.gather(1, best)
    lead = own - votes - (numbers < best).to(votes.dtype)
    others = lead.masked_fill(numbers == best, float("inf")).min(dim=1).values
    return (others / 2).floor().long()
