"""Common corruptions of images in five severities.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, as implemented by the package imagecorruptions (Michaelis et al., 2019):
the severities of ImageNet-C for images of any size. Frost is missing: it needs photographs of frost
that only that package contains.

Each corruption is a function of images ``(N, C, H, W)`` in [0, 1], a severity 1 to 5 and a
generator (CPU), and returns images of the same shape in [0, 1]. The generator draws one random
field for all images, so the result for an image does not depend on the others.

Deviations from imagecorruptions: images share their random numbers; images are not rounded to 8
bits inside a corruption; the package refuses images below 32 × 32 pixels, here lengths in pixels
are scaled down for them as if 32 were their shorter side; it makes three equal channels of a grey
image, here a grey image keeps one, and noise its full strength.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from .codec import through_jpeg

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
_LEAST_SIDE = 32  # of the published severities
SEVERITIES = 5
_GREY = (0.299, 0.587, 0.114)


def _scale(images: Tensor) -> float:
    """The factor for lengths in pixels: 1 for images of 32 pixels or more."""
    return min(1.0, min(images.shape[-2:]) / _LEAST_SIDE)


def _drawn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), ``(1, C, H, W)``."""
    return torch.rand(1, *images.shape[1:], generator=generator).to(images.device)


def _blurred(images: Tensor, sigma: float, reach: float, border: str) -> Tensor:
    """Gaussian blur; the kernel extends ``reach`` standard deviations from its middle."""
    from kornia.filters import gaussian_blur2d

    half = int(reach * sigma + 0.5)
    return gaussian_blur2d(images, 2 * half + 1, (sigma, sigma), border_type=border)


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Normal noise."""
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    noise = torch.randn(1, *images.shape[1:], generator=generator).to(images.device)
    return (images + scale * noise).clamp(0, 1)


def shot_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Poisson noise: each pixel is the quantile of its own distribution at a random number that all
    images share."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    drawn, rate = _drawn(images, generator), images * photons
    counted = torch.zeros_like(images)
    chance = (-rate).exp()
    below = chance.clone()
    for count in range(1, photons + 1):  # higher counts are clipped to white
        counted += drawn > below
        chance *= rate / count
        below += chance
    return (counted / photons).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = _drawn(images, generator)
    salted = torch.where(drawn < share / 2, 1.0, images)
    return torch.where(drawn > 1 - share / 2, 0.0, salted)


def defocus_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Convolution with a disk that has a soft edge."""
    from kornia.filters import filter2d, gaussian_blur2d

    radius, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    scale = _scale(images)
    half = math.ceil(max(8, radius) * scale)
    axis = torch.arange(-half, half + 1, dtype=images.dtype, device=images.device)
    disk = (axis.square()[:, None] + axis.square() <= (radius * scale) ** 2).to(images.dtype)
    size = 3 if radius <= 8 else 5
    kernel = gaussian_blur2d((disk / disk.sum())[None, None], size, (soft, soft))[0]
    return filter2d(images, kernel, border_type="reflect").clamp(0, 1)


def glass_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Pixels become copies of pixels nearby, between two blurs.

    The method swaps two pixels; the published code overwrites one of them, as does this one.
    """
    sigma, far, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[
        severity - 1
    ]
    scale = _scale(images)
    sigma, far = max(0.1, sigma * scale), max(1, round(far * scale))
    height, width = images.shape[-2:]
    places = np.arange(height * width).reshape(height, width)
    for _ in range(rounds):
        moves = torch.randint(-far, far, (height, width, 2), generator=generator).numpy()
        for row in range(height - far, far, -1):
            for column in range(width - far, far, -1):
                down, right = moves[row, column]
                places[row, column] = places[row + down, column + right]
    order = torch.from_numpy(places.flatten()).to(images.device)
    moved = _blurred(images, sigma, 4, "replicate").flatten(2)[:, :, order].view_as(images)
    return _blurred(moved, sigma, 4, "replicate").clamp(0, 1)


def streaked(images: Tensor, radius: int, sigma: float, angle: float, scale: float) -> Tensor:
    """Motion blur with half a Gaussian as kernel; what leaves the image is lost."""
    length = 2 * max(1, round(radius * scale)) + 1
    steps = np.arange(length)
    weights = np.exp(-0.5 * (steps / (sigma * scale)) ** 2)
    weights /= weights.sum()
    height, width = images.shape[-2:]
    rows, columns = torch.arange(height), torch.arange(width)
    total = torch.zeros_like(images)
    for step, weight in zip(steps, weights, strict=True):
        up = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        left = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        if abs(up) >= height or abs(left) >= width:
            break
        from_rows = (rows + up).clamp(0, height - 1).to(images.device)
        from_columns = (columns + left).clamp(0, width - 1).to(images.device)
        total += float(weight) * images[:, :, from_rows[:, None], from_columns]
    return total


def motion_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Camera motion at an angle of up to 45 degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    angle = float(torch.rand((), generator=generator) * 90 - 45)
    return streaked(images, radius, sigma, angle, _scale(images)).clamp(0, 1)


def _zoomed(images: Tensor, factor: float) -> Tensor:
    """The middle of ``images``, enlarged by ``factor`` and cropped from its upper left corner."""
    height, width = images.shape[-2:]
    kept = [math.ceil(side / factor) for side in (height, width)]
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    middle = images[:, :, top : top + kept[0], left : left + kept[1]]
    size = [round(side * factor) for side in kept]
    large = interpolate(middle, size, mode="bilinear", align_corners=True)
    return large[:, :, :height, :width]


def zoom_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Zoom of the camera: the mean over increasing zoom factors."""
    most, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[
        severity - 1
    ]
    factors = np.arange(1, most, step)
    total = images.clone()
    for factor in factors:
        total += _zoomed(images, float(factor))
    return (total / (len(factors) + 1)).clamp(0, 1)


