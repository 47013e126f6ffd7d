"""Networks from pixel space to logits: those of ``NETWORKS``, and the user's own.

A network normalises on entry, so that mean and standard deviation are in one place only. A trunk
(normalised images to flat features) and a linear head follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any, Literal, cast, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..plugins import is_reference, load_object, look_up
from ..preprocessing import Preprocessing
from ..randomness import seeded_weights
from ..types import LARGEST_DEPTH, LARGEST_WIDTH, RequestError
from .architectures import NETWORKS
from .layers import Normalise, Parameters, Shape, Stack

Norm = Literal["instance", "batch", "layer", "group", "none"]
Activation = Literal["relu", "leaky-relu", "sigmoid", "swish"]
Pooling = Literal["avg", "max", "none"]


class NetworkSpec(BaseModel):
    """Which network; ``None`` is the architecture's published value (``NETWORKS`` has them)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(default="convnet", description="a name, or package.module:Class")
    width: int | None = Field(
        default=None, ge=1, le=LARGEST_WIDTH, description="channels or units of a layer"
    )
    depth: int | None = Field(
        default=None, ge=1, le=LARGEST_DEPTH, description="how many blocks or hidden layers"
    )
    norm: Norm | None = Field(default=None, description="normalisation after each convolution")
    activation: Activation | None = Field(default=None, description="activation function")
    pooling: Pooling | None = Field(default=None, description="pooling after each block")
    head: int | None = Field(
        default=None,
        ge=0,
        le=LARGEST_WIDTH,
        description="hidden units before the last linear layer; 0 for none",
    )


@final
class Network(nn.Module):
    """normalise, trunk, head. trunk: normalised images to ``(N, features)``, activated.

    kind: equal for networks that differ in their weights only; ``None`` where that is not known.
    """

    kind: Hashable = None

    def __init__(self, normalise: Normalise, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.normalise = normalise
        self.trunk = trunk
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)`` in pixel space."""
        return cast(Tensor, self.head(self.embed(pixels)))

    def embed(self, pixels: Tensor) -> Tensor:
        """The head's input, ``(N, features)``, of images ``(N, C, H, W)`` in pixel space."""
        return cast(Tensor, self.trunk(self.normalise(pixels)))


@final
class UserNetwork(nn.Module):
    """A user's own module (normalised images to logits) behind the suite's normalisation."""

    def __init__(self, normalise: Normalise, body: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.body = body

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)`` in pixel space."""
        return cast(Tensor, self.body(self.normalise(pixels)))

    def embed(self, pixels: Tensor) -> Tensor:
        """What the module's own ``embed`` gives; a ``RequestError`` if it has none."""
        embed = getattr(self.body, "embed", None)
        if not callable(embed):
            name = type(self.body).__name__
            raise RequestError(f"network {name} lacks a method embed(images) -> (N, features)")
        return cast(Tensor, embed(self.normalise(pixels)))


def build_network(
    spec: NetworkSpec,
    *,
    image_shape: Shape,
    classes: int,
    preprocessing: Preprocessing,
    seed: int,
    device: torch.device | str = "cpu",
) -> Network | UserNetwork:
    """A network in training mode, with PyTorch's default initialisation drawn from ``seed`` alone.

    image_shape: (C, H, W). preprocessing: what the network does with pixels first, on ``device``.
    The global generators are left as they were; weights are drawn on the CPU, so that every device
    gets the same ones.

    ``RequestError``: an unknown name, a parameter that the architecture does not take, an image too
    small for it, a mean or std that does not fit the channels, a user's class that does not fit.
    """
    mean, std = preprocessing.mean, preprocessing.std
    if not len(mean) == len(std) == image_shape[0] or min(std) <= 0:
        raise RequestError(
            f"mean {mean} and std {std} must have one value for each of the "
            f"{image_shape[0]} channels, std above 0"
        )
    with seeded_weights(seed):
        normalise = Normalise(preprocessing)
        network: Network | UserNetwork
        if is_reference(spec.network):
            network = UserNetwork(normalise, _user_body(spec, image_shape, classes))
        else:
            network = _build(spec, normalise, image_shape, classes)
            network.kind = (spec, image_shape, classes, mean, std, id(preprocessing.zca))
    return network.to(device)


