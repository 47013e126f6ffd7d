"""The defense ``bti-dbf``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.networks.registry import Network
from ...distill.training import augmenter
from ...distill.types import Batch, Recipe
from ..base import DefenderView, DefenseOptions, Inspection, Inspector
from ..common.held_out import known_images, known_images_caution
from ..common.maps import SplitAtMaps, split_at_last_maps
from ..common.sgd import backward_step, mini_batches_for_steps
from ..common.trigger_inversion import bounded
from ..common.unet import UNet, fitting_levels, seeded_unet

_COPIED = 0.1  # mean squared difference up to which a copy is close enough
_NEAR, _FAR = 0.01, 100.0  # weights of that difference, below and above it
_BENIGN = 0.01  # weight of the benign features' change


@final
class BtiDbfOptions(DefenseOptions):
    """The official code's; an epoch there is 20 mini-batches (2,500 images, 5 % of CIFAR-10)."""

    mask_steps: int = Field(400, ge=1, description="steps that find the benign features (20 × 20)")
    mask_lr: float = Field(0.01, gt=0, description="Adam's learning rate for them")
    copy_steps: int = Field(
        1000, ge=1, description="steps in which the generator learns to copy (50 × 20)"
    )
    steps: int = Field(600, ge=1, description="steps in which it learns the trigger (30 × 20)")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the generator")
    images: int = Field(2500, ge=2, description="largest number of images used")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    width: int = Field(32, ge=1, description="channels of the U-Net's first level")
    levels: int = Field(
        4, ge=1, description="largest number of the U-Net's levels above the lowest"
    )
    image_bound: float = Field(
        0.3, gt=0, description="largest mean squared change of normalised pixels"
    )
    feature_bound: float = Field(
        3.0, gt=0, description="largest mean squared change of benign features"
    )
    noise: float = Field(
        0.03, ge=0, description="standard deviation of the noise when predictions are counted"
    )


@final
class BtiDbf(Inspector):
    """BTI-DBF: a trigger changes an image's features, but not those that are benign (Xu, Huang, Li,
    Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling Benign
    Features", ICLR 2024).

    In words: learn a mask of the features that clean predictions depend on. Train a generator that
    changes images so that these features stay and the others change as much as possible. In a
    backdoored model that is the trigger: most changed images are classified as the target. A
    class's anomaly is its share of the predictions.

    The paper assumes a backdoored model and searches its target class. So does this defense: it
    names a class and has no alarm (``alarm`` is ``None``).

    Needs a hundred held-out images; without any it uses the received rows. Needs convolutions.

    As in the official code: everything is in normalised space; batch norms are in training mode
    while the mask is learned, and keep the statistics of the clean images from there; images are
    augmented (by the set's recipe), and noise is added when predictions are counted.

    Deviations: images of fewer than 17 pixels get a U-Net of fewer levels; steps are counted
    instead of epochs; the second half of the paper (unlearning and purification) is left out.
    """

    name = "bti-dbf"
    Options = BtiDbfOptions
    options: BtiDbfOptions
    needs = "100 held-out images (without any: the received rows), convolutions"
    quick: ClassVar[Mapping[str, Any]] = {"width": 8, "batch": 32}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return None if split_at_last_maps(view.victim) else "needs a network with feature maps"

    def caution(self, view: DefenderView) -> str | None:
        return known_images_caution(view)

    def inspect(self, view: DefenderView) -> Inspection:
        options, generator = self.options, view.generator(self.name)
        known = known_images(view)
        order = torch.randperm(len(known), generator=generator)[: options.images]
        known = known.rows(order.to(known.labels.device))
        victim = split_victim(view.trainable_victim())
        batches = KnownBatches(known, view.distilled.recipe, options.batch, generator)
        network = image_generator(known, options, generator)
        learn_to_copy(network, victim, batches, options)
        mask = benign_features(victim, batches, options)
        learn_trigger(network, victim, mask, batches, options)
        predicted = predictions(network, victim, batches, options.noise)
        shares = torch.bincount(predicted, minlength=view.classes).double() / len(predicted)
        return Inspection(statistic=float(shares.max()), alarm=None, anomaly=shares.cpu())


@final
@dataclass(frozen=True, eq=False)
class SplitVictim:
    """A network with fixed weights, split at its last feature maps."""

    network: Network
    parts: SplitAtMaps

    def features(self, images: Tensor) -> Tensor:
        """The last feature maps ``(N, C, H, W)`` of normalised ``images``."""
        found: Tensor = self.parts.maps(images)
        return found

    def logits(self, features: Tensor) -> Tensor:
        """The logits of feature maps."""
        found: Tensor = self.parts.rest(features)
        return found


def split_victim(network: nn.Module) -> SplitVictim:
    """``network``, which is frozen in place, split at its last feature maps."""
    parts = split_at_last_maps(network)
    assert parts is not None and isinstance(network, Network)
    return SplitVictim(network.requires_grad_(False), parts)


