"""A denoising autoencoder in front of the model: what is no image of the kind does not pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.training import in_pieces, predict, shuffled
from .base import DefenderView, DefenseOptions, Predictor, Purifier
from .held_out import images_needed
from .tuning import follow

_BATCH = 32


@final
class AutoencoderOptions(DefenseOptions):
    """A narrow code, so that a pattern the training images lack can't pass."""

    hidden: int = Field(256, ge=1, description="units around the code")
    code: int = Field(32, ge=1, description="units of the code")
    noise: float = Field(0.1, ge=0, description="deviation of the noise while training")
    epochs: int = Field(600, ge=1, description="training epochs")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")


@final
class Autoencoder(Purifier):
    """A denoising autoencoder before the model (Liu, Xie, Srivastava, "Neural Trojans", ICCD 2017;
    denoising as in Meng, Chen, "MagNet: a Two-Pronged Defense against Adversarial Examples", CCS
    2017).

    In words: train an autoencoder with a narrow code on clean images with noise added; predict on
    what it makes of the input. A trigger is not among what it has learned to draw.

    Needs held-out images, the more the better: from a hundred a code of 32 numbers is learned
    roughly, and clean accuracy pays for it.

    Deviations: "Neural Trojans" trains on a validation set of thousands and gives no layer sizes
    for other data than MNIST: here D – 256 – 32 – 256 – D fully connected, ReLU, a sigmoid at the
    end, Adam.
    """

    name = "autoencoder"
    Options = AutoencoderOptions
    needs = "held-out images, hundreds of them"
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 200}

    def __init__(self, options: AutoencoderOptions) -> None:
        self.options: AutoencoderOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        found = len(view.holdout)
        return None if found >= 500 else f"it learns to draw from {found} held-out images"

    def purify(self, view: DefenderView) -> Predictor:
        coder = train_autoencoder(view.holdout.images, self.options, view.generator(self.name))

        def predictor(images: Tensor) -> Tensor:
            return predict(view.victim, in_pieces(coder, images))

        return predictor


def train_autoencoder(
    images: Tensor, options: AutoencoderOptions, generator: torch.Generator
) -> nn.Module:
    """An autoencoder of ``images`` (N, C, H, W) in [0, 1], in evaluation mode.

    ``generator`` (CPU) gives weights, order and noise.
    """
    size = math.prod(images.shape[1:])
    coder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, options.hidden),
        nn.ReLU(),
        nn.Linear(options.hidden, options.code),
        nn.ReLU(),
        nn.Linear(options.code, options.hidden),
        nn.ReLU(),
        nn.Linear(options.hidden, size),
        nn.Sigmoid(),
        nn.Unflatten(1, images.shape[1:]),
    )
    for layer in coder:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(layer.bias)
    coder.to(images.device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=options.lr)
    for _ in range(options.epochs):
        for rows in shuffled(len(images), _BATCH, generator, images.device):
            clean = images[rows]
            noise = torch.randn(clean.shape, generator=generator).to(images.device)
            seen = (clean + options.noise * noise).clamp(0, 1)
            follow(optimiser, functional.mse_loss(coder(seen), clean))
    return coder.eval()
