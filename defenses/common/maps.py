"""Where a network can be split: at its last feature maps, and into blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ...distill.networks.makers import embed
from ...distill.networks.registry import Network
from ...distill.training import in_pieces

_POOLING = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


class SplitAtMaps(NamedTuple):
    """A network in two parts: normalised images to its last feature maps, and these to logits."""

    maps: nn.Sequential
    rest: nn.Sequential


def split_at_last_maps(network: nn.Module) -> SplitAtMaps | None:
    """``network`` split after its last convolution, before its maps are pooled; ``None`` if it has
    no convolution."""
    if not isinstance(network, Network) or not isinstance(network.trunk, nn.Sequential):
        return None
    layers = list(network.trunk)
    convolutional = [number for number, layer in enumerate(layers) if _has_convolution(layer)]
    if not convolutional:
        return None
    end = convolutional[-1] + 1
    while end < len(layers) and not isinstance(layers[end], (*_POOLING, nn.Flatten)):
        end += 1
    return SplitAtMaps(nn.Sequential(*layers[:end]), nn.Sequential(*layers[end:], network.head))


def feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """The last feature maps ``(N, C, H, W)``; flat features as ``(N, F, 1, 1)`` if there are no
    maps."""
    split = split_at_last_maps(network)
    if split is None or not isinstance(network, Network):
        return in_pieces(lambda some: embed(network, some), images)[:, :, None, None]
    return in_pieces(nn.Sequential(network.normalise, split.maps), images)


def blocks(network: nn.Module) -> list[nn.Sequential] | None:
    """The layers after the normalisation in blocks, each up to the activation after a convolution.

    The output of a block is its feature maps; the last block holds the head and outputs logits.
    ``None`` if the network has no convolution.
    """
    if not isinstance(network, Network) or split_at_last_maps(network) is None:
        return None
    found: list[list[nn.Module]] = [[]]
    complete = False
    for layer in [*network.trunk.children(), network.head]:
        if complete and (isinstance(layer, (*_POOLING, nn.Flatten)) or _has_convolution(layer)):
            found.append([])
            complete = False
        found[-1].append(layer)
        complete |= _has_convolution(layer)
    return [nn.Sequential(*block) for block in found]


def _has_convolution(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in layer.modules())
