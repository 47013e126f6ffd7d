"""The inputs' defenses against numbers from the published codes, on the same weights and images.

Each number names its repository, file and commit. Weights and images are formulas.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pad, resize

from distillsec.defenses.base import DefenderView
from distillsec.defenses.common.corruptions import CORRUPTIONS, streaked
from distillsec.defenses.inputs.autoencoder import colour_coder, grey_coder
from distillsec.defenses.inputs.ibd_psc import IbdPsc, IbdPscOptions, amplified_counts
from distillsec.defenses.inputs.scale_up import ScaleUp, ScaleUpOptions
from distillsec.defenses.inputs.sentinet import distances, over_each
from distillsec.defenses.inputs.shrinkpad import shrink_and_pad
from distillsec.defenses.inputs.teco import Teco, TecoOptions, in_bytes, onset
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, DistilledSet, Recipe


def waves(*shape: int, step: float) -> Tensor:
    count = int(np.prod(shape))
    return torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64)).float().view(shape)


def filled(network: nn.Module, size: float = 1.0) -> nn.Module:
    """``network`` with a sine wave in each parameter, evaluating and frozen."""
    for number, parameter in enumerate(network.parameters()):
        parameter.data = size * waves(*parameter.shape, step=0.7 + 0.31 * number)
    return network.eval().requires_grad_(False)


def small() -> tuple[nn.Module, Tensor]:
    """A network with three batch norms for 1 × 6 × 6, and twelve images."""
    places = torch.arange(1, 37.0)
    rows = [
        (torch.sin(0.15 * (1 + row) * places) + 1) / 2 * (0.25 + 0.06 * row) for row in range(12)
    ]
    images = torch.stack(rows).view(12, 1, 6, 6)
    layers: list[nn.Module] = []
    for channels in (1, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(4, 3))
    filled(network)
    head = network[1]
    assert isinstance(head, nn.Linear)
    head.weight.data *= 15
    head.bias.data = -body(images).mean(dim=0) @ head.weight.T
    return network, images


def view_of(network: nn.Module, held: Batch) -> DefenderView:
    shape = (1, 6, 6)
    recipe = Recipe(preprocessing=Preprocessing((0.5,), (0.25,)), epochs=1, lr=0.1, batch_size=4)
    maker = NetworkMaker(
        spec=NetworkSpec(), image_shape=shape, classes=3, preprocessing=Preprocessing((0.5,), (1,))
    )
    return DefenderView(
        distilled=DistilledSet(batch=held, classes=("a", "b", "c"), recipe=recipe),
        victim=network,
        network=maker,
        holdout=held,
    )


# THUYimingLi/BackdoorBox core/defenses/IBD_PSC.py, IBD_PSC._test, commit af3afd1; the second row
# with five of twelve held-out labels wrong: then one amplified batch norm is enough, not two.
OFFICIAL_PSC = {
    0: "0.131852 0.046357 0.009049 0.000367 0.026216 0.009885 0.070392 0.131398 0.337711 2e-6 0 0",
    5: "0.252957 0.141412 0.021701 0.00215 0.044981 0.031693 0.134221 0.118005 0.325994 0.003457 "
    "5e-6 5e-6",
}


@pytest.mark.parametrize("wrong", OFFICIAL_PSC)
def test_ibd_psc_scores_as_backdoorbox_does(wrong: int) -> None:
    network, images = small()
    labels = network(images).argmax(dim=1)
    assert labels.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 2, 2]
    labels[:wrong] = (labels[:wrong] + 1) % 3
    view, defense = view_of(network, Batch(images=images, labels=labels)), IbdPsc(IbdPscOptions())
    assert defense.caution(view) is None
    found = defense.score_inputs(view, images)
    official = [float(each) for each in OFFICIAL_PSC[wrong].split()]
    assert found.tolist() == pytest.approx(official, abs=2e-5)


def test_ibd_psc_amplifies_one_batch_norm_more_than_are_enough() -> None:
    """The slices ``[:k + 1]`` to ``[:k + 5]`` of a list of 20, of 3, and what has no k."""
    assert amplified_counts(7, 20, 5) == [len(range(20)[: 7 + 1 + more]) for more in range(5)]
    assert amplified_counts(1, 3, 5) == [2, 3, 3, 3, 3]
    assert amplified_counts(None, 3, 5) == [3] * 5


def test_scale_up_scores_as_backdoorbox_does() -> None:
    """BackdoorBox core/defenses/SCALE_UP.py, SCALE_UP._test, commit af3afd1."""
    network, images = small()
    view = view_of(network, Batch(images=images, labels=network(images).argmax(dim=1)))
    found = ScaleUp(ScaleUpOptions()).score_inputs(view, images)
    official = [1.0, 0.8, 0.0, 0.0, 0.0, 1.0, 1.0, 0.4, 0.8, 1.0, 0.2, 0.2]
    assert found.tolist() == pytest.approx(official)


# TeCo --------------------------------------------------------------------------------------------

# bethgelab/imagecorruptions imagecorruptions/corruptions.py, commit c959e65, through corrupt(): the
# mean of the corrupted image and its mean distance from the image, of 255, at severities 1, 3 and
# 5; over 40 draws where it is random. It rounds down to bytes, which takes half a level.
OFFICIAL_CORRUPTIONS: dict[str, list[tuple[float, float]]] = {
    "gaussian-noise": [(128.72, 14.07), (128.72, 29.15), (128.52, 53.59)],
    "shot-noise": [(126.68, 14.73), (121.78, 30.64), (110.1, 55.84)],
    "impulse-noise": [(129.06, 3.8), (129.08, 11.36), (128.87, 34.27)],
    "defocus-blur": [(125.68, 88.58), (126.18, 78.15), (127.49, 80.1)],
    "glass-blur": [(126.69, 79.5), (128.68, 78.56), (130.45, 79.86)],
    "zoom-blur": [(126.31, 52.82), (126.65, 64.33), (127.41, 69.67)],
    "snow": [(165.92, 36.8), (187.83, 58.72), (209.57, 80.46)],
    "fog": [(125.82, 52.17), (124.7, 62.43), (125.27, 65.65)],
    "brightness": [(136.82, 7.74), (146.34, 17.26), (152.55, 23.47)],
    "contrast": [(128.65, 48.78), (128.61, 65.03), (128.61, 77.25)],
    "elastic-transform": [(128.57, 91.43), (128.74, 103.91), (128.58, 87.34)],
    "pixelate": [(129.49, 47.41), (129.26, 70.82), (129.34, 81.28)],
    "jpeg-compression": [(127.5, 34.67), (127.6, 40.0), (127.77, 40.96)],
}
CERTAIN = ("defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "jpeg-compression")


@pytest.mark.parametrize("name", OFFICIAL_CORRUPTIONS)
def test_corruptions_are_as_strong_as_the_packages(name: str) -> None:
    assert OFFICIAL_CORRUPTIONS.keys() | {"motion-blur"} == CORRUPTIONS.keys()
    images = ((waves(1, 3, 32, 32, step=0.05) + 1) / 2 * 255).round() / 255
    seeds = range(1 if name in CERTAIN else 24)
    for severity, (mean, far) in zip((1, 3, 5), OFFICIAL_CORRUPTIONS[name], strict=True):
        drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = 255 * torch.cat([CORRUPTIONS[name](images, severity, each) for each in drawn])
        loose = 0.0 if name in CERTAIN else 0.06
        assert float(found.mean()) == pytest.approx(mean, abs=0.7 + 0.04 * mean * (loose > 0))
        assert float((found - 255 * images).abs().mean()) == pytest.approx(
            far, abs=0.4 + loose * far
        )


@pytest.mark.parametrize(
    ("radius", "sigma", "angle", "mean", "far"),
    [
        (10, 3, 30.0, 130.188, 60.980),
        (15, 12, -44.0, 141.872, 83.039),
        (20, 15, -100.0, 152.329, 81.750),
    ],
)
def test_motion_streaks_are_the_packages(
    radius: int, sigma: float, angle: float, mean: float, far: float
) -> None:
    """The same file's _motion_blur, which gives no random angle; the last loses light."""
    images = ((waves(1, 3, 32, 32, step=0.05) + 1) / 2 * 255).round() / 255
    found = streaked(images, radius, sigma, angle, 1.0)
    assert 255 * float(found.mean()) == pytest.approx(mean, abs=0.02)
    assert 255 * float((found - images).abs().mean()) == pytest.approx(far, abs=0.02)


