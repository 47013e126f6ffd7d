"""Gradient matching: ``dc`` (Dataset Condensation) and ``dsa`` (with siamese augmentation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, final

import numpy
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..augment import Augmentation, parse_strategy
from ..batch_norm import batch_norm_layers
from ..captured import side_by_side
from ..core.backend import Backend, BackendOptions
from ..core.run import Run
from ..core.task import Start
from ..engine import StaticNetwork
from ..slopes import even_pieces, mean_slopes, micro_batch
from ..trainer import training
from ..training import train_epoch
from ..types import Batch, Recipe
from .matching import DISTANCES, Gradients, attached

Distance = Callable[[Gradients, Gradients], Tensor]

# Published (ipc, outer loop, inner loop); other values of IPC interpolate.
_PUBLISHED_LOOPS = ((1, 1, 1), (10, 10, 50), (20, 20, 25), (30, 30, 20), (40, 40, 15), (50, 50, 10))
# Real images per class from which batch norm takes its statistics; the published value.
_BATCH_NORM_ROWS = 16


def published_loops(ipc: int) -> tuple[int, int]:
    """(outer, inner) loops for ``ipc`` images per class, interpolated between published values."""
    points, outer, inner = zip(*_PUBLISHED_LOOPS, strict=True)
    return round(float(numpy.interp(ipc, points, outer))), round(
        float(numpy.interp(ipc, points, inner))
    )


class GradientMatchingOptions(BackendOptions):
    """Options of ``dc``; the defaults are the published ones."""

    momentum_img: float = Field(0.5, ge=0, lt=1, description="momentum of the synthetic images")
    lr_net: float = Field(0.01, gt=0, description="learning rate of the distilling network")
    batch_real: int = Field(256, ge=1, description="real images per class and step")
    batch_train: int = Field(256, ge=1, description="mini-batch of the distilling network")
    outer_loop: int | None = Field(None, ge=1, description="synthetic steps per iteration")
    inner_loop: int | None = Field(None, ge=0, description="network epochs per synthetic step")
    distance: Literal["layerwise", "mse", "cos"] = Field(
        "layerwise", description="distance between gradients"
    )


class SiameseOptions(GradientMatchingOptions):
    """Options of ``dsa``."""

    init: Start = "real"
    augment: str = Field(
        "color_crop_cutout_flip_scale_rotate",
        description="siamese operations, joined by _; flip is dropped where it changes the label",
    )


class _GradientMatching(Backend):
    """What ``dc`` and ``dsa`` share: everything but the augmentation."""

    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        assert isinstance(options, GradientMatchingOptions)
        outer, inner = published_loops(ipc)
        self._options = options
        self._outer = options.outer_loop or outer
        self._inner = inner if options.inner_loop is None else options.inner_loop
        self._distance = DISTANCES[options.distance]
        self._augmentation = Augmentation(self._operations(), recipe.preprocessing)
        self._inner_recipe = recipe.by_epochs(
            batch_size=options.batch_train, augment="_".join(self._operations())
        )

    def _operations(self) -> tuple[str, ...]:
        return ()

    def steps(self) -> int:
        return self._outer

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        options = self._options
        return torch.optim.SGD([leaf], lr=options.lr_img, momentum=options.momentum_img)

    def network(self, run: Run) -> nn.Module:
        return run.task.fresh_network(run.position.iteration, 0)

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        self._freeze_batch_norm(run, network)
        pairs = self._pairs(run, synthetic)
        static = run.task.engine.static(network)
        if static is not None:
            yield _together(static, list(pairs), self._distance)
            return
        weights = list(network.parameters())
        for real, fake in pairs:
            loss = functional.cross_entropy(network(fake.images), fake.labels)
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            size = micro_batch(real.images.device)
            _, wanted = mean_slopes(network, weights, real, size)
            yield self._distance(gradient, wanted)

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        network.train()
        optimiser = torch.optim.SGD(network.parameters(), lr=self._options.lr_net)
        generator = run.position.generator("network")
        with training(network, optimiser, run.task.engine) as trainer:
            for _ in range(self._inner):
                train_epoch(trainer, synthetic, self._inner_recipe, generator)

    def _pairs(self, run: Run, synthetic: Batch) -> Iterator[tuple[Batch, Batch]]:
        """Class by class, a real batch and the synthetic images, augmented alike."""
        draws, augments = run.position.generator("draw"), run.position.generator("augment")
        for label in range(run.task.classes):
            real = run.real.draw(label, self._options.batch_real, draws)
            fake = synthetic.rows(run.synthetic.rows_of(label))
            if self._augmentation.strategy:
                same = self._augmentation.draw(real.images.shape, augments, shared=True)
                real, fake = (b.replace(images=same(b.images)) for b in (real, fake))
            yield real, fake

    def _freeze_batch_norm(self, run: Run, network: nn.Module) -> None:
        """Take batch norm's statistics from real images: one image per class has none."""
        layers = batch_norm_layers(network)
        if not layers:
            return
        network.train()
        generator = run.position.generator("draw", 1)
        drawn = [run.real.draw(c, _BATCH_NORM_ROWS, generator) for c in range(run.task.classes)]
        with torch.no_grad():
            network(torch.cat([batch.images for batch in drawn]))
        for layer in layers:
            layer.eval()


