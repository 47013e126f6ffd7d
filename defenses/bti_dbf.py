"""BTI-DBF: what is left of an image's features when the benign ones are kept still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.networks import Network
from ..distill.training import in_pieces, predict
from ..distill.types import Batch
from .base import DefenderView, DefenseOptions, Inspection, Inspector
from .held_out import known_images, rows_in_their_place
from .maps import Halves, at_the_last_maps
from .trigger_inversion import bounded
from .tuning import follow, mini_batches
from .unet import UNet, seeded_unet


@final
class BtiDbfOptions(DefenseOptions):
    """The official code's."""

    mask_epochs: int = Field(20, ge=1, description="epochs that find the benign features")
    mask_lr: float = Field(0.01, gt=0, description="Adam's learning rate for them")
    drawing_epochs: int = Field(50, ge=1, description="epochs that teach the generator to copy")
    epochs: int = Field(30, ge=1, description="epochs in which it learns the trigger")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the generator")
    images: int = Field(2500, ge=2, description="known images used at most")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    width: int = Field(32, ge=4, multiple_of=4, description="channels of the U-Net's first level")
    levels: int = Field(2, ge=1, description="levels of the U-Net below the first")
    image_bound: float = Field(0.3, gt=0, description="mean squared change of pixels allowed")
    feature_bound: float = Field(3.0, gt=0, description="mean squared change of benign features")
    threshold: float = Field(0.5, gt=0, le=1, description="share of images in one class: alarm")


@final
class BtiDbf(Inspector):
    """BTI-DBF (Xu, Liu, Koffas, Yu, Picek, "Towards Reliable and Efficient Backdoor Trigger
    Inversion via Decoupling Benign Features", ICLR 2024).

    In words: find the mask of features that clean predictions rest on; train a generator that
    changes images so that these features stand still and the others move as far as they can. In a
    backdoored model that is the trigger: the changed images go to the target. A class's anomaly is
    the share of the other classes' images that are sent to it.

    Needs a hundred held-out images; with none it works on the received rows. Needs convolutions.

    Deviations: the paper knows that the model is backdoored and asks for the class, the code prints
    the most frequent answer and never none; here more than half of the images in one class is an
    alarm. The U-Net is smaller (two levels, group norm), and pixels are those of the images, not
    normalised ones.
    """

    name = "bti-dbf"
    Options = BtiDbfOptions
    needs = "held-out images (100), or else the received rows; convolutions"
    quick: ClassVar[Mapping[str, Any]] = {"width": 8, "images": 100, "batch": 25}

    def __init__(self, options: BtiDbfOptions) -> None:
        self.options: BtiDbfOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return None if at_the_last_maps(view.victim) else "needs a network with feature maps"

    def caution(self, view: DefenderView) -> str | None:
        return rows_in_their_place(view)

    def inspect(self, view: DefenderView) -> Inspection:
        known, generator = known_images(view), view.generator(self.name)
        order = torch.randperm(len(known), generator=generator)[: self.options.images]
        known = known.rows(order.to(known.labels.device))
        drawer = invert(view.victim, known, self.options, generator)
        answers = predict(view.victim, in_pieces(drawer, known.images))
        shares = torch.zeros(view.classes, dtype=torch.float64)
        for label in range(view.classes):
            others = answers[known.labels != label]
            shares[label] = (others == label).double().mean() if len(others) else 0.0
        highest = float(shares.max())
        return Inspection(statistic=highest, alarm=highest > self.options.threshold, anomaly=shares)


def invert(
    network: nn.Module, known: Batch, options: BtiDbfOptions, generator: torch.Generator
) -> UNet:
    """A generator that draws the trigger into images, in evaluation mode.

    ``generator`` (CPU) gives weights and orders.
    """
    halves = at_the_last_maps(network)
    assert halves is not None and isinstance(network, Network)
    mask = benign_features(network, halves, known, options, generator)
    drawer = seeded_unet(known.images.shape[1], options.width, options.levels, generator)
    drawer.to(known.images.device)
    optimiser = torch.optim.Adam(drawer.parameters(), lr=options.lr)
    count, device = len(known), known.images.device

    def features(images: Tensor) -> Tensor:
        found: Tensor = halves.maps(network.normalise(images))
        return found

    for epoch in range(options.drawing_epochs + options.epochs):
        for rows in mini_batches(count, options.batch, generator, device):
            clean = known.images[rows]
            drawn = drawer(clean)
            before, after = features(clean), features(drawn)
            change = functional.mse_loss(drawn, clean)
            if epoch < options.drawing_epochs:
                told = halves.rest(before).softmax(dim=1)
                answer = functional.cross_entropy(halves.rest(after), told)
                loss = answer + functional.mse_loss(after, before) + change
            else:
                benign = functional.mse_loss(mask * after, mask * before)
                other = functional.mse_loss((1 - mask) * after, (1 - mask) * before)
                within = change <= options.image_bound and benign <= options.feature_bound
                loss = 0.01 * benign - other if within else change
            follow(optimiser, loss)
    return drawer.eval().requires_grad_(False)


def benign_features(
    network: Network,
    halves: Halves,
    known: Batch,
    options: BtiDbfOptions,
    generator: torch.Generator,
) -> Tensor:
    """The mask ``(1, C, H, W)`` in [0, 1] of features that suffice for the true labels, and
    without which they can't be told."""
    with torch.no_grad():
        maps = in_pieces(lambda some: halves.maps(network.normalise(some)), known.images)
    start = torch.randn(1, *maps.shape[1:], generator=generator).to(maps.device)
    free = start.requires_grad_()
    optimiser = torch.optim.Adam([free], lr=options.mask_lr)
    for _ in range(options.mask_epochs):
        for rows in mini_batches(len(known), options.batch, generator, maps.device):
            mask = bounded(free)
            kept = functional.cross_entropy(halves.rest(mask * maps[rows]), known.labels[rows])
            left = functional.cross_entropy(
                halves.rest((1 - mask) * maps[rows]), known.labels[rows]
            )
            follow(optimiser, kept - left)
    return bounded(free).detach()
