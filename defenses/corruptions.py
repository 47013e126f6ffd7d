"""Common corruptions of images in five severities, for small images.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, with the severities of CIFAR-10-C. Frost is left out: it needs
photographs of frost.

Each corruption is a function of images ``(N, C, H, W)`` in [0, 1], a severity 1 to 5 and a
generator (CPU), and gives images of the same shape in [0, 1]. The generator's numbers make one
field for all images, so an image comes out the same whatever it is corrupted together with.

Deviations from CIFAR-10-C: noise fields are shared by images; shot noise is normal with a Poisson's
variance; glass blur moves the pixels of all images alike; motion blur and snow fall at one angle
for all; fog is a sum of random fields of halved sizes, not of diamond squares; lengths that
CIFAR-10-C gives in pixels of 32 are scaled to the image's side, at least one pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from kornia.color import hsv_to_rgb, rgb_to_hsv
from kornia.filters import filter2d, gaussian_blur2d, motion_blur
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from .codec import through_jpeg

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
_PUBLISHED_SIDE = 32
SEVERITIES = 5


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, ``(1, C, H, W)``."""
    return torch.randn(1, *images.shape[1:], generator=generator).to(images.device)


def _pixels(images: Tensor, published: float) -> float:
    """A length that is published for sides of 32 pixels."""
    return published * min(images.shape[-2:]) / _PUBLISHED_SIDE


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; the kernel is what three deviations ask for and the image holds."""
    half = max(1, min(math.ceil(3 * sigma), (min(images.shape[-2:]) - 1) // 2))
    return gaussian_blur2d(images, 2 * half + 1, (sigma, sigma), border_type="replicate")


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Normal noise."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return (images + scale * _noise(images, generator)).clamp(0, 1)


def shot_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Noise that grows with the light."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return (images + (images / photons).sqrt() * _noise(images, generator)).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    drawn = torch.rand(1, *images.shape[1:], generator=generator).to(images.device)
    salted = torch.where(drawn < share / 2, 1.0, images)
    return torch.where(drawn > 1 - share / 2, 0.0, salted)


def defocus_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A disk in place of each pixel, its edge softened."""
    radius, soft = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    axis = torch.arange(-2, 3, dtype=images.dtype, device=images.device)
    disk = (axis.square()[:, None] + axis.square() <= radius**2).to(images.dtype)
    kernel = _blurred(disk[None, None], soft)[0]
    return filter2d(images, kernel, border_type="replicate", normalized=True).clamp(0, 1)


def glass_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Neighbouring pixels change places, between two blurs."""
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    height, width = images.shape[-2:]
    places = torch.arange(height * width).view(height, width)
    for _ in range(rounds):
        moves = torch.randint(-1, 2, (height, width, 2), generator=generator).tolist()
        for row in range(height - 2, 0, -1):
            for column in range(width - 2, 0, -1):
                down, right = moves[row][column]
                there = (row + down, column + right)
                here = places[row, column].clone()
                places[row, column] = places[there]
                places[there] = here
    moved = _blurred(images, sigma).flatten(2)[:, :, places.flatten().to(images.device)]
    return _blurred(moved.view_as(images), sigma).clamp(0, 1)


def _streaked(images: Tensor, radius: float, angle: float) -> Tensor:
    size = 2 * max(1, round(_pixels(images, radius) / 2)) + 1
    return motion_blur(images, size, angle, 0.0, border_type="replicate")


def motion_blur_(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The camera moves, at an angle of up to 45 degrees."""
    radius = (6, 6.5, 7, 8, 9)[severity - 1]
    angle = float(torch.rand((), generator=generator) * 90 - 45)
    return _streaked(images, radius, angle).clamp(0, 1)


