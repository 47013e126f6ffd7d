"""Fresh networks by seed, and the features that enter a network's last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final

from pydantic import ValidationError
from torch import Tensor, nn

from ..engine import PLAIN, Engine
from ..plugins import look_up
from ..preprocessing import Preprocessing
from ..types import RequestError
from .architectures import NETWORKS
from .layers import Shape
from .registry import NetworkSpec, build_network, plain_network


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


@final
@dataclass(frozen=True)
class NetworkKind:
    """An architecture of ``NETWORKS`` with its parameters; makes networks on normalised images."""

    spec: NetworkSpec

    def __call__(self, image_shape: Shape, classes: int) -> nn.Module:
        """A network from normalised images ``(N, C, H, W)`` to logits ``(N, classes)``.

        Its weights are drawn from torch's generator: the caller seeds it where that matters.
        """
        return plain_network(self.spec, image_shape, classes)


def network(name: str = "convnet", **parameters: Any) -> NetworkKind:
    """An architecture of ``NETWORKS``: for ``DistilledSet.train``, or a part of one's own network.

    parameters: ``width``, ``depth``, ``norm``, ``activation``, ``pooling``, ``head``, as the
    architecture takes them.
    Errors: ``RequestError`` for an unknown name or parameter, or an impossible value.
    """
    look_up(name, NETWORKS, "network")
    try:
        return NetworkKind(NetworkSpec(network=name, **parameters))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"network {name}: {key}: {first['msg'].lower()}") from error


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """What enters the network's head, ``(N, features)``, for images in pixel space.

    Errors: ``RequestError`` where a user's network has no ``embed``.
    """
    return cast(Tensor, network.embed(images))  # type: ignore[operator]
