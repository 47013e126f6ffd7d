"""Train one network on tensors by a recipe, and predict in batches that fit the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from . import weights
from .augment import Augmentation, parse_strategy
from .types import Batch, Recipe, RunError

# On a CPU a batch of 256 falls out of the cache; see benchmarks/results/cpu-levers.json.
_CPU_MICRO_BATCH = 32
_GPU_MICRO_BATCH = 2048


def micro_batch(device: torch.device) -> int:
    """How many images to pass through a network at once on ``device``."""
    return _CPU_MICRO_BATCH if device.type == "cpu" else _GPU_MICRO_BATCH


def fit(network: nn.Module, batch: Batch, recipe: Recipe, generator: torch.Generator) -> nn.Module:
    """Train ``network`` in place on ``batch`` by ``recipe`` and return it in evaluation mode.

    SGD with the recipe's momentum and weight decay, every epoch in a fresh order, the learning
    rate cut to a tenth for the second half; or the recipe's own steps where it has any.
    ``generator`` (CPU) gives orders and augmentation.

    Deviation from the published evaluation: it runs one epoch more and drops the rate (losing the
    momentum) after epoch ``epochs // 2 + 1``; here the momentum stays.
    Errors: ``RunError`` when the training loss is not finite.
    """
    network.train()
    if recipe.initial is not None and recipe.initial.numel() == weights.count(network):
        weights.write(network, recipe.initial)
    loss = (_fit_by_steps if recipe.steps else _fit_by_epochs)(network, batch, recipe, generator)
    if not bool(loss.isfinite()):
        raise RunError(f"training did not converge: the loss is {loss.item()}")
    return network.eval()


def _fit_by_epochs(
    network: nn.Module, batch: Batch, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """The recipe's epochs; returns the last mini-batch's loss."""
    optimiser = sgd(network, recipe)
    schedule = drop_at_half(optimiser, recipe.epochs)
    loss = torch.zeros(())
    for _ in range(recipe.epochs):
        loss = train_epoch(network, optimiser, batch, recipe, generator)
        schedule.step()
    return loss


def _fit_by_steps(
    network: nn.Module, batch: Batch, recipe: Recipe, generator: torch.Generator
) -> Tensor:
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
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    generator: torch.Generator,
) -> Tensor:
    """One epoch over ``batch`` in random order; returns the last mini-batch's loss, detached."""
    order = shuffled(len(batch), recipe.batch_size, generator, batch.images.device)
    pieces = (batch.rows(rows) for rows in order)
    return train_on(network, optimiser, pieces, recipe, generator)


def train_on(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    pieces: Iterable[Batch],
    recipe: Recipe,
    generator: torch.Generator,
) -> Tensor:
    """One step on each mini-batch, augmented; returns the last one's loss, detached."""
    augment = augmenter(recipe, generator)
    loss = torch.zeros(())
    for piece in pieces:
        loss = functional.cross_entropy(network(augment(piece.images)), piece.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.detach()


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
    yield from torch.randperm(count, generator=generator)[:wanted].to(device).split(size)


@torch.no_grad()
def in_pieces(answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``answer`` to ``images``, without gradients, in batches that fit the cache."""
    return torch.cat([answer(piece) for piece in images.split(micro_batch(images.device))])


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Class numbers ``int64 (N,)`` for pixel-space ``images``; the network's mode is kept.

    Errors: ``RunError`` when a logit is not finite: the last step of a training that diverges
    escapes ``fit``, and the largest of NaNs is no class.
    """
    training = network.training
    network.eval()
    logits = in_pieces(network, images)
    network.train(training)
    if not bool(logits.isfinite().all()):
        raise RunError("the network's logits are not finite: its training did not converge")
    return logits.argmax(dim=1)


def accuracy(network: nn.Module, batch: Batch) -> float:
    """Share of ``batch`` that ``network`` labels correctly, 0 to 1."""
    return float((predict(network, batch.images) == batch.labels).double().mean())
