"""Which layers of a network keep statistics of the batches that they see."""

from __future__ import annotations

from torch import nn


def batch_norm_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of ``network`` that keep running statistics of batches, in forward order."""
    return [
        layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