def zoom_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The camera comes nearer: the mean over growing zooms."""
    most = (0.06, 0.11, 0.16, 0.21, 0.26)[severity - 1]
    factors = torch.arange(0, most, 0.01) + 1
    total = images + sum(_zoomed(images, float(factor)) for factor in factors)
    return (total / (len(factors) + 1)).clamp(0, 1)


def _zoomed(images: Tensor, factor: float) -> Tensor:
    """The middle of ``images``, ``factor`` times as large."""
    theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]], device=images.device)
    return _sampled(
        images, torch.nn.functional.affine_grid(theta[None], [1, 1, *images.shape[2:]], False)
    )


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    """``images`` at the places of one ``grid`` (1, H, W, 2)."""
    places = grid.expand(len(images), -1, -1, -1)
    return grid_sample(images, places, padding_mode="reflection", align_corners=False)


def snow(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Flakes that fall, in whitened light."""
    mean, spread, zoom, cut, radius, kept = (
        (0.1, 0.2, 1, 0.6, 8, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 0.8),
    )[severity - 1]
    field = torch.randn(1, 1, *images.shape[2:], generator=generator).to(images.device)
    flakes = _zoomed(mean + spread * field, zoom)
    flakes = torch.where(flakes < cut, 0.0, flakes).clamp(0, 1)
    flakes = _streaked(flakes, radius, float(torch.rand((), generator=generator) * 90 - 135))
    grey = images.mean(dim=1, keepdim=True) * 1.5 + 0.5
    whitened = kept * images + (1 - kept) * torch.maximum(images, grey)
    return (whitened + flakes + flakes.rot90(2, (2, 3))).clamp(0, 1)


def fog(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A haze of random fields, each half as large as the last and ``decay`` times as faint."""
    thick, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    side = images.shape[2:]
    haze = torch.zeros(1, 1, *side)
    cells, weight = 2, 1.0
    while cells <= max(side):
        field = torch.rand(1, 1, cells, cells, generator=generator)
        haze += weight * interpolate(field, side, mode="bilinear", align_corners=True)
        cells, weight = 2 * cells, weight / decay
    haze = ((haze - haze.min()) / (haze.max() - haze.min()).clamp(min=1e-6)).to(images.device)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    return ((images + thick * haze) * brightest / (brightest + thick)).clamp(0, 1)


def brightness(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """More light: a higher value in HSV."""
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    if images.shape[1] != 3:
        return (images + more).clamp(0, 1)
    colours = rgb_to_hsv(images)
    return hsv_to_rgb(torch.cat([colours[:, :2], (colours[:, 2:] + more).clamp(0, 1)], dim=1))


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Nearer to the image's mean."""
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = images.mean(dim=(2, 3), keepdim=True)
    return ((images - mean) * kept + mean).clamp(0, 1)


def elastic_transform(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The image is a little askew, and its pixels wander, neighbours together."""
    far, smooth, askew = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    side = images.shape[2:]
    # Lengths are shares of a side, which grid_sample's coordinates go twice over.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * 2 / 3
    moved = corners + 2 * askew * (2 * torch.rand(3, 2, generator=generator) - 1)
    theta = moved.T @ torch.linalg.inv(torch.cat([corners.T, torch.ones(1, 3)]))
    field = 2 * torch.rand(1, 2, *side, generator=generator) - 1
    wandering = 2 * far * _blurred(field, max(0.3, smooth * min(side)))
    grid = affine_grid(theta[None], [1, 1, *side], False) + wandering.permute(0, 2, 3, 1)
    return _sampled(images, grid.to(images.device)).clamp(0, 1)


def pixelate(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Smaller, and large again."""
    factor = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    small = [max(1, int(side * factor)) for side in images.shape[2:]]
    return interpolate(interpolate(images, small, mode="area"), images.shape[2:], mode="nearest")


def jpeg_compression(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """JPEG's own artefacts."""
    return through_jpeg(images, (80, 65, 58, 50, 40)[severity - 1])


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian-noise": gaussian_noise,
    "shot-noise": shot_noise,
    "impulse-noise": impulse_noise,
    "defocus-blur": defocus_blur,
    "glass-blur": glass_blur,
    "motion-blur": motion_blur_,
    "zoom-blur": zoom_blur,
    "snow": snow,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic-transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg-compression": jpeg_compression,
}
