"""For every class the smallest patch that sends any image there: the search that several share.

All classes are searched at once, as one batch; each has its own weight on the patch's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.types import Batch
from .base import DefenseOptions
from .tuning import follow, mini_batches

_EDGE = 1e-4  # keeps masks and patterns off 0 and 1, where the inverse of tanh is infinite


class InversionOptions(DefenseOptions):
    """Neural Cleanse's (its code's; the paper names the same where it names any)."""

    steps: int = Field(1000, ge=1, description="passes over the known images at most")
    images: int = Field(1000, ge=2, description="known images used at most")
    batch: int = Field(32, ge=2, description="images in a mini-batch")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate")
    success: float = Field(0.99, gt=0, le=1, description="share of images that a patch must send")
    cost: float = Field(1e-3, gt=0, description="first weight of the patch's size")
    patience: int = Field(5, ge=1, description="passes of one kind before the weight changes")
    factor: float = Field(2.0, gt=1, description="what the weight is multiplied by")


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
    shrinks. The search begins at random masks and patterns from ``generator`` (CPU).
    """
    shape, device = known.images.shape[1:], known.images.device
    search = _Search(classes, options, device)
    masks = unbounded(torch.rand(classes, 1, *shape[1:], generator=generator), device)
    patterns = unbounded(torch.rand(classes, *shape, generator=generator), device)
    optimiser = torch.optim.Adam([masks, patterns], lr=options.lr, betas=(0.5, 0.9))
    best = Patches(
        bounded(masks).detach(),
        bounded(patterns).detach(),
        torch.zeros(classes, dtype=torch.bool, device=device),
        torch.full((classes,), float("inf"), device=device),
    )
    count = min(options.images, len(known))
    chosen = torch.randperm(len(known), generator=generator)[:count].to(device)
    for _ in range(options.steps):
        numbers = torch.nonzero(search.active)[:, 0]
        if not len(numbers):
            break
        totals = torch.zeros(2, len(numbers), device=device)
        pieces = mini_batches(count, options.batch, generator, device)
        for rows in pieces:
            draft = Draft(
                network,
                numbers,
                bounded(masks[numbers]),
                bounded(patterns[numbers]),
                known.images[chosen[rows]],
                known.labels[chosen[rows]],
            )
            wanted = numbers[:, None].expand(-1, len(rows))
            loss, right = draft.losses(draft.stamped(), wanted)
            small = penalty(draft)
            follow(optimiser, (loss + search.costs[numbers] * small).sum())
            totals += torch.stack([right, small.detach()])
        success, small = totals / len(pieces)
        now = Patches(
            bounded(masks).detach(), bounded(patterns).detach(), best.found, best.penalties
        )
        best = _better(best, now, numbers, success >= options.success, small)
        search.judge(numbers, success, best.penalties)
    return best


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

    The rules of Neural Cleanse's code: a weight starts at 0, is set once the patch has succeeded
    for some passes, doubles after as many more, and is divided by 2^1.5 after as many failures. A
    class is done when its weight has gone both ways and its best penalty hasn't shrunk by a
    hundredth for twice as many passes.
    """

    def __init__(self, classes: int, options: InversionOptions, device: torch.device) -> None:
        self._options = options
        self.costs = torch.zeros(classes, device=device)
        self.active = torch.ones(classes, dtype=torch.bool, device=device)
        self._set, self._up, self._down = (torch.zeros(classes, device=device) for _ in range(3))
        self._went_up, self._went_down = (torch.zeros_like(self.active) for _ in range(2))
        self._still = torch.zeros(classes, device=device)
        self._least = torch.full((classes,), float("inf"), device=device)

    def judge(self, numbers: Tensor, success: Tensor, penalties: Tensor) -> None:
        """After a pass: ``success`` (A,) of the classes ``numbers``, best ``penalties`` (K,)."""
        options = self._options
        chosen = torch.zeros_like(self.active)
        chosen[numbers] = True
        held = torch.zeros_like(self.active)
        held[numbers] = success >= options.success
        # Done?
        known = penalties.isfinite()
        same = known & (penalties >= 0.99 * self._least)
        self._still = torch.where(same, self._still + 1, torch.zeros_like(self._still))
        self._least = torch.minimum(self._least, penalties)
        self.active &= ~(self._went_up & self._went_down & (self._still >= 2 * options.patience))
        # The weights.
        unset = chosen & (self.costs == 0)
        self._set = torch.where(unset & held, self._set + 1, torch.zeros_like(self._set))
        ready = unset & (self._set >= options.patience)
        self._up = torch.where(chosen & held & ~unset, self._up + 1, torch.zeros_like(self._up))
        self._down = torch.where(
            chosen & ~held & ~unset, self._down + 1, torch.zeros_like(self._down)
        )
        rise, fall = self._up >= options.patience, self._down >= options.patience
        self.costs = torch.where(ready, torch.full_like(self.costs, options.cost), self.costs)
        self.costs = torch.where(rise, self.costs * options.factor, self.costs)
        self.costs = torch.where(fall, self.costs / options.factor**1.5, self.costs)
        self._up[rise], self._down[fall] = 0, 0
        self._went_up |= rise
        self._went_down |= fall


def unbounded(values: Tensor, device: torch.device) -> Tensor:
    """Values in [0, 1] as a leaf without bounds."""
    return torch.atanh((values.clamp(_EDGE, 1 - _EDGE) - 0.5) * 2).to(device).requires_grad_()


def bounded(values: Tensor) -> Tensor:
    """What ``unbounded`` made, back in [0, 1]."""
    return values.tanh() / 2 + 0.5
