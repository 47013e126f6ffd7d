"""Networks: published sizes, shapes, seeds, refusals, and the user's own classes."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
import torch
from torch import nn

from distillsec.distill.batch_norm import batch_norm_layers
from distillsec.distill.networks.architectures import NETWORKS
from distillsec.distill.networks.registry import (
    Network,
    NetworkSpec,
    Norm,
    UserNetwork,
    build_network,
    penultimate_linear,
)
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import RequestError

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
TOO_SMALL = {"vgg11": 32, "resnet18": 9, "lenet": 16}


def build(
    network: str = "convnet",
    shape: tuple[int, int, int] = CIFAR,
    seed: int = 0,
    classes: int = 10,
    **parameters: Any,
) -> Network | UserNetwork:
    mean, std = (0.5, 0.4, 0.3)[: shape[0]], (0.25, 0.2, 0.3)[: shape[0]]
    spec = NetworkSpec(network=network, **parameters)
    return build_network(
        spec, image_shape=shape, classes=classes, preprocessing=Preprocessing(mean, std), seed=seed
    )


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Added up by hand, layer by layer: weights + biases (convolution), 2 per channel (norm), head.
CONVNET_CIFAR = (3 * 9 * 128 + 128) + 2 * (128 * 9 * 128 + 128) + 3 * 256 + (2048 * 10 + 10)
BAADD_GREY = (9 * 128 + 128) + 2 * (128 * 9 * 128 + 128) + (2048 * 192 + 192) + (192 * 10 + 10)
ALEXNET_CIFAR = 9728 + 614_592 + 442_624 + 442_560 + 331_968 + (3072 * 10 + 10)
LENET_GREY = 156 + 2416 + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
MLP_MNIST = (784 * 128 + 128) + (128 * 128 + 128) + (128 * 10 + 10)


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        ("convnet", CIFAR, 320_010),  # as published
        ("convnet", CIFAR, CONVNET_CIFAR),
        ("convnet-baadd", MNIST, BAADD_GREY),
        ("convnet-baadd", (1, 32, 32), BAADD_GREY),
        ("alexnet", CIFAR, ALEXNET_CIFAR),
        ("vgg11", CIFAR, 9_231_114),  # as published for these CIFAR variants, norm affine
        ("resnet18", CIFAR, 11_173_962),
        ("lenet", MNIST, LENET_GREY),
        ("lenet", (1, 32, 32), LENET_GREY),
        ("mlp", MNIST, MLP_MNIST),
    ],
)
def test_parameter_counts(network: str, shape: tuple[int, int, int], expected: int) -> None:
    assert count(build(network, shape)) == expected


@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_an_image_or_says_what_it_needs(
    name: str, shape: tuple[int, int, int]
) -> None:
    if shape[1] == 8 and name in TOO_SMALL:
        least = f"{name} .*needs images of at least {TOO_SMALL[name]} pixels a side, got 8x8"
        with pytest.raises(RequestError, match=least):
            build(name, shape)
        return
    network = build(name, shape, classes=7)
    images = torch.rand(1, *shape)
    with torch.no_grad():
        features, logits = network.embed(images), network(images)
    assert isinstance(network, Network)
    assert logits.shape == (1, 7)
    assert features.shape == (1, network.head.in_features)
    assert torch.equal(logits, network.head(features))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_side_that_a_refusal_names_is_taken(name: str) -> None:
    least = {"convnet": 8, "convnet-baadd": 8, "alexnet": 8, "mlp": 1, **TOO_SMALL}[name]
    logits = build(name, (3, least, least))(torch.rand(2, 3, least, least))
    assert not torch.equal(logits[0], logits[1])
    if least > 1:
        with pytest.raises(RequestError, match=f"at least {least} pixels"):
            build(name, (3, 40, least - 1))


def test_resnet18_takes_digits_unless_its_norm_would_erase_them() -> None:
    network = build("resnet18", DIGITS, norm="batch")
    logits = network(torch.rand(2, *DIGITS))
    assert not torch.equal(logits[0], logits[1])


def test_normalisation_is_the_first_layer() -> None:
    network = build()
    assert isinstance(network, Network)
    images = torch.rand(2, *CIFAR)
    mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    std = torch.tensor([0.25, 0.2, 0.3]).view(1, 3, 1, 1)
    assert torch.equal(network(images), network.head(network.trunk((images - mean) / std)))
    assert {"normalise.mean", "normalise.std"} < network.state_dict().keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_alone_decides(name: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = build(name, seed=2**62 + 1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    same, other = build(name, seed=2**62 + 1).state_dict(), build(name, seed=3)
    assert all(torch.equal(one[key], same[key]) for key in one)
    changed = [not torch.equal(one[key], value) for key, value in other.state_dict().items()]
    assert any(changed)


@pytest.mark.gpu
def test_weights_are_the_same_on_every_device_and_its_generator_untouched() -> None:
    before = torch.cuda.get_rng_state()
    spec = NetworkSpec(width=8)
    on_gpu = build_network(
        spec,
        image_shape=DIGITS,
        classes=10,
        preprocessing=Preprocessing((0.5,), (0.3,)),
        seed=1,
        device="cuda",
    )
    assert torch.equal(torch.cuda.get_rng_state(), before)
    on_cpu = build_network(
        spec, image_shape=DIGITS, classes=10, preprocessing=Preprocessing((0.5,), (0.3,)), seed=1
    )
    for one, other in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert one.is_cuda
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_and_double_backward_are_safe(name: str) -> None:
    shape = (1, 16, 16) if name in ("resnet18", "lenet") else MNIST if name == "vgg11" else DIGITS
    network = build(name, shape)
    inplace = [layer for layer in network.modules() if getattr(layer, "inplace", False)]
    assert not inplace
    images = torch.rand(1, *shape, requires_grad=True)
    weights = list(network.parameters())
    gradients = torch.autograd.grad(network(images).square().sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(torch.cat([g.flatten() for g in gradients]).norm(), images)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


def test_convnet_baadd_has_the_reference_layers() -> None:
    network = build("convnet-baadd", MNIST)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [
        (128, 1, 3, 3),
        (128, 128, 3, 3),
        (128, 128, 3, 3),
    ]
    assert [layer.padding for layer in convolutions] == [(3, 3), (1, 1), (1, 1)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(192, 2048), (10, 192)]
    assert not [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    for shape, padding in (((1, 32, 32), 3), (CIFAR, 1), (DIGITS, 1)):
        first = next(m for m in build("convnet-baadd", shape).modules() if isinstance(m, nn.Conv2d))
        assert first.padding == (padding, padding)


def test_convnet_pads_28_pixels_to_32_and_nothing_else() -> None:
    for shape, padding in ((MNIST, 3), ((3, 28, 28), 3), ((1, 32, 32), 1), (DIGITS, 1)):
        first = next(m for m in build("convnet", shape).modules() if isinstance(m, nn.Conv2d))
        assert first.padding == (padding, padding)


def test_depth_is_limited_by_pooling() -> None:
    build(shape=DIGITS, depth=3, width=4)
    with pytest.raises(RequestError, match=r"convnet .*depth 4.*at least 16 pixels.*got 8x8"):
        build(shape=DIGITS, depth=4)
    deep = build(shape=DIGITS, depth=4, width=4, pooling="none")
    assert deep(torch.rand(2, *DIGITS)).shape == (2, 10)


def norm_cases() -> list[tuple[str, Norm]]:
    """All norms on the small ConvNet; on each other network that takes one, the two that differ."""
    norms: tuple[Norm, ...] = ("instance", "batch", "layer", "group", "none")
    others = [n for n in NETWORKS if "norm" in NETWORKS[n].published and n != "convnet"]
    return [("convnet", norm) for norm in norms] + [(n, v) for n in others for v in norms[1:3]]


@pytest.mark.parametrize(("name", "norm"), norm_cases())
def test_norms(name: str, norm: Norm) -> None:
    network = build(name, MNIST, norm=norm, activation="leaky-relu")
    assert network(torch.rand(1, *MNIST)).shape == (1, 10)
    kinds = {"instance": nn.GroupNorm, "batch": nn.BatchNorm2d, "layer": nn.LayerNorm}
    kinds["group"] = nn.GroupNorm
    norms = [m for m in network.modules() if isinstance(m, tuple(kinds.values()))]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == (0 if norm == "none" else len(convolutions))
    assert all(isinstance(layer, kinds[norm]) for layer in norms)
    assert batch_norm_layers(network) == (norms if norm == "batch" else [])


@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "sigmoid", "swish"])
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_activations_and_pooling(activation: Any, pooling: Any) -> None:
    network = build(shape=DIGITS, width=4, depth=2, activation=activation, pooling=pooling)
    assert isinstance(network, Network)
    assert network.head.in_features == (4 * 64 if pooling == "none" else 4 * 4)
    features = network.embed(torch.randn(8, *DIGITS) * 9)
    assert (features.min() >= 0) == (activation in ("relu", "sigmoid"))


def test_penultimate_linear() -> None:
    shapes = {}
    for name in NETWORKS:
        layer = penultimate_linear(build(name))
        shapes[name] = None if layer is None else tuple(layer.weight.shape)
    assert shapes == {
        "convnet": None,
        "convnet-baadd": (192, 2048),
        "alexnet": None,
        "vgg11": None,
        "resnet18": None,
        "lenet": (84, 120),
        "mlp": (128, 128),
    }
    hidden = build(head=16)
    layer = penultimate_linear(hidden)
    images = torch.rand(3, *CIFAR)
    seen: list[torch.Tensor] = []
    assert layer is not None
    layer.register_forward_hook(lambda _, __, out: seen.append(out))
    assert torch.equal(hidden.embed(images), seen[0].relu())
    assert penultimate_linear(build("convnet-baadd", head=0)) is None


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"depth": 0}, {"head": -1}, {"norm": "b"}, {"x": 1}]
)
def test_impossible_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        NetworkSpec(**wrong)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        NetworkSpec().width = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("network", "parameters", "message"),
    [
        ("lenet", {"depth": 2}, "^lenet has no parameter depth; it takes activation$"),
        ("vgg11", {"width": 2}, "has no parameter width; it takes norm, activation, head"),
        ("convnet", {"width": 6, "norm": "group"}, "width 6 must divide by 4"),
        ("convet", {}, r"unknown network 'convet'; .*mlp; did you mean convnet\?$"),
        ("ResNet18", {}, r"did you mean resnet18\?$"),
        ("transformer", {}, "there are convnet, convnet-baadd, .*mlp$"),
    ],
)
def test_refusals(network: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(network, **parameters)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.2,) * 3), ((0.5,) * 3, (0.2, 0.2, 0.0))])
def test_mean_and_std_fit_the_channels(mean: tuple[float], std: tuple[float]) -> None:
    with pytest.raises(RequestError, match="one value for each of the 3 channels"):
        build_network(
            NetworkSpec(),
            image_shape=CIFAR,
            classes=2,
            preprocessing=Preprocessing(mean, std),
            seed=0,
        )
