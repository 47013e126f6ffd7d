"""The literature's networks: a new one is a function that builds its trunk, and an entry here.

With equal weights the networks compute what the dataset condensation code's (Zhao et al.) and the
backdoor paper's do, on grey 28x28 and colour 32x32 images. Deviations: other image sizes work too,
because 28x28 images, not all grey ones, are padded to 32x32 (``convnet-baadd`` pads grey ones) and
ResNet pools over the whole map; and the features are always what enters the last linear layer,
where the reference's ``embed`` stops before the hidden layer of ``convnet-baadd``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from .layers import Parameters, Shape, Stack


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