def plain_network(spec: NetworkSpec, image_shape: Shape, classes: int) -> Network:
    """A network of ``NETWORKS`` whose normalisation changes nothing, for normalised images.

    Weights are drawn from torch's generator. Errors: as for ``build_network``.
    """
    channels = image_shape[0]
    plain = Preprocessing((0.0,) * channels, (1.0,) * channels)
    return _build(spec, Normalise(plain), image_shape, classes)


def count_parameters(spec: NetworkSpec, image_shape: Shape, classes: int) -> int:
    """The number of parameters of a network of ``NETWORKS``, without allocating them.

    Errors: as for ``build_network``.
    """
    with torch.device("meta"):
        network = plain_network(spec, image_shape, classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _build(spec: NetworkSpec, normalise: Normalise, image_shape: Shape, classes: int) -> Network:
    entry = look_up(spec.network, NETWORKS, "network")
    parameters = _parameters(spec, entry.published)
    margin = entry.margin(image_shape)
    smallest = entry.smallest(parameters)
    if min(image_shape[1:]) + 2 * margin < smallest:
        values = ", ".join(f"{name} {getattr(parameters, name)}" for name in entry.published)
        raise RequestError(
            f"{spec.network} ({values}) needs images of at least {smallest} pixels a side, "
            f"got {image_shape[1]}x{image_shape[2]}"
        )
    stack = Stack(parameters, image_shape, margin)
    entry.build(stack)
    if parameters.head:
        stack.linear(parameters.head)
    stack.flatten()
    return Network(normalise, nn.Sequential(*stack.layers), nn.Linear(stack.features, classes))


def _parameters(spec: NetworkSpec, published: Mapping[str, int | str]) -> Parameters:
    given = spec.model_dump(exclude={"network"}, exclude_none=True)
    for name in given:
        if name not in published:
            takes = ", ".join(published) or "none"
            raise RequestError(f"{spec.network} has no parameter {name}; it takes {takes}")
    values: dict[str, Any] = {**published, **given}
    parameters = Parameters(**values)
    if parameters.norm == "group" and parameters.width % 4:
        raise RequestError(f"group norm has 4 groups, so width {parameters.width} must divide by 4")
    return parameters


def _user_body(spec: NetworkSpec, image_shape: Shape, classes: int) -> nn.Module:
    _parameters(spec, {})
    made = load_object(spec.network, "network")
    try:
        inspect.signature(made).bind(image_shape=image_shape, classes=classes)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"network {spec.network} cannot be called with image_shape=..., classes=...: {error}"
        ) from error
    try:
        body = made(image_shape=image_shape, classes=classes)
        with torch.no_grad():
            shape = tuple(body.eval()(torch.zeros(1, *image_shape)).shape)
    # The user's code runs here: whatever it raises, the request cannot be met.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"network {spec.network} failed on {image_shape}: {reason}") from error
    if not isinstance(body, nn.Module) or shape != (1, classes):
        raise RequestError(
            f"network {spec.network} must be a torch.nn.Module with logits {(1, classes)} for one "
            f"image; it is a {type(body).__name__} with {shape}"
        )
    return body.train()


def penultimate_linear(network: nn.Module) -> nn.Linear | None:
    """The linear layer whose activation feeds the head, or ``None`` where there is none."""
    if not isinstance(network, Network) or not isinstance(network.trunk, nn.Sequential):
        return None
    # Stack.linear ends a trunk so: the layer, then its activation.
    layer = network.trunk[-2] if len(network.trunk) > 1 else None
    return layer if isinstance(layer, nn.Linear) else None
