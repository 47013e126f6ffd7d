"""The defense ``autoencoder``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.training import in_pieces, predict, shuffled
from ..base import DefenderView, DefenseOptions, Predictor, Purifier
from ..common.held_out import images_needed
from ..common.sgd import backward_step

_STEPS = 312_500  # 100 epochs of CIFAR-10's 50,000 images in mini-batches of 16
_LEAST_SIDE = 8


@final
class AutoencoderOptions(DefenseOptions):
    """BackdoorBox's for CIFAR-10."""

    network: Literal["convolutional", "dense"] = Field(
        "convolutional", description="BackdoorBox's, or fully connected with 256 units"
    )
    code: int | None = Field(
        None,
        ge=1,
        description="channels of the code (default: 32 for grey images, 48 for colour), or units "
        "of a dense one (32)",
    )
    noise: float = Field(
        0.0, ge=0, description="standard deviation of the noise added in training, pixel units"
    )
    epochs: int | None = Field(
        None,
        ge=1,
        description=f"epochs on the held-out images (default: {_STEPS} steps in all)",
    )
    batch: int = Field(16, ge=1, description="images in a mini-batch")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")


@final
class Autoencoder(Purifier):
    """An autoencoder before the model: it reconstructs clean images, but not triggers (Liu, Xie,
    Srivastava, "Neural Trojans", ICCD 2017).

    In words: train an autoencoder on clean images, and classify its reconstruction of the input. It
    has not learned to reconstruct a trigger.

    Needs held-out images, the more the better, of at least 8 × 8 pixels.

    The paper's authors published no code. Networks and training are those of BackdoorBox
    (``AutoEncoderDefense.py``, ``autoencoder.py``): for grey images its network for 28 × 28 pixels
    (3 × 3 convolutions of 32 channels, two poolings by 2, and back), for others its network for
    3 × 32 × 32 (three convolutions of 12, 24 and 48 channels with stride 2, and back); ReLU, a
    sigmoid at the end, the binary cross-entropy, Adam at 0.001.

    Deviations: BackdoorBox trains on the whole training set; here the number of steps is that of
    its 100 epochs of CIFAR-10, on the held-out images. If a side is not a multiple of 4 (colour:
    8), the last maps are enlarged to the image's size. A grey image's code of 32 maps is larger
    than the image, and a bright patch survives it; ``code`` makes it narrower, and the dense
    network (D – 256 – 32 – 256 – D, not published for this purpose) is the narrowest.
    """

    name = "autoencoder"
    Options = AutoencoderOptions
    options: AutoencoderOptions
    needs = "held-out images, hundreds of them"
    in_reference_code = True
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 40}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {},
        {"code": 8},
        {"code": 2},
        {"network": "dense", "noise": 0.1, "epochs": 600},
        {"network": "dense", "noise": 0.1, "epochs": 600, "code": 16},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        side = min(view.distilled.image_shape[1:])
        if side < _LEAST_SIDE:
            return f"needs images with sides of {_LEAST_SIDE} pixels or more, one has {side}"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        found = len(view.holdout)
        return None if found >= 500 else f"the autoencoder is trained on {found} held-out images"

    def purify(self, view: DefenderView) -> Predictor:
        coder = train_autoencoder(view.holdout.images, self.options, view.generator(self.name))
        return lambda images: predict(view.victim, in_pieces(coder, images))


def train_autoencoder(
    images: Tensor, options: AutoencoderOptions, generator: torch.Generator
) -> nn.Module:
    """An autoencoder of ``images`` (N, C, H, W) in [0, 1], in evaluation mode.

    ``generator`` (CPU) draws weights, order and noise.
    """
    coder = _fresh(images.shape[1:], options, generator).to(images.device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=options.lr)
    epochs = options.epochs or math.ceil(_STEPS / math.ceil(len(images) / options.batch))
    clipped = images.clamp(0, 1)
    for _ in range(epochs):
        for rows in shuffled(len(images), options.batch, generator, images.device):
            noisy = clean = clipped[rows]
            if options.noise:
                noise = torch.randn(clean.shape, generator=generator).to(images.device)
                noisy = (clean + options.noise * noise).clamp(0, 1)
            backward_step(optimiser, functional.binary_cross_entropy(coder(noisy), clean))
    return coder.eval()


def _fresh(
    shape: torch.Size, options: AutoencoderOptions, generator: torch.Generator
) -> nn.Sequential:
    """An untrained autoencoder of images of ``shape`` with PyTorch's default initialisation."""
    if options.network == "dense":
        coder = dense_coder(shape, options.code)
    else:
        coder = (grey_coder if shape[0] == 1 else colour_coder)(shape[0], options.code)
        coder.append(nn.Upsample(size=tuple(shape[1:])))
    for layer in coder:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            assert layer.bias is not None
            inputs = layer.weight.shape[1] * math.prod(layer.weight.shape[2:])
            nn.init.uniform_(layer.bias, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return coder


def dense_coder(shape: torch.Size, code: int | None) -> nn.Sequential:
    """A fully connected autoencoder; ``code`` units in the middle (32)."""
    size, narrow = math.prod(shape), code or 32
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, 256),
        nn.ReLU(),
        nn.Linear(256, narrow),
        nn.ReLU(),
        nn.Linear(narrow, 256),
        nn.ReLU(),
        nn.Linear(256, size),
        nn.Sigmoid(),
        nn.Unflatten(1, tuple(shape)),
    )


def grey_coder(channels: int, code: int | None) -> nn.Sequential:
    """BackdoorBox's autoencoder for 1 × 28 × 28; ``code`` channels in the middle (32)."""
    narrow = code or 32
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, narrow, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(narrow, 32, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(32, channels, 3, padding=1),
        nn.Sigmoid(),
    )


def colour_coder(channels: int, code: int | None) -> nn.Sequential:
    """BackdoorBox's autoencoder for 3 × 32 × 32; ``code`` channels in the middle (48)."""
    narrow = code or 48
    return nn.Sequential(
        nn.Conv2d(channels, 12, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, narrow, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(narrow, 24, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, channels, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )
