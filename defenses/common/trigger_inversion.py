"""For every class the smallest patch that sends any image there: the search that several share.

All classes are searched at once, as one batch; each has its own weight on the patch's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.training import shuffled
from ...distill.types import Batch
from ..base import DefenseOptions
from .tuning import follow

_EDGE = 1e-7  # Keras's: keeps 0 and 1 off the ends, where the inverse of tanh is infinite


class InversionOptions(DefenseOptions):
    """Neural Cleanse's: those of its published experiment (``gtsrb_visualize_example.py``).

    Its 1,000 samples in mini-batches of 32 are 31 mini-batches a pass, 992 images.
    """

    steps: int = Field(1000, ge=1, description="passes at most")
    images: int = Field(1000, ge=2, description="images in a pass, rounded down to mini-batches")
    batch: int = Field(32, ge=2, description="images in a mini-batch")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate")
    success: float = Field(0.99, gt=0, le=1, description="share of images that a patch must send")
    cost: float = Field(1e-3, gt=0, description="first weight of the patch's size")
    patience: int = Field(5, ge=1, description="passes of one kind before the weight changes")
    factor: float = Field(2.0, gt=1, description="what the weight is multiplied by")
    early_stop: bool = Field(True, description="whether a class may end before the last pass")
    early_stop_threshold: float = Field(
        1.0, gt=0, le=1, description="a best size below this share of the best before is progress"
    )
    early_stop_patience: int = Field(
        25, ge=1, description="passes without progress that end a class's search"
    )


@final
@dataclass(frozen=True, eq=False)
class Patches:
    """A patch for each class: ``(1 − mask) · image + mask · pattern``.

    masks ``(K, 1, H, W)`` and patterns ``(K, C, H, W)`` in [0, 1]; found: ``bool (K,)``, whether
    the class has a patch that sends enough images there (else what the search ended with);
    penalties ``(K,)``: what was to be small.
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
class Draft:
    """Patches in the making, of the classes that are still searched.

    numbers ``(A,)``: these classes. masks ``(A, 1, H, W)``, patterns ``(A, C, H, W)``; images,
    labels: the mini-batch that they are tried on.
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
        """Mean cross-entropy and accuracy, ``(A,)`` both, of images ``(A, N, C, H, W)`` and labels
        ``(A, N)``."""
        logits = self.network(images.flatten(0, 1))
        loss = functional.cross_entropy(logits, labels.flatten(), reduction="none")
        right = (logits.argmax(dim=1) == labels.flatten()).float()
        return loss.view(labels.shape).mean(dim=1), right.view(labels.shape).mean(dim=1)


Penalty = Callable[[Draft], Tensor]
"""What is to be small about each patch of a draft, ``(A,)``."""


def mask_size(draft: Draft) -> Tensor:
    """The L1 norm of the mask: Neural Cleanse's penalty."""
    return draft.masks.flatten(1).sum(dim=1)


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
    """The smallest patch for each class that sends ``options.success`` of the images there.

    Adam on mask and pattern through a tanh; the weight of ``penalty`` doubles while a patch
    succeeds and falls faster while it doesn't, and a class is done when its best patch no longer
    shrinks. The search begins at random masks and patterns from ``generator`` (CPU). A pass is
    ``options.images // options.batch`` mini-batches of an endless stream of ``known``, shuffled
    anew each time it is used up; few images come several times in a pass.
    """
    shape, device = known.images.shape[1:], known.images.device
    search = _Search(classes, options, device)
    masks = unbounded(torch.rand(classes, 1, *shape[1:], generator=generator), device)
    patterns = unbounded(torch.rand(classes, *shape, generator=generator), device)
    optimiser = torch.optim.Adam([masks, patterns], lr=options.lr, betas=(0.5, 0.9), eps=1e-7)
    best = Patches(
        bounded(masks).detach(),
        bounded(patterns).detach(),
        torch.zeros(classes, dtype=torch.bool, device=device),
        torch.full((classes,), float("inf"), device=device),
    )
    pieces = _endless(len(known), options.batch, generator, device)
    for _ in range(options.steps):
        numbers = torch.nonzero(search.active)[:, 0]
        if not len(numbers):
            break
        costs = search.costs[numbers].float()
        right, small, seen = torch.zeros_like(costs), torch.zeros_like(costs), 0
        many = max(1, options.images // options.batch)
        for rows in itertools.islice(pieces, many):
            draft = Draft(
                network,
                numbers,
                bounded(masks[numbers]),
                bounded(patterns[numbers]),
                known.images[rows],
                known.labels[rows],
            )
            loss, share = draft.losses(draft.stamped(), numbers[:, None].expand(-1, len(rows)))
            size = penalty(draft)
            # The sum over the mini-batch, as the code has it: a last smaller one weighs less.
            follow(optimiser, ((loss + costs * size) * len(rows)).sum())
            right, small, seen = right + share * len(rows), small + size.detach(), seen + len(rows)
        now = Patches(
            bounded(masks).detach(), bounded(patterns).detach(), best.found, best.penalties
        )
        success = right / seen
        best = _better(best, now, numbers, success >= options.success, small / many)
        search.judge(numbers, success, best.penalties)
    return best


def _endless(
    count: int, size: int, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Mini-batches of row numbers below ``count`` without end, every round in a new order."""
    while True:
        yield from shuffled(count, size, generator, device)


def _better(best: Patches, now: Patches, numbers: Tensor, held: Tensor, small: Tensor) -> Patches:
    """``best`` with those classes' patches that succeed and are smaller, or that never did."""
    improved = torch.zeros_like(best.found)
    improved[numbers] = held & (small < best.penalties[numbers])
    latest = improved.clone()
    latest[numbers] |= ~best.found[numbers]
    penalties = best.penalties.clone()
    penalties[numbers] = torch.where(improved[numbers], small, penalties[numbers])
    pick = latest.view(-1, 1, 1, 1)
    return Patches(
        torch.where(pick, now.masks, best.masks),
        torch.where(pick, now.patterns, best.patterns),
        best.found | improved,
        penalties,
    )


@final
class _Search:
    """The weight of each class's penalty, and which classes are still searched.

    The rules of Neural Cleanse's code (``visualizer.py``), in its order. A class is done when its
    weight has gone both ways and its best penalty has made no progress for
    ``early_stop_patience`` passes. A weight starts at 0 and is set once the patch has succeeded
    for ``patience`` passes, the last of which also counts as the first of the next rise; it is
    multiplied by ``factor`` after as many successes, and divided by ``factor ** 1.5`` after as
    many failures.
    """

    def __init__(self, classes: int, options: InversionOptions, device: torch.device) -> None:
        self._options = options
        # In float64, as in the code: 200 divisions in a row must not end at 0.
        self.costs = torch.zeros(classes, dtype=torch.float64, device=device)
        self.active = torch.ones(classes, dtype=torch.bool, device=device)
        self._set, self._up, self._down = (torch.zeros(classes, device=device) for _ in range(3))
        self._went_up, self._went_down = (torch.zeros_like(self.active) for _ in range(2))
        self._still = torch.zeros(classes, device=device)
        self._least = torch.full((classes,), float("inf"), device=device)

    def judge(self, numbers: Tensor, success: Tensor, penalties: Tensor) -> None:
        """After a pass: ``success`` (A,) of the classes ``numbers``, best ``penalties`` (K,)."""
        chosen = torch.zeros_like(self.active)
        chosen[numbers] = True
        held = torch.zeros_like(self.active)
        held[numbers] = success >= self._options.success
        if self._options.early_stop:
            self._stop(penalties)
        self._weigh(chosen & held, chosen & ~held)

    def _stop(self, penalties: Tensor) -> None:
        """End the classes whose best penalty has stood still; the first one found is progress."""
        options = self._options
        same = penalties >= options.early_stop_threshold * self._least
        self._still = (self._still + 1) * (same & penalties.isfinite())
        self._least = torch.minimum(self._least, penalties)
        still = self._still >= options.early_stop_patience
        self.active &= ~(self._went_up & self._went_down & still)

    def _weigh(self, held: Tensor, failed: Tensor) -> None:
        """New weights, of classes that ``held`` in this pass, and of those that ``failed``."""
        options = self._options
        self._set = (self._set + 1) * (held & (self.costs == 0))
        ready = self._set >= options.patience
        self.costs[ready] = options.cost
        for counter in (self._up, self._down):
            counter[ready] = 0
        for went in (self._went_up, self._went_down):
            went[ready] = False
        self._up, self._down = (self._up + 1) * held, (self._down + 1) * failed
        rise, fall = self._up >= options.patience, self._down >= options.patience
        self.costs[rise] *= options.factor
        self.costs[fall] /= options.factor**1.5
        self._up[rise], self._down[fall] = 0, 0
        self._went_up |= rise
        self._went_down |= fall


def unbounded(values: Tensor, device: torch.device) -> Tensor:
    """Values in [0, 1] as a leaf without bounds."""
    free = torch.atanh((values.double() - 0.5) * (2 - _EDGE)).to(values.dtype)
    return free.to(device).requires_grad_()


def bounded(values: Tensor) -> Tensor:
    """What ``unbounded`` made, back in [0, 1]."""
    return values.tanh() / 2 + 0.5