@final
@dataclass(frozen=True, eq=False)
class KnownBatches:
    """Mini-batches of known images, augmented by ``recipe``; ``generator`` is on the CPU."""

    known: Batch
    recipe: Recipe
    batch: int
    generator: torch.Generator

    def draw(self, victim: SplitVictim, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` mini-batches of images in normalised space, with their labels."""
        for rows in mini_batches_for_steps(len(self.known), self.batch, steps, self.generator):
            yield self._prepared(victim, rows), self.known.labels[rows]

    def once(self, victim: SplitVictim) -> Iterator[Tensor]:
        """Every known image once, in normalised space."""
        for rows in torch.arange(len(self.known)).split(self.batch):
            yield self._prepared(victim, rows)

    def _prepared(self, victim: SplitVictim, rows: Tensor) -> Tensor:
        images = augmenter(self.recipe, self.generator)(self.known.images[rows])
        found: Tensor = victim.network.normalise(images)
        return found


def image_generator(known: Batch, options: BtiDbfOptions, generator: torch.Generator) -> UNet:
    """An untrained image generator; its weights are drawn from ``generator`` (CPU)."""
    channels, height, width = known.images.shape[1:]
    levels = fitting_levels(min(height, width), options.levels)
    return seeded_unet(channels, options.width, levels, generator).to(known.images.device)


def learn_to_copy(
    network: UNet, victim: SplitVictim, batches: KnownBatches, options: BtiDbfOptions
) -> None:
    """Train ``network`` to output its input: the same pixels, features and predictions."""
    victim.network.eval()
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    for images, _ in batches.draw(victim, options.copy_steps):
        backward_step(optimiser, copying_loss(victim, images, network(images)))


def copying_loss(victim: SplitVictim, images: Tensor, copies: Tensor) -> Tensor:
    """The official code's distance of ``copies`` from ``images``.

    Its cross-entropy takes the softmax of the images' logits as logits, and that of the copies' as
    target probabilities.
    """
    before, after = victim.features(images), victim.features(copies)
    logits, targets = (victim.logits(some).softmax(dim=1) for some in (before, after))
    predictions = functional.cross_entropy(logits, targets)
    change = functional.mse_loss(images, copies)
    weight = _FAR if change > _COPIED else _NEAR
    return predictions + functional.mse_loss(before, after) + weight * change


def benign_features(victim: SplitVictim, batches: KnownBatches, options: BtiDbfOptions) -> Tensor:
    """The mask ``(1, C, H, W)`` in [0, 1] of the features from which the true labels can be
    predicted, and without which they cannot.

    ``victim`` is in training mode meanwhile, and its running statistics change.
    """
    first = batches.known.images[:1]
    victim.network.eval()
    with torch.no_grad():
        shape = victim.features(victim.network.normalise(first)).shape
    free = torch.randn(shape, generator=batches.generator).to(first.device).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=options.mask_lr)
    victim.network.train()
    for images, labels in batches.draw(victim, options.mask_steps):
        with torch.no_grad():
            maps = victim.features(images)
        mask = bounded(free)
        benign = functional.cross_entropy(victim.logits(mask * maps), labels)
        others = functional.cross_entropy(victim.logits((1 - mask) * maps), labels)
        backward_step(optimiser, benign - others)
    victim.network.eval()
    return bounded(free).detach()


def learn_trigger(
    network: UNet, victim: SplitVictim, mask: Tensor, batches: KnownBatches, options: BtiDbfOptions
) -> None:
    """Train ``network`` to change all features but the benign ones, within the bounds."""
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    for images, _ in batches.draw(victim, options.steps):
        backward_step(optimiser, trigger_loss(victim, mask, images, network(images), options))


def trigger_loss(
    victim: SplitVictim, mask: Tensor, images: Tensor, changed: Tensor, options: BtiDbfOptions
) -> Tensor:
    """The generator's loss: the change of the images if a bound is exceeded, otherwise a hundredth
    of the change of the benign features minus that of the others."""
    before, after = victim.features(images), victim.features(changed)
    change = functional.mse_loss(images, changed)
    benign = functional.mse_loss(mask * before, mask * after)
    if change > options.image_bound or benign > options.feature_bound:
        return change
    other = functional.mse_loss((1 - mask) * before, (1 - mask) * after)
    return _BENIGN * benign - other


@torch.no_grad()
def predictions(network: UNet, victim: SplitVictim, batches: KnownBatches, noise: float) -> Tensor:
    """The victim's classes for the known images after noise and generator, ``int64 (N,)``."""
    network.eval()
    found = []
    for images in batches.once(victim):
        normal = torch.randn(images.shape, generator=batches.generator).to(images.device)
        changed = network(images + noise * normal)
        found.append(victim.logits(victim.features(changed)).argmax(dim=1))
    return torch.cat(found)
