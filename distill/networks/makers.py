"""Fresh networks by seed, and the features that enter a network's last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

from torch import Tensor, nn

from ..engine import PLAIN, Engine
from ..preprocessing import Preprocessing
from .layers import Shape
from .registry import NetworkSpec, build_network


@final
@dataclass(frozen=True, kw_only=True)
class NetworkMaker:
    """Fresh networks of one architecture for one kind of images, by seed.

    spec: which network. image_shape: (C, H, W). classes: how many. preprocessing: what the network
    does with pixels first, on ``device``. engine: how the networks' passes run.
    """

    spec: NetworkSpec
    image_shape: Shape
    classes: int
    preprocessing: Preprocessing
    device: str = "cpu"
    engine: Engine = PLAIN

    def __call__(self, seed: int) -> nn.Module:
        """A network in training mode whose weights depend on ``seed`` alone."""
        return build_network(
            self.spec,
            image_shape=self.image_shape,
            classes=self.classes,
            preprocessing=self.preprocessing,
            seed=seed,
            device=self.device,
        )


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """What enters the network's head, ``(N, features)``, for images in pixel space.

    Errors: ``RequestError`` where a user's network has no ``embed``.
    """
    return cast(Tensor, network.embed(images))  # type: ignore[operator]
