"""Joint trigger inversion: for each class, the smallest patch that fools several victims at once.

A patch that one network's own weaknesses allow seldom fools another one. What the set taught all of
its victims does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...defenses.common.by_class import median
from ...defenses.common.trigger_inversion import stamped
from ...distill.training import predict
from ...distill.types import Batch, hard_labels

CARRIERS: Final = 24
"""Images that each class's patch is tried on in a step."""

_RATE = 0.1
_FOOLED = 0.75
_FIRST_WEIGHT, _RISE, _FALL = 0.01, 1.1, 1.2
_START = -1.0  # of the masks before the sigmoid: 0.27
_AVERAGED = 0.25


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class JointPatches:
    """A patch for each class: ``(1 − mask) · image + mask · pattern``.

    masks ``(K, 1, H, W)`` and patterns ``(K, C, H, W)`` in [0, 1]: the last ones that fooled all
    networks, or where none did, those that the search ended with. sizes ``(K,)``: the masks' sums,
    averaged over the last quarter of the steps.
    """

    masks: Tensor
    patterns: Tensor
    sizes: Tensor

    def stamp(self, images: Tensor, label: int) -> Tensor:
        """``images`` with the patch of class ``label``."""
        return stamped(images, self.masks[label], self.patterns[label])


def joint_patches(
    networks: Sequence[nn.Module],
    carriers: Batch,
    classes: int,
    steps: int,
    generator: torch.Generator,
) -> JointPatches:
    """For each class a small patch with which all ``networks`` answer it, by ``steps`` of Adam.

    The loss is the networks' mean cross-entropy on ``CARRIERS`` images of other classes, plus a
    weight times the mask's sum. A class's weight rises while each network is fooled on 75 % of
    these images, and falls otherwise, so that the sizes of all classes belong to one success rate.
    carriers: images with their labels, of two classes or more. generator (CPU): draws the carriers
    and the first patterns. The networks' weights must not need gradients.
    """
    shape, device = carriers.images.shape[1:], carriers.images.device
    labels, own = torch.arange(classes, device=device), hard_labels(carriers.labels)
    masks = torch.full((classes, 1, *shape[1:]), _START, device=device).requires_grad_()
    patterns = torch.randn(classes, *shape, generator=generator).to(device).requires_grad_()
    optimiser = torch.optim.Adam([masks, patterns], lr=_RATE)
    weights = torch.full((classes,), _FIRST_WEIGHT, device=device)
    sizes, averaged = torch.zeros(classes, device=device), max(1, round(_AVERAGED * steps))
    kept = masks.detach().sigmoid(), patterns.detach().sigmoid()
    never = torch.ones(classes, dtype=torch.bool, device=device)
    for step in range(steps):
        images = carriers.images[_other_rows(own, classes, generator)]
        mask, pattern = masks.sigmoid(), patterns.sigmoid()
        patched = stamped(images, mask[:, None], pattern[:, None])
        loss, fooled = _answers(networks, patched, labels)
        size = mask.flatten(1).sum(dim=1)
        optimiser.zero_grad()
        (loss + weights * size).sum().backward()
        optimiser.step()
        success = fooled >= _FOOLED
        weights = torch.where(success, weights * _RISE, weights / _FALL)
        never &= ~success
        chosen = (success | never).view(-1, 1, 1, 1)
        kept = (
            torch.where(chosen, mask.detach(), kept[0]),
            torch.where(chosen, pattern.detach(), kept[1]),
        )
        if step >= steps - averaged:
            sizes += size.detach() / averaged
    return JointPatches(masks=kept[0], patterns=kept[1], sizes=sizes)


def _other_rows(own: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """For each class the numbers of up to ``CARRIERS`` random rows of other classes, ``(K, n)``."""
    lots = torch.rand(classes, len(own), generator=generator).to(own.device)
    lots[own == torch.arange(classes, device=own.device)[:, None]] = -1.0
    fewest = int((lots >= 0).sum(dim=1).min())
    return lots.topk(min(CARRIERS, fewest), dim=1).indices


def _answers(
    networks: Sequence[nn.Module], images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the networks, and the share of images that fool the least fooled
    one, each ``(K,)``; images ``(K, n, C, H, W)``, labels ``(K,)``."""
    wanted = labels[:, None].expand(images.shape[:2]).flatten()
    losses, shares = [], []
    for network in networks:
        logits = network(images.flatten(0, 1))
        loss = functional.cross_entropy(logits, wanted, reduction="none")
        losses.append(loss.view(images.shape[:2]).mean(dim=1))
        right = (logits.argmax(dim=1) == wanted).view(images.shape[:2])
        shares.append(right.float().mean(dim=1))
    return torch.stack(losses).mean(dim=0), torch.stack(shares).amin(dim=0)


def hit_rates(network: nn.Module, patches: JointPatches, carriers: Batch, classes: int) -> Tensor:
    """The share of carriers of other classes that ``network`` gives to each class when they carry
    its patch, ``(K,)``."""
    own = hard_labels(carriers.labels)
    found = []
    for label in range(classes):
        others = carriers.images[own != label]
        answers = predict(network, patches.stamp(others, label))
        found.append((answers == label).double().mean())
    return torch.stack(found)


def smallness(sizes: Tensor) -> Tensor:
    """How much smaller each class's patch is than the median class's: the logarithm of the ratio,
    ``(K,)``; 0.7 is half the size."""
    return (median(sizes) / sizes.clamp(min=1e-6)).log()
