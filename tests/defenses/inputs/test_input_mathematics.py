"""The mathematics of the defenses of inputs, each against another computation."""

from __future__ import annotations

import itertools
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from distillsec.defenses import DEFENSES
from distillsec.defenses.common.blur import BlurOptions, blurred
from distillsec.defenses.common.codec import through_jpeg
from distillsec.defenses.common.corruptions import CORRUPTIONS, SEVERITIES
from distillsec.defenses.common.maps import feature_map, split_at_last_maps
from distillsec.defenses.inputs.autoencoder import AutoencoderOptions, train_autoencoder
from distillsec.defenses.inputs.ibd_psc import amplify
from distillsec.defenses.inputs.randomized_smoothing import vote
from distillsec.defenses.inputs.scale_up import consistency
from distillsec.defenses.inputs.sentinet import saliency, salient, upper_parabola
from distillsec.defenses.inputs.shrinkpad import places, shrink_and_pad, shrinkage
from distillsec.defenses.inputs.strip import StripOptions, entropy, mean_entropy
from distillsec.defenses.inputs.teco import onset
from distillsec.distill.batch_norm import batch_norm_layers
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import Network, NetworkSpec
from distillsec.distill.preprocessing import Preprocessing

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def some(count: int = 6, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def network(shape: tuple[int, int, int] = (1, 8, 8), **spec: object) -> nn.Module:
    settings = {"network": "convnet", "width": 4, "depth": 1, **spec}
    space = Preprocessing((0.5,) * shape[0], (0.25,) * shape[0])
    maker = NetworkMaker(
        spec=NetworkSpec.model_validate(settings), image_shape=shape, classes=3, preprocessing=space
    )
    return maker(0).eval()


# STRIP, SCALE-UP ---------------------------------------------------------------------------------


def test_entropy_is_scipys() -> None:
    logits = 5 * torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    expected = stats.entropy(logits.softmax(dim=1).numpy(), base=2, axis=1)
    assert np.allclose(entropy(logits).numpy(), expected, atol=1e-6)
    assert entropy(torch.tensor([[1000.0, 0.0]])).item() == 0


def test_the_mean_entropy_goes_over_every_overlay() -> None:
    images, overlays, net = some(3), some(4, seed=2), network()
    with torch.no_grad():
        each = [[entropy(net((i + 0.5 * o)[None])) for o in overlays] for i in images]
    expected = torch.tensor([[float(e) for e in row] for row in each]).mean(dim=1)
    found = mean_entropy(net, images, overlays, (1.0, 0.5))
    assert torch.allclose(found.float(), expected, atol=1e-5)


def test_strips_threshold_rejects_one_in_a_hundred(badnets: Case) -> None:
    strip = DEFENSES["strip"](StripOptions(copies=10))
    held = strip.score_inputs(badnets.view, badnets.view.holdout.images)  # type: ignore[attr-defined]
    expected = -(-held.mean() - 2.3263 * held.std(correction=0))
    assert strip.threshold(badnets.view) == pytest.approx(float(expected), rel=1e-3)  # type: ignore[attr-defined]


class Dark(nn.Module):
    """Class 1 where an image's mean is above a half."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def test_consistency_counts_the_multipliers() -> None:
    images = torch.stack([torch.full((1, 4, 4), value) for value in (0.01, 0.15, 0.2, 0.7)])
    predicted = Dark()(images).argmax(dim=1)
    # 0.15 · 3 is dark, 0.15 · 5 is not; 0.2 · 3 is not; 0.7 stays bright; 0.01 · 11 stays dark.
    found = consistency(Dark(), images, predicted, (3, 5, 7, 9, 11))
    assert found.tolist() == pytest.approx([1.0, 0.2, 0.0, 1.0])


# TeCo --------------------------------------------------------------------------------------------


def test_onset_is_the_first_change() -> None:
    predicted = torch.tensor([0, 1, 2])
    answers = [torch.tensor(row) for row in ([0, 2, 2], [0, 1, 2], [1, 1, 2])]
    assert onset(predicted, answers).tolist() == [3, 1, 4]


SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_of_an_image_do_not_depend_on_the_others(name: str) -> None:
    """In range, of the same shape, the same alone as in company, the same twice, no copy."""
    for shape, severity in itertools.product(SHAPES, (1, SEVERITIES)):
        images = some(3, shape)
        found = CORRUPTIONS[name](images, severity, torch.Generator().manual_seed(4))
        assert found.shape == images.shape and found.dtype == images.dtype
        assert float(found.min()) >= 0 and float(found.max()) <= 1
        alone = CORRUPTIONS[name](images[1:2], severity, torch.Generator().manual_seed(4))
        assert torch.allclose(found[1:2], alone, atol=1e-6)
    assert not found.equal(images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_grow(name: str) -> None:
    side = torch.linspace(0, 1, 32)
    waves = 0.5 + 0.4 * torch.sin(12 * side)[:, None] * torch.cos(9 * side)[None]
    images = waves.expand(4, 3, 32, 32)
    far = []
    for severity in (1, SEVERITIES):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
        found = [CORRUPTIONS[name](images, severity, seed) for seed in seeds]
        far.append(float(torch.stack([(each - images).abs().mean() for each in found]).mean()))
    assert 0 < far[0] < far[1]


def test_noise_has_its_published_strength() -> None:
    """The severities of ImageNet-C; shot noise is Poisson's, with its mean and variance."""
    grey = torch.full((1, 1, 200, 200), 0.5)
    generator = torch.Generator().manual_seed(0)
    noisy = CORRUPTIONS["gaussian-noise"](grey, 2, generator)
    assert float(noisy.std()) == pytest.approx(0.12, rel=0.03)
    shot = CORRUPTIONS["shot-noise"](grey, 3, generator)  # 12 photons
    counts = (12 * shot).round()
    assert torch.allclose(counts, 12 * shot, atol=1e-5)
    for count in (0, 3, 6, 9):
        expected = stats.poisson.pmf(count, 6)
        assert float((counts == count).double().mean()) == pytest.approx(expected, abs=0.006)
    struck = CORRUPTIONS["impulse-noise"](grey, 5, generator)
    assert float((struck != 0.5).double().mean()) == pytest.approx(0.27, rel=0.05)


# SentiNet ----------------------------------------------------------------------------------------


def test_saliency_is_gradcam_where_maps_are_averaged() -> None:
    net = network(network="resnet18", width=None, depth=None, shape=(1, 12, 12))
    assert isinstance(net, Network)
    images, labels = some(3, (1, 12, 12)), torch.tensor([0, 2, 1])
    halves = split_at_last_maps(net)
    assert halves is not None
    maps = halves.maps(net.normalise(images)).detach()
    weights = net.head.weight[labels]  # the gradient of each place is the same share of them
    heat = (weights[:, :, None, None] * maps).sum(dim=1).relu() / maps[0, 0].numel()
    large = nn.functional.interpolate(heat[:, None], (12, 12), mode="bilinear")[:, 0]
    assert torch.allclose(saliency(net, images, labels), large.detach(), atol=1e-6)


def test_saliency_is_gradient_times_activation() -> None:
    net = network(width=5, depth=2)
    assert isinstance(net, Network)
    images, labels = some(4), torch.tensor([0, 2, 1, 0])
    halves = split_at_last_maps(net)
    assert halves is not None
    maps = halves.maps(net.normalise(images)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.head(net.trunk[-2:](maps))[range(4), labels].sum(), maps)  # type: ignore[index]
    expected = (gradient * maps).sum(dim=1).relu().detach()
    found = saliency(net, images, labels)
    assert found.shape == (4, 8, 8)
    assert expected.shape == (4, 4, 4) and float(expected.max()) > 0  # before the last pooling
    flat = nn.functional.interpolate(expected[:, None], (8, 8), mode="bilinear")[:, 0]
    assert torch.allclose(found, flat, atol=1e-6)


def test_the_mask_has_its_share_of_the_highest_saliency() -> None:
    heat = torch.arange(16.0).view(1, 4, 4)
    assert salient(heat, 0.25)[0, 0].flatten().nonzero().flatten().tolist() == [12, 13, 14, 15]
    assert salient(torch.zeros(2, 4, 4), 0.25).sum(dim=(1, 2, 3)).tolist() == [4, 4]


def test_the_boundary_goes_through_the_highest_points() -> None:
    x = np.repeat(np.arange(0.11, 0.9, 0.02), 3)  # a bin's middle each
    top = 0.8 * x**2 - 0.3 * x + 0.2
    below = top - np.tile([0.05, 0.0, 0.1], 40)
    assert np.allclose(upper_parabola(x, below), [0.8, -0.3, 0.2], atol=1e-9)
    assert np.allclose(np.polyval(upper_parabola(np.full(3, 0.5), np.array([1, 3, 2])), 0.5), 3)


def test_the_two_parts_are_the_network() -> None:
    images = some(5)
    for spec in (
        {"depth": 2},
        {"network": "resnet18", "norm": "batch", "width": None, "depth": None},
    ):
        net = network(**spec)
        halves = split_at_last_maps(net)
        assert halves is not None and isinstance(net, Network)
        maps = feature_map(net, images)
        assert maps.ndim == 4
        with torch.no_grad():
            assert torch.allclose(halves.rest(maps), net(images), atol=1e-5)
    assert feature_map(network(depth=2), images).shape == (5, 4, 4, 4)
    perceptron = network(network="mlp", width=7, depth=1)
    assert split_at_last_maps(perceptron) is None
    assert feature_map(perceptron, images).shape == (5, 7, 1, 1)


# IBD-PSC -----------------------------------------------------------------------------------------


def test_the_last_batch_norms_are_amplified() -> None:
    net = network(depth=3, norm="batch", pooling="none")
    changed = amplify(net, 2, 1.5)
    pairs = list(zip(batch_norm_layers(net), batch_norm_layers(changed), strict=True))
    for number, (before, after) in enumerate(pairs):
        factor = 1.5 if number >= 1 else 1.0
        for old, new in zip(before.parameters(), after.parameters(), strict=True):
            assert torch.allclose(new, factor * old)
    assert torch.equal(net.head.weight, changed.head.weight)  # type: ignore[union-attr, arg-type]


# What answers ------------------------------------------------------------------------------------


def test_shrinking_and_padding() -> None:
    images = torch.ones(3, 1, 32, 32)
    gone = shrinkage(images, 0.125)
    assert gone == (4, 4) and shrinkage(some(), 0.01) == (1, 1)  # a pixel at least
    corners = [(0, 0), (4, 4), (2, 0)]
    found = shrink_and_pad(images, gone, corners)
    for image, (top, left) in zip(found, corners, strict=True):
        inside = image[:, top : top + 28, left : left + 28]
        assert torch.allclose(inside, torch.ones(1, 28, 28))
        assert float(image.sum()) == pytest.approx(28 * 28)


def test_a_place_is_random_and_depends_on_the_image_alone() -> None:
    images = some(200)
    found = places(images, (2, 3), 7)
    assert set(found) == set(itertools.product(range(3), range(4)))
    assert places(images[5:6], (2, 3), 7) == found[5:6]
    assert places(images, (2, 3), 8) != found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_codec_is_pillows(shape: tuple[int, int, int]) -> None:
    images = some(2, shape) * 1.4 - 0.2
    found = through_jpeg(images, 75)
    pixels = (images[1].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = BytesIO()
    Image.fromarray(pixels[:, :, 0] if shape[0] == 1 else pixels).save(file, "JPEG", quality=75)
    expected = np.asarray(Image.open(file))
    expected = expected[None] if shape[0] == 1 else expected.transpose(2, 0, 1)
    assert np.array_equal((found[1] * 255).round().byte().numpy(), expected)


def test_a_blur_keeps_flat_images_and_its_kernel_fits() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.allclose(blurred(flat, BlurOptions()), flat, atol=1e-6)
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    found = blurred(point, BlurOptions(kernel=3, sigma=1.0))
    weights = np.exp(-0.5 * np.array([1, 0, 1]))
    expected = np.outer(weights, weights) / weights.sum() ** 2
    assert np.allclose(found[0, 0, 3:6, 3:6].numpy(), expected, atol=1e-6)
    assert blurred(point, BlurOptions(kernel=31)).shape == point.shape


@pytest.mark.parametrize("network", ["convolutional", "dense"])
def test_an_autoencoder_learns_its_images(network: Literal["convolutional", "dense"]) -> None:
    """Images of two numbers: what it draws of a new one is nearer than the mean image."""
    angle, size = torch.rand(2, 120, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(0, 1, 8)
    images = (
        (size[:, None] * grid + angle[:, None]).clamp(0, 1)[:, None, :, None].expand(-1, 1, 8, 8)
    )
    options = AutoencoderOptions(network=network, code=4, epochs=30, lr=4e-3)
    coder = train_autoencoder(images[:100], options, torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (coder(images[100:]) - images[100:]).square().mean()
    assert error < 0.2 * (images[:100].mean(dim=0) - images[100:]).square().mean()
    short = options.model_copy(update={"epochs": 2})
    first, second = (
        train_autoencoder(images[:100], short, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first(images), second(images))


def test_most_noisy_copies_decide() -> None:
    images = torch.stack([torch.full((1, 2, 2), value) for value in (0.45, 0.9)])
    noise = torch.tensor([0.1, 0.1, -0.3]).view(3, 1, 1, 1).expand(-1, 1, 2, 2)
    assert vote(Dark(), images, noise, 2).tolist() == [1, 1]  # 0.55, 0.55, 0.15; all bright
    assert vote(Dark(), images, noise[1:], 2).tolist() == [0, 1]  # even: the smaller class