def test_tecos_score_is_the_published_one() -> None:
    """CGCL-codes/TeCo defense/teco/teco.py: a list of the original's prediction and five more for
    each corruption, its first place that differs from the first, 6 where none does, ``np.std``."""
    lists = np.array(
        [[4, 4, 4, 1, 4, 4], [4, 2, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 0]]
    )
    published = np.std([3, 1, 6, 5])
    answers = torch.from_numpy(lists)
    onsets = [onset(row[:1], list(row[1:, None])) for row in answers]
    assert [int(each) for each in onsets] == [3, 1, 6, 5]
    assert float(torch.stack(onsets).double().std(correction=0)) == pytest.approx(published)


class Bright(nn.Module):
    """Class 0 up to a mean of 0.55, then 1, from 0.75 on 2."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean * 0, (mean - 0.55) * 9, (mean - 0.65) * 18], dim=1)


def test_teco_corrupts_cumulatively() -> None:
    """0.3 brightened by 0.1, 0.2, 0.3: bright after 3 severities, after 2 on top of each other;
    contrast changes no mean: 6, and 1 when the image has been left bright."""
    images = torch.full((2, 1, 6, 6), 0.3)
    view = view_of(Bright(), Batch(images=images, labels=torch.zeros(2, dtype=torch.long)))
    chosen = ("brightness", "contrast")
    for cumulative, onsets in ((False, (3, 6)), (True, (2, 1))):
        options = TecoOptions(corruptions=chosen, cumulative=cumulative)
        found = Teco(options).score_inputs(view, images)
        assert found.tolist() == pytest.approx([float(np.std(onsets))] * 2)


def test_8_bit_values_stay_unchanged() -> None:
    levels = torch.arange(256) / 255
    assert torch.equal(in_bytes(levels), levels) and torch.equal(in_bytes(levels + 0.003), levels)


# SentiNet, ShrinkPad, autoencoder ----------------------------------------------------------------


def test_distances_to_the_boundary_are_the_ports() -> None:
    """vtu81/backdoor-toolbox other_defenses_tool_box/sentinet.py, commit 9d4d909: its minimiser
    finds the first row (0.2 + 0.5 x − 1.5 x²); the rest is by brute force and by hand."""
    x, y = np.array([0.1, 0.5, 0.3, 0.9, 0.05]), np.array([0.9, 0.0, 0.215, 0.6, 0.1])
    official = [0.66057086, -0.0515471, 0.0, 0.65659796, -0.1118034]
    assert distances(np.array([-1.5, 0.5, 0.2]), x, y) == pytest.approx(official, abs=2e-5)
    along = np.linspace(-3, 3, 200001)
    nearest = [np.hypot(along - a, 4 * along**2 - b).min() for a, b in zip(x, y, strict=True)]
    found = distances(np.array([4.0, 0.0, 0.0]), x, y)
    assert np.abs(found) == pytest.approx(nearest, abs=1e-4) and found[0] > 0 > found[3]
    line = (y - x) / 2**0.5
    assert distances(np.array([1.0, 0.0]), x, y) == pytest.approx(line, abs=1e-6)
    assert distances(np.array([0.25]), x, y) == pytest.approx(y - 0.25, abs=1e-6)


def test_a_region_is_pasted_on_each_image() -> None:
    """As the port does image by image: ``under[:, mask] = input[:, mask]``."""
    network, images = small()
    masks = waves(2, 1, 6, 6, step=1.3) > 0.4
    under = images[5:]
    found = over_each(network, masks, images[:2].unsqueeze(1), under)
    for number in range(2):
        laid = under.clone()
        laid[:, :, masks[number, 0]] = images[number, :, masks[number, 0]]
        assert torch.allclose(found[number], network(laid), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_shrinking_is_torchvisions_on_tensors(shape: tuple[int, int, int]) -> None:
    """BackdoorBox core/defenses/ShrinkPad.py resizes and pads tensors with torchvision 0.9, whose
    bilinear resizing of tensors has no antialiasing."""
    images = (waves(3, *shape, step=0.11) + 1) / 2
    side = shape[1] - 4
    corners = [(0, 4), (3, 1), (0, 4)]
    found = shrink_and_pad(images, (4, 4), corners)
    small_ones = resize(
        images, [side, side], interpolation=InterpolationMode.BILINEAR, antialias=False
    )
    for image, small_one, (top, left) in zip(found, small_ones, corners, strict=True):
        expected = pad(small_one, [left, top, 4 - left, 4 - top])
        assert torch.allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "count", "mean", "pixels"),
    [
        ((1, 28, 28), 28353, 0.42462859, [0.47461995, 0.41761988, 0.40766728, 0.47900689]),
        ((3, 32, 32), 47355, 0.49944028, [0.37454674, 0.57019991, 0.56494784, 0.56301892]),
    ],
)
def test_the_autoencoders_are_backdoorboxs(
    shape: tuple[int, int, int], count: int, mean: float, pixels: list[float]
) -> None:
    """BackdoorBox core/models/autoencoder.py, AutoEncoder, commit af3afd1, with these weights."""
    coder = filled((grey_coder if shape[0] == 1 else colour_coder)(shape[0], None), 0.3)
    drawn = coder((waves(2, *shape, step=0.013) + 1) / 2)
    assert sum(parameter.numel() for parameter in coder.parameters()) == count
    assert float(drawn.mean()) == pytest.approx(mean, abs=1e-5)
    assert drawn[1].flatten()[[0, 100, 500, 700]].tolist() == pytest.approx(pixels, abs=1e-4)
