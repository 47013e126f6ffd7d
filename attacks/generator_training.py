"""How SneakDoor trains its generator against a network: the losses and one Adam loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distill.networks.makers import embed
from ..distill.training import in_pieces, shuffled
from .triggers.generator import fresh_weights, perturb

_BATCH = 256
_TEMPERATURE = 0.2
_ALIGNMENT, _CONTRAST, _SIZE = 2.25, 0.65, 1.25  # weights of the losses


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratorTask:
    """What a generator is trained for.

    network: the surrogate, frozen. sources: ``(N, C, H, W)``, the images that it perturbs.
    wanted: ``(M, C, H, W)``, images of the target class that they are to resemble. epsilon, std:
    ``(C, 1, 1)``, pixel units.
    """

    network: nn.Module
    sources: Tensor
    wanted: Tensor
    epsilon: Tensor
    std: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """width: channels between the layers. lr: Adam's. images: seen in all, with repetition."""

    width: int
    lr: float
    images: int


def train_generator(
    task: GeneratorTask, options: GeneratorOptions, rng: torch.Generator
) -> dict[str, Tensor]:
    """Weights of ``perturb`` that make the sources look like the wanted images to the network.

    Every mini-batch is perturbed, clamped to [0, 1], and compared with as many wanted images drawn
    at random.
    """
    device, count = task.sources.device, len(task.sources)
    fresh = fresh_weights(task.sources.shape[1], options.width, rng)
    weights = {name: value.to(device).requires_grad_() for name, value in fresh.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=options.lr)
    known = _known(task)
    for _ in range(math.ceil(options.images / count)):
        for rows in shuffled(count, _BATCH, rng, device):
            chosen = torch.randint(len(task.wanted), (len(rows),), generator=rng).to(device)
            loss = _loss(task, known, weights, rows, chosen)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return {name: value.detach() for name, value in weights.items()}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Known:
    """What the network says of the clean images, which does not change: probabilities and features
    of the wanted ones, features of the sources."""

    likely: Tensor
    near: Tensor
    far: Tensor


def _known(task: GeneratorTask) -> _Known:
    features = partial(embed, task.network)
    return _Known(
        likely=in_pieces(task.network, task.wanted).softmax(dim=1),
        near=in_pieces(features, task.wanted),
        far=in_pieces(features, task.sources),
    )


def _loss(
    task: GeneratorTask, known: _Known, weights: dict[str, Tensor], rows: Tensor, chosen: Tensor
) -> Tensor:
    """The weighted sum of the three losses: the sources ``rows`` beside the wanted ``chosen``."""
    clean = task.sources[rows]
    added = perturb(weights, task.epsilon, clean)
    triggered = (clean + added).clamp(0, 1)
    found, likely = task.network(triggered).softmax(dim=1), known.likely[chosen]
    near, far = known.near[chosen], known.far[rows]
    return (
        _ALIGNMENT * earth_mover(found, likely)
        + _CONTRAST * contrast(embed(task.network, triggered), near, far, _TEMPERATURE)
        + _SIZE * (added / task.std).square().mean()
    )


def earth_mover(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean 1-Wasserstein distance of distributions ``(N, classes)`` with classes on a line."""
    return (found - wanted).cumsum(dim=1).abs().sum(dim=1).mean()


def contrast(found: Tensor, near: Tensor, far: Tensor, temperature: float) -> Tensor:
    """Mean of −log(exp(cos(found, near) / t) / Σ exp(cos(found, far) / t)).

    All are features ``(N, F)``; the sum is over all rows of ``far``. The pair is no part of it, as
    in the official code, so the value may be negative.
    """
    ours = functional.normalize(found, dim=1)
    pulls = (ours * functional.normalize(near, dim=1)).sum(dim=1) / temperature
    pushes = ours @ functional.normalize(far, dim=1).T / temperature
    return (pushes.logsumexp(dim=1) - pulls).mean()
