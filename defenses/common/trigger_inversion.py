"""Trigger inversion: for each class, the smallest patch with which images are classified as it.

All classes are searched at once, as one batch; each has its own weight of the patch's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.training import shuffled
from ...distill.types import Batch
from ..base import DefenseOptions
from .sgd import backward_step

_EDGE = 1e-7  # Keras's: at 0 and 1 the inverse of tanh is infinite


class InversionOptions(DefenseOptions):
    """The settings of Neural Cleanse's published experiment (``gtsrb_visualize_example.py``).

    Its 1,000 samples in mini-batches of 32 are 31 mini-batches a pass, 992 images.
    """

    steps: int = Field(1000, ge=1, description="largest number of passes")
    images: int = Field(1000, ge=2, description="images in a pass, rounded down to mini-batches")
    batch: int = Field(32, ge=2, description="images in a mini-batch")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate")
    success: float = Field(
        0.99, gt=0, le=1, description="share of the images for which a patch must succeed"
    )
    cost: float = Field(1e-3, gt=0, description="first weight of the patch's size")
    patience: int = Field(
        5, ge=1, description="successful or failed passes before the weight changes"
    )
    factor: float = Field(2.0, gt=1, description="factor of such a change")
    early_stop: bool = Field(
        True, description="whether a class's search may end before the last pass"
    )
    early_stop_threshold: float = Field(
        1.0, gt=0, le=1, description="progress is a best size below this share of the one before"
    )
    early_stop_patience: int = Field(
        25, ge=1, description="passes without progress that end a class's search"
    )


@final
@dataclass(frozen=True, eq=False)
class Patches:
    """A patch for each class: ``(1 − mask) · image + mask · pattern``.

    masks ``(K, 1, H, W)`` and patterns ``(K, C, H, W)`` in [0, 1]. found: ``bool (K,)``, whether
    the patch succeeds (if not, it is the last one of the search). penalties ``(K,)``: the values
    that were minimised.
    """

    masks: Tensor
    patterns: Tensor
    found: Tensor
    penalties: Tensor

    @property
    def sizes(self) -> Tensor:
        """The masks' L1 norms, ``(K,)``."""
        return self.masks.flatten(1).sum(dim=1)

    def stamp(self, images: Tensor, number: int) -> Tensor:
        """``images`` with the patch of class ``number``."""
        return stamped(images, self.masks[number], self.patterns[number])


@final
@dataclass(frozen=True, eq=False)
class Candidates:
    """The current patches of the classes that are still searched, on one mini-batch.

    numbers ``(A,)``: the classes. masks ``(A, 1, H, W)``, patterns ``(A, C, H, W)``, images
    ``(N, C, H, W)``, labels ``(N,)``.
    """

    network: nn.Module
    numbers: Tensor
    masks: Tensor
    patterns: Tensor
    images: Tensor
    labels: Tensor

    def stamped(self) -> Tensor:
        """Every image with every patch, ``(A, N, C, H, W)``."""
        return stamped(self.images, self.masks[:, None], self.patterns[:, None])

    def losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and accuracy, each ``(A,)``, on images ``(A, N, C, H, W)`` with labels
        ``(A, N)``."""
        logits = self.network(images.flatten(0, 1))
        loss = functional.cross_entropy(logits, labels.flatten(), reduction="none")
        right = (logits.argmax(dim=1) == labels.flatten()).float()
        return loss.view(labels.shape).mean(dim=1), right.view(labels.shape).mean(dim=1)


Penalty = Callable[[Candidates], Tensor]
"""The value to minimise for each candidate patch, ``(A,)``."""


def mask_size(candidates: Candidates) -> Tensor:
    """The L1 norm of the mask: Neural Cleanse's penalty."""
    return candidates.masks.flatten(1).sum(dim=1)


