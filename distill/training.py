"""Train one network on tensors by a recipe, and predict in batches that fit the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from . import weights
from .augment import Augmentation, parse_strategy
from .devices import moved
from .engine import PLAIN, Engine
from .slopes import even_pieces, micro_batch
from .trainer import NetworkTrainer, training
from .types import Batch, Recipe, RunError


def fit(
    network: nn.Module,
    batch: Batch,
    recipe: Recipe,
    generator: torch.Generator,
    engine: Engine = PLAIN,
) -> nn.Module:
    """Train ``network`` in place on ``batch`` by ``recipe`` and return it in evaluation mode.

    SGD with the recipe's momentum and weight decay, every epoch in a fresh order, the learning
    rate cut to a tenth for the second half; or the recipe's own steps where it has any.
    ``generator`` (CPU) gives orders and augmentation. engine: how the passes run; the recipe's own
    steps run plainly.

    Deviation from the published evaluation: it runs one epoch more and drops the rate (losing the
    momentum) after epoch ``epochs // 2 + 1``; here the momentum stays.
    Errors: ``RunError`` when the training loss is not finite.
    """
    network.train()
    if recipe.initial is not None and recipe.initial.numel() == weights.count(network):
        weights.write(network, recipe.initial)
    if recipe.steps:
        loss = _fit_by_steps(network, batch, recipe)
    else:
        loss = _fit_by_epochs(network, batch, recipe, generator, engine)
    if not bool(loss.isfinite()):
        raise RunError(f"training did not converge: the loss is {loss.item()}")
    return network.eval()


def _fit_by_epochs(
    network: nn.Module, batch: Batch, recipe: Recipe, generator: torch.Generator, engine: Engine
) -> Tensor:
    """The recipe's epochs; returns the last mini-batch's loss."""
    optimiser = sgd(network, recipe)
    loss = torch.zeros(())
    with training(network, optimiser, engine) as trainer:
        for epoch in range(recipe.epochs):
            dropped = epoch >= drop_epoch(recipe.epochs)
            optimiser.param_groups[0]["lr"] = recipe.lr * (0.1 if dropped else 1.0)
            loss = train_epoch(trainer, batch, recipe, generator)
    return loss


def _fit_by_steps(network: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """The recipe's steps, each on its own rows at its own rate; returns the last step's loss."""
    parameters = list(network.parameters())
    loss = torch.zeros(())
    for step in recipe.steps:
        rows = torch.tensor(step.rows, device=batch.labels.device)
        loss = functional.cross_entropy(network(batch.images[rows]), batch.labels[rows])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=step.rate)
    return loss.detach()


def drop_epoch(epochs: int) -> int:
    """The epoch of ``epochs``, counted from 0, at which the published schedule drops the rate."""
    return epochs // 2 + 1


def drop_at_half(optimiser: torch.optim.Optimizer, epochs: int) -> LRScheduler:
    """The published schedule: a tenth of the learning rate from ``drop_epoch`` on.

    Call its ``step`` after every epoch.
    """
    return MultiStepLR(optimiser, milestones=[drop_epoch(epochs)], gamma=0.1)


def sgd(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """The recipe's optimiser for ``network``."""
    return torch.optim.SGD(
        network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def train_epoch(
    trainer: NetworkTrainer, batch: Batch, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """One epoch over ``batch`` in random order; returns the last mini-batch's loss, detached."""
    order = shuffled(len(batch), recipe.batch_size, generator, batch.images.device)
    pieces = (batch.rows(rows) for rows in order)
    return train_on(trainer, pieces, recipe, generator)


def train_on(
    trainer: NetworkTrainer, pieces: Iterable[Batch], recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """One step on each mini-batch, augmented; returns the last one's loss, detached."""
    augment = augmenter(recipe, generator)
    loss = torch.zeros(())
    for piece in pieces:
        loss = trainer.step(piece.replace(images=augment(piece.images)))
    return loss


def augmenter(recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """The recipe's augmentation of a mini-batch ``(N, C, H, W)``.

    Each image has its own parameters from ``generator`` (CPU).
    """
    augmentation = Augmentation(parse_strategy(recipe.augment), recipe.preprocessing)

    def augment(images: Tensor) -> Tensor:
        if not augmentation.strategy:
            return images
        return augmentation.draw(images.shape, generator, shared=False)(images)

    return augment


def shuffled(
    count: int,
    size: int,
    generator: torch.Generator,
    device: torch.device,
    wanted: int | None = None,
) -> Iterator[Tensor]:
    """Row numbers 0 to ``count`` − 1 in random order, in pieces of ``size``; ``wanted`` of them."""
    yield from moved(torch.randperm(count, generator=generator)[:wanted], device).split(size)


@torch.no_grad()
def in_pieces(answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``answer`` to ``images``, without gradients, in batches that fit the cache."""
    return torch.cat([answer(piece) for piece in images.split(micro_batch(images.device))])


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, engine: Engine = PLAIN) -> Tensor:
    """Class numbers ``int64 (N,)`` for pixel-space ``images``; the network's mode is kept.

    Errors: ``RunError`` when a logit is not finite: the last step of a training that diverges
    escapes ``fit``, and the largest of NaNs is no class.
    """
    training = network.training
    network.eval()
    static = engine.static(network)
    if static is None:
        logits = in_pieces(network, images)
    else:
        logits = in_full_pieces(static.first_order, images)
    network.train(training)
    if not bool(logits.isfinite().all()):
        raise RunError("the network's logits are not finite: its training did not converge")
    return logits.argmax(dim=1)


@torch.no_grad()
def in_full_pieces(answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """As ``in_pieces``, in pieces of one size, the last filled up: a graph knows one shape."""
    size = even_pieces(len(images), images.device)
    filled = torch.cat([images, images[: -len(images) % size]])
    return torch.cat([answer(piece) for piece in filled.split(size)])[: len(images)]


def accuracy(network: nn.Module, batch: Batch) -> float:
    """Share of ``batch`` that ``network`` labels correctly, 0 to 1."""
    return float((predict(network, batch.images) == batch.labels).double().mean())
