"""BTI-DBF: what is left of an image's features when the benign ones are kept still."""

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
from ..common.held_out import known_images, rows_in_their_place
from ..common.maps import Halves, at_the_last_maps
from ..common.trigger_inversion import bounded
from ..common.tuning import drawn, follow
from ..common.unet import UNet, fitting_levels, seeded_unet

_COPIED = 0.1  # mean squared change below which a copy counts as one
_NEAR, _FAR = 0.01, 100.0  # weights of that change, below and above it
_BENIGN = 0.01  # weight of the benign features' change


@final
class BtiDbfOptions(DefenseOptions):
    """The official code's; an epoch there is 20 mini-batches (2,500 images, 5 % of CIFAR-10)."""

    mask_steps: int = Field(400, ge=1, description="steps that find the benign features (20 × 20)")
    mask_lr: float = Field(0.01, gt=0, description="Adam's learning rate for them")
    copy_steps: int = Field(
        1000, ge=1, description="steps that teach the generator to copy (50 × 20)"
    )
    steps: int = Field(600, ge=1, description="steps in which it learns the trigger (30 × 20)")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the generator")
    images: int = Field(2500, ge=2, description="known images used at most")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    width: int = Field(32, ge=1, description="channels of the U-Net's first level")
    levels: int = Field(4, ge=1, description="levels of the U-Net above the lowest, at most")
    image_bound: float = Field(
        0.3, gt=0, description="mean squared change of normalised pixels allowed"
    )
    feature_bound: float = Field(3.0, gt=0, description="mean squared change of benign features")
    noise: float = Field(
        0.03, ge=0, description="deviation of the noise on images when answers are counted"
    )


@final
class BtiDbf(Inspector):
    """BTI-DBF (Xu, Huang, Li, Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion
    via Decoupling Benign Features", ICLR 2024).

    In words: find the mask of features that clean predictions rest on; train a generator that
    changes images so that these features stay and the others move as far as they can. In a
    backdoored model that is the trigger: the changed images go to the target, which is the most
    frequent answer to them. A class's anomaly is its share of the answers.

    The paper takes a backdoored model for granted and asks for the target class. So does this
    defense: it names a class and has no alarm (``alarm`` is ``None``).

    Needs a hundred held-out images; with none it works on the received rows. Needs convolutions.

    As in the official code: everything happens in normalised space; batch norms are in training
    mode while the mask is learned, and keep the statistics of the clean images from there; images
    are augmented (as the set's recipe says), and noise is added to them when answers are counted.

    Deviations: images of fewer than 17 pixels get a U-Net of fewer levels; steps are counted in
    place of epochs; the second half of the paper (unlearning and purification) is left out.
    """

    name = "bti-dbf"
    Options = BtiDbfOptions
    needs = "held-out images (100), or else the received rows; convolutions"
    quick: ClassVar[Mapping[str, Any]] = {"width": 8, "batch": 32}

    def __init__(self, options: BtiDbfOptions) -> None:
        self.options: BtiDbfOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return None if at_the_last_maps(view.victim) else "needs a network with feature maps"

    def caution(self, view: DefenderView) -> str | None:
        return rows_in_their_place(view)

    def inspect(self, view: DefenderView) -> Inspection:
        options, generator = self.options, view.generator(self.name)
        known = known_images(view)
        order = torch.randperm(len(known), generator=generator)[: options.images]
        known = known.rows(order.to(known.labels.device))
        model = split(view.trainable_victim())
        supply = Supply(known, view.distilled.recipe, options.batch, generator)
        network = drawing_network(known, options, generator)
        copy_images(network, model, supply, options)
        mask = benign_features(model, supply, options)
        draw_trigger(network, model, mask, supply, options)
        answers = answered(network, model, supply, options.noise)
        shares = torch.bincount(answers, minlength=view.classes).double() / len(answers)
        return Inspection(statistic=float(shares.max()), alarm=None, anomaly=shares.cpu())


@final
@dataclass(frozen=True, eq=False)
class Model:
    """A network whose weights are fixed, and its halves: normalised images to the last feature
    maps, and these to logits."""

    network: Network
    halves: Halves

    def features(self, images: Tensor) -> Tensor:
        """The last feature maps ``(N, C, H, W)`` of normalised ``images``."""
        found: Tensor = self.halves.maps(images)
        return found

    def logits(self, features: Tensor) -> Tensor:
        """The logits that feature maps lead to."""
        found: Tensor = self.halves.rest(features)
        return found


def split(network: nn.Module) -> Model:
    """``network``, which may be changed, cut at its last feature maps."""
    halves = at_the_last_maps(network)
    assert halves is not None and isinstance(network, Network)
    return Model(network.requires_grad_(False), halves)