def stamped(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """``images`` with a patch."""
    return (1 - mask) * images + mask * pattern


def invert_triggers(
    network: nn.Module,
    known: Batch,
    classes: int,
    options: InversionOptions,
    generator: torch.Generator,
    penalty: Penalty = mask_size,
) -> Patches:
    """For each class the smallest patch that succeeds on ``options.success`` of the images.

    Adam on mask and pattern through a tanh. The weight of ``penalty`` rises while a patch succeeds
    and falls faster while it does not; a class is done when its best patch no longer shrinks. The
    search starts from random masks and patterns drawn from ``generator`` (CPU). A pass is
    ``options.images // options.batch`` mini-batches of an endless stream of ``known``, shuffled
    again in each round; few images are used several times in a pass.
    """
    shape, device = known.images.shape[1:], known.images.device
    schedule = _PenaltySchedule(classes, options, device)
    masks = unbounded(torch.rand(classes, 1, *shape[1:], generator=generator), device)
    patterns = unbounded(torch.rand(classes, *shape, generator=generator), device)
    optimiser = torch.optim.Adam([masks, patterns], lr=options.lr, betas=(0.5, 0.9), eps=1e-7)
    best = Patches(
        bounded(masks).detach(),
        bounded(patterns).detach(),
        torch.zeros(classes, dtype=torch.bool, device=device),
        torch.full((classes,), float("inf"), device=device),
    )
    stream = _endless(len(known), options.batch, generator, device)
    for _ in range(options.steps):
        numbers = torch.nonzero(schedule.active)[:, 0]
        if not len(numbers):
            break
        costs = schedule.costs[numbers].float()
        successes, sizes, seen = torch.zeros_like(costs), torch.zeros_like(costs), 0
        count = max(1, options.images // options.batch)
        for rows in itertools.islice(stream, count):
            chosen = (bounded(masks[numbers]), bounded(patterns[numbers]))
            now = Candidates(network, numbers, *chosen, known.images[rows], known.labels[rows])
            loss, share = now.losses(now.stamped(), numbers[:, None].expand(-1, len(rows)))
            size = penalty(now)
            # The sum over the mini-batch, as in the code: a smaller last one has less weight.
            backward_step(optimiser, ((loss + costs * size) * len(rows)).sum())
            successes, sizes = successes + share * len(rows), sizes + size.detach()
            seen += len(rows)
        success = successes / seen
        last = replace(best, masks=bounded(masks).detach(), patterns=bounded(patterns).detach())
        best = _better(best, last, numbers, success >= options.success, sizes / count)
        schedule.update(numbers, success, best.penalties)
    return best


def _endless(
    count: int, size: int, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """An endless stream of mini-batches of row numbers below ``count``, reshuffled each round."""
    while True:
        yield from shuffled(count, size, generator, device)


def _better(
    best: Patches, last: Patches, numbers: Tensor, succeeded: Tensor, penalties: Tensor
) -> Patches:
    """``best``, with the ``last`` patch of each class where it succeeded and is smaller, or where
    none has succeeded yet."""
    improved = torch.zeros_like(best.found)
    improved[numbers] = succeeded & (penalties < best.penalties[numbers])
    replaced = improved.clone()
    replaced[numbers] |= ~best.found[numbers]
    lowest = best.penalties.clone()
    lowest[numbers] = torch.where(improved[numbers], penalties, lowest[numbers])
    pick = replaced.view(-1, 1, 1, 1)
    return Patches(
        torch.where(pick, last.masks, best.masks),
        torch.where(pick, last.patterns, best.patterns),
        best.found | improved,
        lowest,
    )


@final
class _PenaltySchedule:
    """The weight of each class's penalty, and which classes are still searched.

    The rules of Neural Cleanse's code (``visualizer.py``), in its order. A class is done when its
    weight has both risen and fallen and its best penalty has made no progress for
    ``early_stop_patience`` passes. A weight starts at 0 and is set once the patch has succeeded for
    ``patience`` passes, the last of which also counts towards the next rise. It is multiplied by
    ``factor`` after as many successes, and divided by ``factor ** 1.5`` after as many failures.
    """

    def __init__(self, classes: int, options: InversionOptions, device: torch.device) -> None:
        self._options = options
        # In float64, as in the code: it must not reach 0 after 200 divisions.
        self.costs = torch.zeros(classes, dtype=torch.float64, device=device)
        self.active = torch.ones(classes, dtype=torch.bool, device=device)
        self._starts, self._up, self._down = (torch.zeros(classes, device=device) for _ in range(3))
        self._went_up, self._went_down = (torch.zeros_like(self.active) for _ in range(2))
        self._passes_still = torch.zeros(classes, device=device)
        self._lowest = torch.full((classes,), float("inf"), device=device)

    def update(self, numbers: Tensor, success: Tensor, penalties: Tensor) -> None:
        """After a pass: ``success`` (A,) of the classes ``numbers``, best ``penalties`` (K,)."""
        chosen = torch.zeros_like(self.active)
        chosen[numbers] = True
        succeeded = torch.zeros_like(self.active)
        succeeded[numbers] = success >= self._options.success
        if self._options.early_stop:
            self._stop(penalties)
        self._change_costs(chosen & succeeded, chosen & ~succeeded)

    def _stop(self, penalties: Tensor) -> None:
        """End the search of classes without progress; the first penalty found is progress."""
        options = self._options
        same = penalties >= options.early_stop_threshold * self._lowest
        self._passes_still = (self._passes_still + 1) * (same & penalties.isfinite())
        self._lowest = torch.minimum(self._lowest, penalties)
        stopped = self._passes_still >= options.early_stop_patience
        self.active &= ~(self._went_up & self._went_down & stopped)

    def _change_costs(self, succeeded: Tensor, failed: Tensor) -> None:
        """New weights of the classes that ``succeeded`` in this pass and that ``failed``."""
        options = self._options
        self._starts = (self._starts + 1) * (succeeded & (self.costs == 0))
        ready = self._starts >= options.patience
        self.costs[ready] = options.cost
        for counter in (self._up, self._down):
            counter[ready] = 0
        for went in (self._went_up, self._went_down):
            went[ready] = False
        self._up, self._down = (self._up + 1) * succeeded, (self._down + 1) * failed
        rise, fall = self._up >= options.patience, self._down >= options.patience
        self.costs[rise] *= options.factor
        self.costs[fall] /= options.factor**1.5
        self._up[rise], self._down[fall] = 0, 0
        self._went_up |= rise
        self._went_down |= fall


def unbounded(values: Tensor, device: torch.device) -> Tensor:
    """Values in [0, 1] as an unbounded leaf tensor, by the inverse of ``bounded``."""
    free = torch.atanh((values.double() - 0.5) * (2 - _EDGE)).to(values.dtype)
    return free.to(device).requires_grad_()


def bounded(values: Tensor) -> Tensor:
    """Unbounded values mapped to [0, 1] by a tanh."""
    return values.tanh() / 2 + 0.5