@final
class DC(_GradientMatching):
    """Dataset Condensation with Gradient Matching (Zhao, Mopuri, Bilen; ICLR 2021).

    In words: a fresh network; for each class, move the synthetic images so that the loss gradient
    on them points where that of a real batch points; train the network a little on the synthetic
    set; repeat, then start over with another network.

    Defaults: the official code's. Deviations: IPC without published loops interpolate between
    those that have them; the iteration after the last evaluation is not run (the code runs 1,001);
    victims on MNIST train without the augmentation (crop, scale, rotate) that the code gives them.
    """

    name = "dc"
    Options = GradientMatchingOptions
    cost = "medium: second-order gradients, and a network trained anew in every iteration"
    needs = "nothing but the real data"


@final
class DSA(_GradientMatching):
    """Differentiable Siamese Augmentation (Zhao, Bilen; ICML 2021): ``dc`` under augmentation.

    In words: as ``dc``, but each class's real and synthetic batch pass through one and the same
    random transform, drawn anew for every class and step, and the network trains augmented.

    Defaults: the official code's, starting from real images. Deviations: as for ``dc``.
    """

    name = "dsa"
    Options = SiameseOptions
    cost = "medium: as dc, and victims train augmented for longer"
    needs = "nothing but the real data"
    victim_epochs = 1000
    victim_augment = "color_crop_cutout_flip_scale_rotate"

    def _operations(self) -> tuple[str, ...]:
        assert isinstance(self._options, SiameseOptions)
        strategy: tuple[str, ...] = parse_strategy(self._options.augment)
        return strategy


def _together(
    static: StaticNetwork, pairs: list[tuple[Batch, Batch]], distance: Distance
) -> Tensor:
    """The distances of all classes, summed, attached to the synthetic images.

    One captured function gives their values and their gradients on the images.
    """
    sides = [_joined([pair[side] for pair in pairs]) for side in (0, 1)]
    sizes = tuple((len(real), len(fake)) for real, fake in pairs)
    name = ("match", sizes, distance)
    matched = static.captured(name, partial(_match, static, sizes, distance))
    (real, truth), (fake, labels) = sides
    value, slope = matched(real, truth, fake, labels)
    return attached(value, fake, slope)


def _joined(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def _match(
    static: StaticNetwork,
    sizes: Sequence[tuple[int, int]],
    distance: Distance,
    real: Tensor,
    truth: Tensor,
    fake: Tensor,
    labels: Tensor,
) -> tuple[Tensor, ...]:
    """The summed distance of all classes, and its gradient on the synthetic images ``fake``.

    The images lie class by class; sizes: how many real and synthetic ones each class has.
    """
    reals, fakes = ([pair[side] for pair in sizes] for side in (0, 1))

    def one(images: Tensor, goal: Tensor, seen: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        batch = Batch(images=images, labels=goal)
        size = even_pieces(len(batch), images.device)
        _, wanted = mean_slopes(static.first_order, static.weights, batch, size)
        seen = seen.detach().requires_grad_()
        loss = functional.cross_entropy(static.module(seen), own)
        gradient = torch.autograd.grad(loss, static.weights, create_graph=True)
        value = distance(gradient, wanted)
        (slope,) = torch.autograd.grad(value, seen)
        return value.detach(), slope

    parts = zip(
        real.split(reals), truth.split(reals), fake.split(fakes), labels.split(fakes), strict=True
    )
    found = side_by_side([partial(one, *part) for part in parts], real.device)
    values, slopes = zip(*found, strict=True)
    return torch.stack(values).sum(), torch.cat(slopes)
