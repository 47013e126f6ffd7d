"""Distribution matching: ``dm``, the cheapest backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..augment import Augmentation, Transform, parse_strategy
from ..batch_norm import batch_norm_layers
from ..core.backend import Backend, BackendOptions
from ..core.run import Run
from ..core.task import Start
from ..engine import StaticNetwork
from ..networks.makers import embed
from ..slopes import micro_batch
from ..training import in_full_pieces
from ..types import Batch, Recipe
from .matching import attached, mean_distance


class DistributionMatchingOptions(BackendOptions):
    """Options of ``dm``; the defaults are the published ones."""

    iterations: int = Field(20_000, ge=1, description="outer iterations, one step each")
    init: Start = "real"
    lr_img: float = Field(
        1.0, gt=0, description="learning rate of the synthetic images (published: 10 from IPC 100)"
    )
    momentum_img: float = Field(0.5, ge=0, lt=1, description="momentum of the synthetic images")
    batch_real: int = Field(256, ge=1, description="real images per class and step")
    augment: str = Field(
        "color_crop_cutout_flip_scale_rotate",
        description="siamese operations, joined by _; flip is dropped where it changes the label",
    )


@final
class DM(Backend):
    """Dataset Condensation with Distribution Matching (Zhao, Bilen; WACV 2023).

    In words: a fresh random network, never trained; for each class, put a batch of real images and
    the synthetic ones through one and the same random transform and embed both; move the synthetic
    images so that the two mean embeddings come closer (squared distance, summed over features and
    classes); repeat with another network.

    Defaults: the official code's (SGD 1.0 with momentum 0.5, 20,000 iterations, 256 real images a
    class, real start). With batch norm all classes are embedded together, as there, so that its
    statistics are those of a whole batch. Deviations: classes smaller than a batch give all
    their rows; the real batch is embedded in pieces unless batch norm needs it whole; the iteration
    after the last evaluation is not run (the code runs 20,001).
    """

    name = "dm"
    Options = DistributionMatchingOptions
    cost = "low: first-order gradients, no network is trained; the one for quick looks"
    needs = "a network with features (embed)"
    victim_epochs = 1000
    victim_augment = "color_crop_cutout_flip_scale_rotate"

    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        assert isinstance(options, DistributionMatchingOptions)
        self._options = options
        self._augmentation = Augmentation(parse_strategy(options.augment), recipe.preprocessing)

    def steps(self) -> int:
        return 1

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        options = self._options
        return torch.optim.SGD([leaf], lr=options.lr_img, momentum=options.momentum_img)

    def network(self, run: Run) -> nn.Module:
        return run.task.fresh_network(run.position.iteration, 0).requires_grad_(False)

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        pairs = self._pairs(run, synthetic)
        static = run.task.engine.static(network)
        if static is not None and not batch_norm_layers(network):
            yield _at_once(static, list(pairs))
            return
        if batch_norm_layers(network):
            yield _together(network, list(pairs))
            return
        size = micro_batch(synthetic.images.device)
        for real, fake in pairs:
            with torch.no_grad():
                pieces = [embed(network, piece) for piece in real.split(size)]
            yield mean_distance(embed(network, fake), torch.cat(pieces))

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        """Do nothing: the networks of ``dm`` are random and never trained."""

    def _pairs(self, run: Run, synthetic: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Class by class, real and synthetic images after one and the same transform."""
        draws, augments = run.position.generator("draw"), run.position.generator("augment")
        for label in range(run.task.classes):
            real = run.real.draw(label, self._options.batch_real, draws).images
            fake = synthetic.images[run.synthetic.rows_of(label)]
            same: Transform = self._augmentation.draw(real.shape, augments, shared=True)
            yield same(real), same(fake)


def _together(network: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The distances of all classes, each side embedded as one batch."""
    real, fake = ([pair[side] for pair in pairs] for side in (0, 1))
    with torch.no_grad():
        targets = embed(network, torch.cat(real)).split([len(images) for images in real])
    embedded = embed(network, torch.cat(fake)).split([len(images) for images in fake])
    return torch.stack([mean_distance(*each) for each in zip(embedded, targets, strict=True)]).sum()


def _at_once(static: StaticNetwork, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The distances of all classes, summed, from one captured pass for each side."""
    real, fake = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    sizes = tuple((len(real), len(fake)) for real, fake in pairs)
    matched = static.captured(("means", sizes), partial(_match_means, static, sizes))
    value, slope = matched(real, fake)
    return attached(value, fake, slope)


def _match_means(
    static: StaticNetwork, sizes: Sequence[tuple[int, int]], real: Tensor, fake: Tensor
) -> tuple[Tensor, ...]:
    """The summed distance of all classes, and its gradient on the synthetic images ``fake``.

    The images lie class by class; sizes: how many real and synthetic ones each class has.
    """
    reals, fakes = ([pair[side] for pair in sizes] for side in (0, 1))
    targets = in_full_pieces(static.embed, real).split(reals)
    seen = fake.detach().requires_grad_()
    embedded = static.embed(seen).split(fakes)
    distances = [mean_distance(*each) for each in zip(embedded, targets, strict=True)]
    value = torch.stack(distances).sum()
    return value.detach(), torch.autograd.grad(value, seen)[0]
