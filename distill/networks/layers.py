"""What networks are made of: normalisation, activations, pooling, a trunk being built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from ..preprocessing import Preprocessing

Shape = tuple[int, int, int]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    # Never in place: hooks read what enters an activation, and a second backward needs it.
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
    "swish": nn.SiLU,
}
NORMS: dict[str, Callable[[Shape], nn.Module]] = {
    # Instance norm as the literature has it: one group per channel, affine, no running statistics.
    "instance": lambda shape: nn.GroupNorm(shape[0], shape[0]),
    "batch": lambda shape: nn.BatchNorm2d(shape[0]),
    "layer": nn.LayerNorm,
    "group": lambda shape: nn.GroupNorm(4, shape[0]),
    "none": lambda _: nn.Identity(),
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}


@final
@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A network's parameters with the published values filled in; an unused one keeps its zero."""

    width: int = 0
    depth: int = 0
    norm: str = "none"
    activation: str = "relu"
    pooling: str = "none"
    head: int = 0


@final
class Normalise(nn.Module):
    """Pixel space to normalised space: ``(pixels - mean) / std`` per channel, then whitened.

    All networks of a run share the whitening; it is not in a network's state.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: Preprocessing) -> None:
        super().__init__()
        for name, values in (("mean", space.mean), ("std", space.std)):
            buffer = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, buffer)
        self.zca = space.zca

    def forward(self, pixels: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        normalised = (pixels - self.mean) / self.std
        return normalised if self.zca is None else self.zca.whiten(normalised)


@final
class Stack:
    """A trunk being built: its layers so far, and the shape (C, H, W) that comes out of them.

    ``margin`` is what the first convolution pads on each side beyond its own padding.
    """

    def __init__(self, parameters: Parameters, image_shape: Shape, margin: int) -> None:
        self.parameters = parameters
        self.layers: list[nn.Module] = []
        self.shape: Shape = image_shape
        self._margin = margin

    @property
    def features(self) -> int:
        """How many numbers come out for one image."""
        return math.prod(self.shape)

    def conv(self, channels: int, kernel: int = 3, *, padding: int = 1, bias: bool = True) -> None:
        """A convolution, its normalisation and its activation."""
        pad = padding if self.layers else padding + self._margin
        before, height, width = self.shape
        grown = 2 * pad - kernel + 1
        self.shape = (channels, height + grown, width + grown)
        self.layers += [
            nn.Conv2d(before, channels, kernel, padding=pad, bias=bias),
            NORMS[self.parameters.norm](self.shape),
            ACTIVATIONS[self.parameters.activation](),
        ]

    def pool(self, kind: str) -> None:
        """Halve the sides, unless ``kind`` is "none"."""
        self.layers.append(POOLINGS[kind]())
        if kind != "none":
            channels, height, width = self.shape
            self.shape = (channels, height // 2, width // 2)

    def pool_globally(self) -> None:
        """The mean over each channel."""
        self.layers.append(nn.AdaptiveAvgPool2d(1))
        self.shape = (self.shape[0], 1, 1)

    def residual(self, channels: int, stride: int) -> None:
        """ResNet's basic block."""
        block = _ResidualBlock(self.parameters, self.shape, channels, stride)
        self.layers.append(block)
        self.shape = block.shape

    def linear(self, units: int) -> None:
        """A hidden linear layer with its activation, on flat features."""
        self.flatten()
        self.layers += [
            nn.Linear(self.features, units),
            ACTIVATIONS[self.parameters.activation](),
        ]
        self.shape = (units, 1, 1)

    def flatten(self) -> None:
        """Images to flat features, once."""
        if not any(isinstance(layer, nn.Flatten) for layer in self.layers):
            self.layers.append(nn.Flatten())


@final
class _ResidualBlock(nn.Module):
    """ResNet's basic block (He et al., CVPR 2016): two 3x3 convolutions beside a shortcut."""

    def __init__(self, parameters: Parameters, before: Shape, channels: int, stride: int) -> None:
        super().__init__()
        norm, activation = NORMS[parameters.norm], ACTIVATIONS[parameters.activation]
        inputs, height, width = before
        self.shape = (channels, -(-height // stride), -(-width // stride))
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False),
            norm(self.shape),
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm(self.shape),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride=stride, bias=False), norm(self.shape)
            )
        self.activation = activation()

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.activation(self.body(inputs) + self.shortcut(inputs)))