@final
@dataclass(frozen=True, eq=False)
class Supply:
    """Mini-batches of known images, augmented as ``recipe`` says; ``generator`` is on the CPU."""

    known: Batch
    recipe: Recipe
    batch: int
    generator: torch.Generator

    def draw(self, model: Model, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` mini-batches of images in normalised space, with their labels."""
        for rows in drawn(len(self.known), self.batch, steps, self.generator):
            yield self._prepared(model, rows), self.known.labels[rows]

    def once(self, model: Model) -> Iterator[Tensor]:
        """Every known image once, in normalised space."""
        for rows in torch.arange(len(self.known)).split(self.batch):
            yield self._prepared(model, rows)

    def _prepared(self, model: Model, rows: Tensor) -> Tensor:
        images = augmenter(self.recipe, self.generator)(self.known.images[rows])
        found: Tensor = model.network.normalise(images)
        return found


def drawing_network(known: Batch, options: BtiDbfOptions, generator: torch.Generator) -> UNet:
    """A fresh generator of images; ``generator`` (CPU) gives its weights."""
    channels, height, width = known.images.shape[1:]
    levels = fitting_levels(min(height, width), options.levels)
    return seeded_unet(channels, options.width, levels, generator).to(known.images.device)


def copy_images(network: UNet, model: Model, supply: Supply, options: BtiDbfOptions) -> None:
    """Train ``network`` to give images back as they are: in pixels, features and answers."""
    model.network.eval()
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    for images, _ in supply.draw(model, options.copy_steps):
        copies = network(images)
        follow(optimiser, copying_loss(model, images, copies))


def copying_loss(model: Model, images: Tensor, copies: Tensor) -> Tensor:
    """How far ``copies`` are from ``images``: the official code's sum.

    Its cross-entropy takes the softmax of the images' logits for logits, and that of the copies'
    for the wanted probabilities.
    """
    before, after = model.features(images), model.features(copies)
    given, wanted = (model.logits(some).softmax(dim=1) for some in (before, after))
    answer = functional.cross_entropy(given, wanted)
    change = functional.mse_loss(images, copies)
    weight = _FAR if change > _COPIED else _NEAR
    return answer + functional.mse_loss(before, after) + weight * change


def benign_features(model: Model, supply: Supply, options: BtiDbfOptions) -> Tensor:
    """The mask ``(1, C, H, W)`` in [0, 1] of features that suffice for the true labels, and
    without which they cannot be predicted.

    ``model`` is in training mode meanwhile, and its running statistics move.
    """
    first = supply.known.images[:1]
    model.network.eval()
    with torch.no_grad():
        shape = model.features(model.network.normalise(first)).shape
    free = torch.randn(shape, generator=supply.generator).to(first.device).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=options.mask_lr)
    model.network.train()
    for images, labels in supply.draw(model, options.mask_steps):
        with torch.no_grad():
            maps = model.features(images)
        mask = bounded(free)
        kept = functional.cross_entropy(model.logits(mask * maps), labels)
        left = functional.cross_entropy(model.logits((1 - mask) * maps), labels)
        follow(optimiser, kept - left)
    model.network.eval()
    return bounded(free).detach()


def draw_trigger(
    network: UNet, model: Model, mask: Tensor, supply: Supply, options: BtiDbfOptions
) -> None:
    """Train ``network`` to move all features but the benign ones, within the bounds."""
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    for images, _ in supply.draw(model, options.steps):
        follow(optimiser, trigger_loss(model, mask, images, network(images), options))


def trigger_loss(
    model: Model, mask: Tensor, images: Tensor, changed: Tensor, options: BtiDbfOptions
) -> Tensor:
    """What the generator goes down: the images' change where a bound is broken, else minus the
    other features' change and a hundredth of the benign ones'."""
    before, after = model.features(images), model.features(changed)
    change = functional.mse_loss(images, changed)
    benign = functional.mse_loss(mask * before, mask * after)
    if change > options.image_bound or benign > options.feature_bound:
        return change
    other = functional.mse_loss((1 - mask) * before, (1 - mask) * after)
    return _BENIGN * benign - other


@torch.no_grad()
def answered(network: UNet, model: Model, supply: Supply, noise: float) -> Tensor:
    """The classes that the model gives the known images, noisy and changed, ``int64 (N,)``."""
    network.eval()
    found = []
    for images in supply.once(model):
        blurred = torch.randn(images.shape, generator=supply.generator).to(images.device)
        changed = network(images + noise * blurred)
        found.append(model.logits(model.features(changed)).argmax(dim=1))
    return torch.cat(found)
