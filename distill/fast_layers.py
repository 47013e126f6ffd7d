"""Layers that compute the same in fewer or faster passes over memory.

On a GPU the backward pass of average pooling was a fifth of a gradient-matching step, and the
moments of group norm another seventh (docs/speed.md).
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast, final

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@final
class PoolByReshape(nn.Module):
    """2×2 average pooling as a reshape and a mean; an odd last row or column is left out."""

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H // 2, W // 2)``."""
        rows, columns = images.shape[2] // 2, images.shape[3] // 2
        even = images[:, :, : 2 * rows, : 2 * columns]
        return even.reshape(*even.shape[:2], rows, 2, columns, 2).mean((3, 5))


@final
class InstanceNorm(nn.Module):
    """Group norm of one group a channel, from one pass for mean and variance.

    like: the layer whose weight and bias it shares.
    """

    def __init__(self, like: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        variance, mean = torch.var_mean(images, dim=(2, 3), keepdim=True, correction=0)
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return (images - mean) * torch.rsqrt(variance + self.eps) * weight + bias


def with_fast_layers(network: Module) -> Module:
    """A copy of ``network`` that shares its parameters and buffers, with the layers above."""
    shared = {id(own): own for own in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, cast(dict[int, object], shared))
    for parent in list(twin.modules()):
        for name, layer in parent.named_children():
            setattr(parent, name, _faster(layer))
    return twin


def _faster(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels:
        return InstanceNorm(layer)
    if isinstance(layer, nn.AvgPool2d) and (layer.kernel_size, layer.stride) == (2, 2):
        return PoolByReshape()
    return layer