def snow(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Falling flakes over a whitened image."""
    mean, spread, zoom, cut, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    field = torch.randn(1, 1, *images.shape[2:], generator=generator).to(images.device)
    flakes = _zoomed(mean + spread * field, zoom)
    flakes = torch.where(flakes < cut, 0.0, flakes).clamp(0, 1)
    angle = float(torch.rand((), generator=generator) * 90 - 135)
    flakes = streaked(flakes, radius, sigma, angle, _scale(images))
    colours = torch.tensor(_GREY, device=images.device) if images.shape[1] == 3 else None
    grey = images.mean(dim=1) if colours is None else torch.einsum("nchw,c->nhw", images, colours)
    whitened = kept * images + (1 - kept) * torch.maximum(images, grey[:, None] * 1.5 + 0.5)
    return (whitened + flakes + flakes.rot90(2, (2, 3))).clamp(0, 1)


def _plasma(side: int, decay: float, generator: torch.Generator) -> Tensor:
    """A plasma fractal ``(side, side)`` in [0, 1] by the diamond-square algorithm; ``side`` is a
    power of two."""
    field, step, wide = torch.zeros(side, side), side, 100.0
    while step >= 2:
        half = step // 2

        def about(total: Tensor, wide: float = wide) -> Tensor:
            drawn = 2 * torch.rand(total.shape, generator=generator) - 1
            return total / 4 + wide**2 * drawn

        corners = field[::step, ::step].clone()
        pairs = corners + corners.roll(-1, 0)
        field[half::step, half::step] = about(pairs + pairs.roll(-1, 1))
        middles = field[half::step, half::step].clone()
        across = middles + middles.roll(1, 0) + corners + corners.roll(-1, 1)
        field[::step, half::step] = about(across)
        field[half::step, ::step] = about(middles + middles.roll(1, 1) + pairs)
        step, wide = half, wide / decay
    field -= field.min()
    return field / field.max().clamp(min=1e-6)


def fog(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Haze shaped by a plasma fractal."""
    thick, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width = images.shape[2:]
    haze = _plasma(1 << (max(height, width) - 1).bit_length(), decay, generator)
    haze = haze[:height, :width].to(images.device)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    return ((images + thick * haze) * brightest / (brightest + thick)).clamp(0, 1)


def brightness(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A higher value in HSV."""
    from kornia.color import hsv_to_rgb, rgb_to_hsv

    more = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    if images.shape[1] != 3:
        return (images + more).clamp(0, 1)
    colours = rgb_to_hsv(images)
    return hsv_to_rgb(torch.cat([colours[:, :2], (colours[:, 2:] + more).clamp(0, 1)], dim=1))


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Pixels moved towards the image's mean."""
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = images.mean(dim=(2, 3), keepdim=True)
    return ((images - mean) * kept + mean).clamp(0, 1)


def elastic_transform(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Pixels displaced by a smooth random field."""
    strength = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[severity - 1]
    height, width = images.shape[2:]
    drawn = 2 * torch.rand(1, 2, height, width, generator=generator) - 1
    smooth = 0.01 * min(height, width)
    field = drawn if smooth < 1 / 6 else _blurred(drawn, smooth, 3, "replicate")
    far = 0.005 * height * strength * field  # pixels; published for the height in both directions
    rows = torch.arange(height)[:, None] + far[0, 0]
    columns = torch.arange(width) + far[0, 1]
    places = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    grid = places[None].expand(len(images), -1, -1, -1).to(images.device, images.dtype)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


def _boxes(side: int, small: int) -> Tensor:
    """PIL's box filter from ``side`` to ``small`` pixels, as a matrix ``(small, side)``."""
    edges = [int(number * side / small + 0.5) for number in range(small + 1)]
    means = torch.zeros(small, side)
    for row, (start, end) in enumerate(itertools.pairwise(edges)):
        means[row, start:end] = 1 / (end - start)
    return means


def pixelate(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Reduced and enlarged again."""
    factor = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = images.shape[2:]
    down = _boxes(height, max(1, int(height * factor))).to(images.device)
    across = _boxes(width, max(1, int(width * factor))).to(images.device)
    return interpolate(down @ images @ across.T, (height, width), mode="nearest-exact")


def jpeg_compression(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """JPEG artefacts."""
    return through_jpeg(images, (25, 18, 15, 10, 7)[severity - 1])


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian-noise": gaussian_noise,
    "shot-noise": shot_noise,
    "impulse-noise": impulse_noise,
    "defocus-blur": defocus_blur,
    "glass-blur": glass_blur,
    "motion-blur": motion_blur,
    "zoom-blur": zoom_blur,
    "snow": snow,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic-transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg-compression": jpeg_compression,
}
