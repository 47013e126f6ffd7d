"""Steps of gradient descent on one network: the optimiser's own, or captured ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from .engine import PLAIN, Engine, StaticNetwork
from .slopes import even_pieces, mean_slopes
from .types import Batch

_MOMENTUM = "momentum_buffer"  # torch's name for it in the state of SGD
_NOT_TAKEN = ("dampening", "nesterov", "maximize")


class NetworkTrainer(ABC):
    """Takes steps on one network."""

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """One step on the mean cross-entropy of ``batch``; returns it, detached.

        The answer is valid until the next step.
        """


@contextmanager
def training(
    network: nn.Module, optimiser: torch.optim.SGD, engine: Engine = PLAIN
) -> Iterator[NetworkTrainer]:
    """Within, the trainer takes steps of ``optimiser`` on ``network``, which has them at the end.

    optimiser: of one group, the parameters of ``network``; its learning rate is read at every step.
    """
    static = engine.static(network)
    if static is None:
        yield _PlainTrainer(network, optimiser)
        return
    with static.reserved():
        trainer = _FastTrainer(static, optimiser)
        yield trainer
        trainer.keep_momentum(list(network.parameters()))
        static.store(network)


@final
class _PlainTrainer(NetworkTrainer):
    """Takes the optimiser's own steps."""

    def __init__(self, network: nn.Module, optimiser: torch.optim.SGD) -> None:
        self._network, self._optimiser = network, optimiser

    def step(self, batch: Batch) -> Tensor:
        loss = functional.cross_entropy(self._network(batch.images), batch.labels)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return loss.detach()


@final
class _FastTrainer(NetworkTrainer):
    """Takes the same steps on a static network, whose graph updates the weights in place."""

    def __init__(self, static: StaticNetwork, optimiser: torch.optim.SGD) -> None:
        (group,) = optimiser.param_groups
        assert not any(group[name] for name in _NOT_TAKEN)
        self._static, self._optimiser, self._group = static, optimiser, group
        self._read_momentum()
        self._momentum, self._decay = group["momentum"], group["weight_decay"]
        self._rate, self._rate_is = torch.zeros((), device=static.device), 0.0
        name = ("descend", self._momentum, self._decay)
        descend = partial(_descend, static, self._momentum, self._decay)
        self._descend = static.captured(name, descend, static.velocity)

    def step(self, batch: Batch) -> Tensor:
        if self._group["lr"] != self._rate_is:
            self._rate_is = self._group["lr"]
            self._rate = torch.full_like(self._rate, self._rate_is)
        (loss,) = self._descend(batch.images, batch.labels, self._rate)
        return loss

    @torch.no_grad()
    def _read_momentum(self) -> None:
        state = self._optimiser.state
        for own, weight in zip(self._static.velocity, self._group["params"], strict=True):
            kept = state[weight].get(_MOMENTUM) if weight in state else None
            own.zero_() if kept is None else own.copy_(kept)

    def keep_momentum(self, weights: list[nn.Parameter]) -> None:
        """Write the momentum into the optimiser's state, where it has any."""
        if not self._momentum:
            return
        for weight, value in zip(weights, self._static.velocity, strict=True):
            state: dict[str, Any] = self._optimiser.state[weight]
            state[_MOMENTUM] = value.clone()


def _descend(
    static: StaticNetwork,
    momentum: float,
    decay: float,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
) -> tuple[Tensor, ...]:
    """SGD's step as torch defines it, on the static weights and velocity, in place."""
    batch = Batch(images=images, labels=labels)
    size = len(batch) if static.sees_batches else even_pieces(len(batch), images.device)
    loss, slopes = mean_slopes(static.first_order, static.weights, batch, size)
    with torch.no_grad():
        if decay:
            torch._foreach_add_(slopes, static.weights, alpha=decay)
        if momentum:
            torch._foreach_mul_(static.velocity, momentum)
            torch._foreach_add_(static.velocity, slopes)
            slopes = static.velocity
        torch._foreach_sub_(static.weights, list(torch._foreach_mul(slopes, rate)))
    return (loss,)
