"""The gradient-matching iteration as published, written from the paper: the yardstick of speed.

Zhao, Mopuri, Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021, algorithm 1, with
the habits of its code (VICO-UoE/DatasetCondensation, main.py and utils.py) that cost time: one loss
over all classes back-propagated at the end of a step, a data loader over the synthetic images in
the inner loop, and losses and accuracies read back to the CPU after every mini-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from distillsec.distill.backends.matching import layerwise_cosine
from distillsec.distill.types import Batch


@final
@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """What an iteration consists of; the rates do not matter for its time."""

    classes: int
    ipc: int
    outer: int
    inner: int
    batch_real: int = 256
    batch_train: int = 256
    lr_img: float = 0.1
    lr_net: float = 0.01


@final
class PublishedRun:
    """Iterations on ``real``, already on its device, from fresh networks of ``make``."""

    def __init__(
        self, real: Batch, make: Callable[[], nn.Module], settings: PublishedSettings
    ) -> None:
        self._real, self._make, self._settings = real, make, settings
        device = real.images.device
        labels = real.labels.cpu().numpy()
        self._rows = [numpy.flatnonzero(labels == label) for label in range(settings.classes)]
        shape = (settings.classes * settings.ipc, *real.images.shape[1:])
        self._images = torch.randn(shape, device=device, requires_grad=True)
        self._labels = torch.arange(settings.classes, device=device)
        self._labels = self._labels.repeat_interleave(settings.ipc)
        self._random = numpy.random.default_rng(0)
        self._optimiser = torch.optim.SGD([self._images], lr=settings.lr_img, momentum=0.5)

    def iteration(self) -> float:
        """One outer iteration; returns its mean loss."""
        settings, network, total = self._settings, self._make().train(), 0.0
        optimiser = torch.optim.SGD(network.parameters(), lr=settings.lr_net)
        for step in range(settings.outer):
            total += self._step(network)
            if step + 1 < settings.outer:
                self._train(network, optimiser)
        return total / settings.outer

    def _step(self, network: nn.Module) -> float:
        settings, weights = self._settings, list(network.parameters())
        loss = torch.zeros((), device=self._images.device)
        for label in range(settings.classes):
            real = self._draw(label)
            goal = torch.full((len(real),), label, device=real.device)
            value = functional.cross_entropy(network(real), goal)
            wanted = [g.detach().clone() for g in torch.autograd.grad(value, weights)]
            own = slice(label * settings.ipc, (label + 1) * settings.ipc)
            value = functional.cross_entropy(network(self._images[own]), self._labels[own])
            gradient = torch.autograd.grad(value, weights, create_graph=True)
            loss = loss + layerwise_cosine(gradient, wanted)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return loss.item()

    def _draw(self, label: int) -> Tensor:
        rows = self._random.permutation(self._rows[label])[: self._settings.batch_real]
        return self._real.images[rows]

    def _train(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        images, labels = copy.deepcopy(self._images.detach()), copy.deepcopy(self._labels)
        data = TensorDataset(images, labels)
        loader = DataLoader(data, batch_size=self._settings.batch_train, shuffle=True)
        for _ in range(self._settings.inner):
            _epoch(network, optimiser, loader)


def _epoch(
    network: nn.Module, optimiser: torch.optim.Optimizer, loader: DataLoader[tuple[Tensor, ...]]
) -> tuple[float, float]:
    """One epoch; returns its mean loss and accuracy, read after every mini-batch."""
    right, total, seen = 0.0, 0.0, 0
    device = next(network.parameters()).device
    for batch, truth in loader:
        images, labels = batch.float().to(device), truth.long().to(device)
        answers = network(images)
        loss = functional.cross_entropy(answers, labels)
        found = numpy.argmax(answers.cpu().data.numpy(), axis=-1)
        right += float((found == labels.cpu().data.numpy()).sum())
        total, seen = total + loss.item() * len(labels), seen + len(labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return total / seen, right / seen
