"""A network's channels: which layers have them, and how they are scaled and pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

BATCH_NORM = nn.modules.batchnorm._BatchNorm
_NORMS = (BATCH_NORM, nn.GroupNorm, nn.LayerNorm)


@final
@dataclass(frozen=True)
class Channels:
    """The channels of one layer, along the first dimension of its parameters.

    layer: the name of the module whose weight scales them: the affine norm after a convolution, the
    convolution itself if there is none, or a hidden linear layer. source: the name of the
    convolution or linear layer that computes them. count: their number.
    """

    layer: str
    source: str
    count: int


def channels(network: nn.Module) -> list[Channels]:
    """The channels of all layers but the last linear one, in the order of the modules."""
    return list(_channels(network))


def convolutions(network: nn.Module) -> list[Channels]:
    """The channels of convolutions alone."""
    return [
        layer
        for layer in channels(network)
        if isinstance(network.get_submodule(layer.source), nn.Conv2d)
    ]


def batch_norm_needed(network: nn.Module) -> str | None:
    """Why a defense that scales a batch norm's parameters, or a layer's own without a norm, is not
    applicable, or ``None``. Other norms undo such a factor."""
    for layer in channels(network):
        norm = network.get_submodule(layer.layer)
        if layer.layer != layer.source and not isinstance(norm, BATCH_NORM):
            return f"needs batch norm or no norm, the network has {type(norm).__name__}"
    return None


def _channels(network: nn.Module) -> Iterator[Channels]:
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    waiting: tuple[str, nn.Conv2d] | None = None
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if waiting is not None:
                yield Channels(waiting[0], waiting[0], waiting[1].out_channels)
                waiting = None
            if isinstance(module, nn.Conv2d):
                waiting = name, module
            elif name != linear[-1]:
                yield Channels(name, name, module.out_features)
        elif isinstance(module, _NORMS) and waiting is not None and module.weight is not None:
            yield Channels(name, waiting[0], waiting[1].out_channels)
            waiting = None
    if waiting is not None:
        yield Channels(waiting[0], waiting[0], waiting[1].out_channels)


def forward_with(
    network: nn.Module,
    images: Tensor,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The logits of ``images`` with the weight and bias of each channel multiplied by a factor.

    weights, biases: factors ``(count,)`` by layer; gradients reach them.
    """
    changed: dict[str, Tensor] = {}
    for kind, factors in (("weight", weights), ("bias", biases or {})):
        for layer, factor in factors.items():
            parameter: Any = getattr(network.get_submodule(layer), kind)
            if parameter is not None:
                changed[f"{layer}.{kind}"] = parameter * _aligned(factor, parameter)
    logits: Tensor = functional_call(network, changed, (images,))
    return logits


def low_masks(masks: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The channels whose mask is at most ``threshold``, ``bool (count,)`` by layer."""
    return {layer: mask <= threshold for layer, mask in masks.items()}


@torch.no_grad()
def prune(network: nn.Module, chosen: Mapping[str, Tensor], *, biases: bool = False) -> None:
    """Set the weights of the chosen channels to 0, in place.

    chosen: numbers or ``bool (count,)`` by layer. biases: set these to 0 too; otherwise a pruned
    channel outputs its bias.
    """
    for layer, rows in chosen.items():
        module: Any = network.get_submodule(layer)
        module.weight[rows] = 0
        if biases and module.bias is not None:
            module.bias[rows] = 0


def _aligned(factor: Tensor, parameter: Tensor) -> Tensor:
    """``(count,)`` shaped to multiply along the parameter's first dimension."""
    return factor.view(-1, *[1] * (parameter.dim() - 1))
