"""A network of one's own, trained on a distilled set by the set's recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast, final

import torch
from torch import Tensor, nn

from .preprocessing import Preprocessing
from .randomness import Streams, seeded_weights
from .training import fit
from .types import DistilledSet, RequestError

NetworkFunction = Callable[..., nn.Module]
"""Called with ``image_shape=(C, H, W)`` and ``classes=N``; returns a fresh network."""


@final
class PixelNetwork(nn.Module):
    """A network behind the normalisation of a set: images in pixel space to logits."""

    def __init__(self, preprocessing: Preprocessing, body: nn.Module) -> None:
        super().__init__()
        self.preprocessing, self.body = preprocessing, body

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)`` in pixel space."""
        return cast(Tensor, self.body(self.preprocessing.normalise(pixels)))


def train_by_recipe(
    distilled: DistilledSet,
    network: nn.Module | NetworkFunction,
    seed: int,
    device: torch.device | str,
) -> PixelNetwork:
    """As ``DistilledSet.train``, which has the details."""
    streams = Streams(seed)
    with seeded_weights(streams.integer("victim", 0, 0)):
        body = network if isinstance(network, nn.Module) else _made(network, distilled)
    there = distilled.to(device)
    whole = PixelNetwork(there.recipe.preprocessing, body).to(device).train()
    fit(whole, there.batch, there.recipe, streams.generator("victim", 0, 1))
    return whole


def _made(network: NetworkFunction, distilled: DistilledSet) -> nn.Module:
    if not callable(network):
        raise RequestError(
            f"network {network!r:.60}: expected a torch module, or a class or function that makes "
            "one; distillsec.network(NAME) makes one of the suite's"
        )
    arguments = {"image_shape": distilled.image_shape, "classes": len(distilled.classes)}
    try:
        inspect.signature(network).bind(**arguments)
    except TypeError as error:
        raise RequestError(
            f"network {network!r:.60} cannot be called with image_shape=..., classes=...: {error}"
        ) from error
    return network(**arguments)
