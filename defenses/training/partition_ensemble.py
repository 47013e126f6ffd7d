"""The defense ``partition-ensemble``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.batch_norm import batch_norm_layers
from ...distill.networks.makers import NetworkMaker
from ...distill.preprocessing import Preprocessing
from ...distill.training import augmenter
from ...distill.types import Batch, RunError
from ..base import DefenderView, DefenseOptions, Trainer
from ..common.sgd import backward_step, mini_batches

_BATCH = 128
_LEVELS = 255
_TIE = 1e-3  # breaks ties between votes


@final
class PartitionEnsembleOptions(DefenseOptions):
    """The paper's training, and its smallest number of partitions for CIFAR-10 (50, 250, 1000;
    MNIST: 1200, 3000)."""

    partitions: int = Field(50, ge=3, description="parts of the set, with a network for each")
    epochs: int = Field(200, ge=1, description="training epochs of each network")
    lr: float = Field(0.1, gt=0, description="SGD's first learning rate")


@final
class PartitionEnsemble(Trainer):
    """DPA, deep partition aggregation: a vote of networks that are each trained on a part of the
    set (Levine, Feizi, "Deep Partition Aggregation: Provable Defenses against General Poisoning
    Attacks", ICLR 2021).

    In words: hash the rows into partitions by their pixels, train a network on each, and predict
    the class with the most votes. A poisoned row affects one network only: a lead of more than
    twice as many votes as there are poisoned rows is certain (``certified_radius``).

    Needs many rows for each partition. The certificate counts rows that are added or removed (a row
    with changed pixels counts twice); in a distilled set every row of the target class may carry
    the backdoor, and the certificate means nothing.

    As in the authors' code: the sum of the pixels modulo the number of partitions; 200 epochs in
    mini-batches of 128 with Nesterov momentum, the learning rate divided by 5 after 61, 121 and 161
    of them; images normalised by the mean and standard deviation of their partition.

    Deviations: pixels are rounded to 8 bits for the hash, since distilled ones are not integers;
    the networks are the victim's architecture (code: network-in-network); augmentation is the
    recipe's; whitened sets keep their own normalisation.
    """

    name = "partition-ensemble"
    Options = PartitionEnsembleOptions
    options: PartitionEnsembleOptions
    needs = "many rows for each of its partitions (the paper's smallest have 50)"
    quick: ClassVar[Mapping[str, Any]] = {"partitions": 5, "epochs": 20}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"partitions": 5},
        {"partitions": 10},
        {"partitions": 20},
        {},
        {"partitions": 250},
        {"partitions": 1000},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        parts = partition(view.distilled.batch.images, self.options.partitions)
        empty = sum(not len(rows) for rows in parts)
        if empty:
            return f"{len(view.labels)} rows leave {empty} of {len(parts)} partitions empty"
        single = sum(len(rows) == 1 for rows in parts)
        if single and batch_norm_layers(view.victim):
            return f"{single} of {len(parts)} partitions hold a single row: too few for batch norm"
        return None

    def caution(self, view: DefenderView) -> str | None:
        parts = partition(view.distilled.batch.images, self.options.partitions)
        lacking = sum(len(view.labels[rows].unique()) < view.classes for rows in parts)
        if lacking:
            return f"{lacking} of {len(parts)} partitions lack a class"
        return None

    def train(self, view: DefenderView) -> nn.Module:
        batch = view.distilled.batch
        networks = []
        for number, rows in enumerate(partition(batch.images, self.options.partitions)):
            network = _maker(view, batch.images[rows])(view.seed(self.name, number))
            order = view.generator(self.name, "order", number)
            networks.append(_fitted(network, in_order(batch.rows(rows)), view, self.options, order))
        return Vote(networks, view.classes).eval()


def _maker(view: DefenderView, images: Tensor) -> NetworkMaker:
    """Networks that normalise by the statistics of ``images``."""
    if view.network.preprocessing.zca is not None:
        return view.network
    mean, std = own_normalisation(images)
    return replace(view.network, preprocessing=Preprocessing(mean, std))


def own_normalisation(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``images`` (N, C, H, W); 1 for a constant."""
    pixels = images.double().transpose(0, 1).flatten(1)
    std = pixels.std(dim=1)
    return tuple(pixels.mean(dim=1).tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())


def learning_rate(epoch: int, options: PartitionEnsembleOptions) -> float:
    """The learning rate of an epoch, counted from 0."""
    passed = sum(epoch > share * options.epochs for share in (0.3, 0.6, 0.8))
    return options.lr * 0.2**passed


def _fitted(
    network: nn.Module,
    batch: Batch,
    view: DefenderView,
    options: PartitionEnsembleOptions,
    generator: torch.Generator,
) -> nn.Module:
    """``network`` trained on one partition; ``RunError`` if the loss is not finite."""
    augment = augmenter(view.distilled.recipe, generator)
    optimiser = torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    loss = torch.zeros(())
    network.train()
    for epoch in range(options.epochs):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(epoch, options)
        for rows in mini_batches(len(batch), _BATCH, generator, batch.labels.device):
            loss = functional.cross_entropy(
                network(augment(batch.images[rows])), batch.labels[rows]
            )
            backward_step(optimiser, loss)
    if not bool(loss.isfinite()):
        raise RunError(f"training on a partition did not converge: the loss is {loss.item()}")
    return network.eval().requires_grad_(False)


@final
class Vote(nn.Module):
    """Networks that vote. The logits are the votes, minus a little for higher class numbers, so
    that the first class wins a tie."""

    def __init__(self, networks: Sequence[nn.Module], classes: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.classes = classes

    def votes(self, images: Tensor) -> Tensor:
        """The number of votes, ``(N, classes)``."""
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
    """The rows of each of ``count`` partitions. A row's partition is the sum of its 8-bit pixels
    modulo ``count``; its position and label have no effect."""
    sums = (images.double() * _LEVELS).round().long().flatten(1).sum(dim=1) % count
    return [torch.nonzero(sums == number)[:, 0] for number in range(count)]


def in_order(batch: Batch) -> Batch:
    """The rows sorted by their pixels, the last one first, then by label, so that their order in
    the set has no effect."""
    labels = batch.labels.double().view(len(batch), -1)
    keys = torch.cat([labels, batch.images.double().flatten(1)], dim=1).cpu().numpy()
    order = np.lexsort(keys.T)
    return batch.rows(torch.from_numpy(order).to(batch.images.device))


def certified_radius(votes: Tensor) -> Tensor:
    """How many rows can be added or removed without changing the prediction, ``(N,)``, for
    ``votes`` (N, classes).

    Each changes the vote of at most one network, from the winner to another class. The smaller
    class number wins a tie.
    """
    numbers = torch.arange(votes.shape[1], device=votes.device)
    best = (votes - numbers * _TIE / votes.shape[1]).argmax(dim=1, keepdim=True)
    own = votes.gather(1, best)
    lead = own - votes - (numbers < best).to(votes.dtype)
    others = lead.masked_fill(numbers == best, float("inf")).min(dim=1).values
    return (others / 2).floor().long()
