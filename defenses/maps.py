"""A network's last feature maps, where it has any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distill.makers import embed
from ..distill.networks import Network
from ..distill.training import in_pieces


def before_flattening(network: nn.Module) -> nn.Sequential | None:
    """The layers from normalised images to the last feature maps; ``None`` where there are none."""
    if not isinstance(network, Network) or not isinstance(network.trunk, nn.Sequential):
        return None
    layers = list(network.trunk)
    end = next((i for i, layer in enumerate(layers) if isinstance(layer, nn.Flatten)), len(layers))
    if not any(isinstance(part, nn.Conv2d) for layer in layers[:end] for part in layer.modules()):
        return None
    return nn.Sequential(*layers[:end])


def feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """The last feature maps ``(N, C, H, W)``; flat features as ``(N, F, 1, 1)`` where there are no
    maps."""
    layers = before_flattening(network)
    if layers is None or not isinstance(network, Network):
        return in_pieces(lambda some: embed(network, some), images)[:, :, None, None]
    normalise = network.normalise
    return in_pieces(lambda some: torch.Tensor(layers(normalise(some))), images)
