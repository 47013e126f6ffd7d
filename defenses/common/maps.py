"""A network's last feature maps, where it has any."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ...distill.networks.makers import embed
from ...distill.networks.registry import Network
from ...distill.training import in_pieces

_POOLING = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


class Halves(NamedTuple):
    """A network in two: normalised images to its last feature maps, and these to its logits."""

    maps: nn.Sequential
    rest: nn.Sequential


def at_the_last_maps(network: nn.Module) -> Halves | None:
    """``network`` cut at the maps of its last convolution, before they are pooled; ``None`` where
    it has none."""
    if not isinstance(network, Network) or not isinstance(network.trunk, nn.Sequential):
        return None
    layers = list(network.trunk)
    convolving = [number for number, layer in enumerate(layers) if _convolves(layer)]
    if not convolving:
        return None
    end = convolving[-1] + 1
    while end < len(layers) and not isinstance(layers[end], (*_POOLING, nn.Flatten)):
        end += 1
    return Halves(nn.Sequential(*layers[:end]), nn.Sequential(*layers[end:], network.head))


def feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """The last feature maps ``(N, C, H, W)``; flat features as ``(N, F, 1, 1)`` where there are no
    maps."""
    halves = at_the_last_maps(network)
    if halves is None or not isinstance(network, Network):
        return in_pieces(lambda some: embed(network, some), images)[:, :, None, None]
    normalise, maps = network.normalise, halves.maps

    def answer(some: Tensor) -> Tensor:
        found: Tensor = maps(normalise(some))
        return found

    return in_pieces(answer, images)


def blocks(network: nn.Module) -> list[nn.Sequential] | None:
    """``network`` behind its normalisation in pieces, each ending where a block's activation ends;
    the last one holds the head. ``None`` where there is no convolution to cut at.

    A piece's output is the block's feature maps, the last piece's the logits.
    """
    if not isinstance(network, Network) or at_the_last_maps(network) is None:
        return None
    pieces: list[list[nn.Module]] = [[]]
    convolved = False
    for layer in [*network.trunk.children(), network.head]:
        if convolved and (isinstance(layer, (*_POOLING, nn.Flatten)) or _convolves(layer)):
            pieces.append([])
            convolved = False
        pieces[-1].append(layer)
        convolved |= _convolves(layer)
    return [nn.Sequential(*piece) for piece in pieces]


def _convolves(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in layer.modules())
