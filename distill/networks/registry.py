"""The literature's networks, each from pixel space to logits, and the user's own.

A network normalises on entry, so that mean and standard deviation live in one place only. What
lies between is a trunk (normalised images to flat features) and a linear head on its features.
With equal weights the networks compute what the dataset condensation code's (Zhao et al.) and the
backdoor paper's do, on grey 28x28 and colour 32x32 images. Deviations: other image sizes work as
well, because 28x28 images, not all grey ones, are padded to 32x32 (``convnet-baadd`` keeps padding
grey ones) and ResNet pools over the whole map; and the features are always what enters the last
linear layer, where the reference's ``embed`` stops before the hidden layer of ``convnet-baadd``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..plugins import is_reference, load_object, look_up
from ..preprocessing import Zca
from ..randomness import seeded_weights
from ..types import RequestError
from .layers import Normalise, Parameters, Shape, Stack

Norm = Literal["instance", "batch", "layer", "group", "none"]
Activation = Literal["relu", "leaky-relu", "sigmoid", "swish"]
Pooling = Literal["avg", "max", "none"]


class NetworkSpec(BaseModel):
    """Which network; ``None`` is the architecture's published value (``NETWORKS`` has them)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(default="convnet", description="a name, or package.module:Class")
    width: int | None = Field(default=None, ge=1, description="channels or units of a layer")
    depth: int | None = Field(default=None, ge=1, description="how many blocks or hidden layers")
    norm: Norm | None = Field(default=None, description="normalisation after each convolution")
    activation: Activation | None = Field(default=None, description="activation function")
    pooling: Pooling | None = Field(default=None, description="pooling after each block")
    head: int | None = Field(
        default=None, ge=0, description="hidden units before the last linear layer; 0 for none"
    )


@final
class Network(nn.Module):
    """normalise, trunk, head. trunk: normalised images to ``(N, features)``, activated."""

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


def _convnet(stack: Stack) -> None:
    for _ in range(stack.parameters.depth):
        stack.conv(stack.parameters.width)
        stack.pool(stack.parameters.pooling)


def _alexnet(stack: Stack) -> None:
    stack.conv(128, 5, padding=2)
    stack.pool("max")
    stack.conv(192, 5, padding=2)
    stack.pool("max")
    for channels in (256, 192, 192):
        stack.conv(channels)
    stack.pool("max")


def _vgg11(stack: Stack) -> None:
    for block in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for channels in block:
            stack.conv(channels)
        stack.pool("max")


def _resnet18(stack: Stack) -> None:
    stack.conv(64, bias=False)
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        stack.residual(channels, stride)
        stack.residual(channels, 1)
    stack.pool_globally()


def _lenet(stack: Stack) -> None:
    for channels in (6, 16):
        stack.conv(channels, 5, padding=0)
        stack.pool("max")
    for units in (120, 84):
        stack.linear(units)


def _mlp(stack: Stack) -> None:
    for _ in range(stack.parameters.depth):
        stack.linear(stack.parameters.width)


def _like_32(image_shape: Shape) -> int:
    """28x28 images are treated as 32x32: two more zeros on each side."""
    return 2 if image_shape[1:] == (28, 28) else 0


def _like_baadd(image_shape: Shape) -> int:
    """The reference pads every grey image, of 28 or 32 pixels, and no other."""
    return 2 if image_shape in ((1, 28, 28), (1, 32, 32)) else 0


def _no_margin(_: Shape) -> int:
    return 0


@final
@dataclass(frozen=True, kw_only=True)
class NetworkEntry:
    """An architecture of the registry.

    build adds the trunk's layers to a stack. published: the parameters it takes with their
    published values; it takes no others. smallest: the least side of an image that it can take.
    margin: the zeros that its first convolution adds on each side for an image shape.
    """

    description: str
    build: Callable[[Stack], None]
    published: Mapping[str, int | str]
    smallest: Callable[[Parameters], int] = lambda _: 1
    margin: Callable[[Shape], int] = _like_32


_CONVNET: dict[str, int | str] = {"width": 128, "depth": 3, "activation": "relu", "pooling": "avg"}
_DEEP: dict[str, int | str] = {"norm": "instance", "activation": "relu", "head": 0}


def _convnet_side(parameters: Parameters) -> int:
    return 1 if parameters.pooling == "none" else 2**parameters.depth


NETWORKS: dict[str, NetworkEntry] = {
    "convnet": NetworkEntry(
        description="the distillation literature's ConvNet (Gidaris and Komodakis, CVPR 2018)",
        build=_convnet,
        published={**_CONVNET, "norm": "instance", "head": 0},
        smallest=_convnet_side,
    ),
    "convnet-baadd": NetworkEntry(
        description="ConvNet of the backdoor paper's code (Liu et al., NDSS 2023): no norm, a "
        "hidden layer of 192 units",
        build=_convnet,
        published={**_CONVNET, "norm": "none", "head": 192},
        smallest=_convnet_side,
        margin=_like_baadd,
    ),
    "alexnet": NetworkEntry(
        description="AlexNet for small images (Krizhevsky et al., NeurIPS 2012)",
        build=_alexnet,
        published={**_DEEP, "norm": "none"},
        smallest=lambda _: 8,
    ),
    "vgg11": NetworkEntry(
        description="VGG-11 with one linear layer (Simonyan and Zisserman, ICLR 2015)",
        build=_vgg11,
        published=_DEEP,
        smallest=lambda _: 32,
    ),
    "resnet18": NetworkEntry(
        description="ResNet-18 with a 3x3 stem (He et al., CVPR 2016)",
        build=_resnet18,
        published=_DEEP,
        # Below it the last blocks see one pixel per channel, and instance norm makes that zero.
        smallest=lambda parameters: 9 if parameters.norm == "instance" else 1,
        margin=_no_margin,
    ),
    "lenet": NetworkEntry(
        description="LeNet-5 with max pooling (LeCun et al., Proc. IEEE 1998)",
        build=_lenet,
        published={"activation": "relu"},
        smallest=lambda _: 16,
    ),
    "mlp": NetworkEntry(
        description="perceptron with hidden layers (the dataset condensation code's)",
        build=_mlp,
        published={"width": 128, "depth": 2, "activation": "relu"},
        margin=_no_margin,
    ),
}


def build_network(
    spec: NetworkSpec,
    *,
    image_shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    zca: Zca | None = None,
    device: torch.device | str = "cpu",
) -> Network | UserNetwork:
    """A network in training mode, with PyTorch's default initialisation drawn from ``seed`` alone.

    image_shape: (C, H, W). mean, std: per channel, pixel units. zca: a whitening that follows them,
    on ``device``. The global generators are left as they were; weights are drawn on the CPU, so
    that every device gets the same ones.

    ``RequestError``: an unknown name, a parameter that the architecture does not take, an image too
    small for it, a mean or std that does not fit the channels, a user's class that does not fit.
    """
    if not len(mean) == len(std) == image_shape[0] or min(std) <= 0:
        raise RequestError(
            f"mean {tuple(mean)} and std {tuple(std)} must have one value for each of the "
            f"{image_shape[0]} channels, std above 0"
        )
    with seeded_weights(seed):
        normalise = Normalise(mean, std, zca)
        network: Network | UserNetwork
        if is_reference(spec.network):
            network = UserNetwork(normalise, _user_body(spec, image_shape, classes))
        else:
            network = _build(spec, normalise, image_shape, classes)
    return network.to(device)


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


def batch_norm_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of ``network`` that keep running statistics of batches, in forward order."""
    return [
        layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
