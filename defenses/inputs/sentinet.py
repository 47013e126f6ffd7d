"""The defense ``sentinet``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...distill.networks.registry import Network
from ...distill.slopes import micro_batch
from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer
from ..common.maps import split_at_last_maps

Array = npt.NDArray[np.float64]

_LEAST = 20
_KNOWN = 100  # largest number of held-out images that set the boundary
_REAL = 1e-6  # a smaller imaginary part is a rounding error
_BIN = 0.02  # width of the bins; the boundary is fitted to the highest point of each


@final
class SentinetOptions(DefenseOptions):
    """The paper's 100 test images; the mask's share is that of a public port."""

    overlays: int = Field(100, ge=2, description="held-out images that a region is pasted on")
    share: float = Field(0.15, gt=0, lt=1, description="share of the pixels that is most salient")


@final
class Sentinet(InputScorer):
    """SentiNet: the salient region of a triggered input also changes predictions on other images
    (Chou, Tramèr, Pellegrino, "SentiNet: Detecting Localized Universal Attacks Against Deep
    Learning Systems", IEEE Security and Privacy Workshops 2020).

    In words: find the region that the prediction depends on (a class activation map), paste it on
    held-out images and count how many get the input's prediction; fill the same region with noise
    and take the mean confidence. Regions of clean inputs change few predictions, or hide so much
    that the confidence falls. The score is the distance to a parabola through the highest points of
    clean images, negative below it. The threshold is the mean distance of the clean images below.

    Needs at least 20 held-out images: the regions are pasted on some, the others set the boundary.
    Needs a network with feature maps, and a trigger in one place.

    Deviations: there is no official code; where the paper is not specific, this follows the public
    port in backdoor-toolbox. Gradients are not averaged over pixels as in Grad-CAM, which is the
    same if the network averages its maps, and correct if it does not. The mask is the most salient
    15 % of the pixels, as in the port: the maps of small networks are so coarse that 15 % of the
    highest saliency (the paper's) covers nearly all. There is one mask, for the predicted class;
    the masks of other proposed classes are not subtracted. All inputs have the same noise. The port
    fits its parabola through the middles of all bins, empty ones counted as 0; here empty bins are
    left out. (It also gives triggered inputs their true trigger as a mask, which no defender has,
    and sets the threshold by the tested clean images. BackdoorBench's port keeps the region, fills
    the rest with noise, and uses the confidence alone.)
    """

    name = "sentinet"
    Options = SentinetOptions
    options: SentinetOptions
    needs = f"{_LEAST} held-out images, a convolutional network"
    quick: ClassVar[Mapping[str, Any]] = {"overlays": 32}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        if split_at_last_maps(view.victim) is None:
            return "needs a network with feature maps"
        found = len(view.holdout)
        return None if found >= _LEAST else f"needs {_LEAST} held-out images, there are {found}"

    def caution(self, view: DefenderView) -> str | None:
        found = len(view.holdout)
        return None if found >= 60 else f"{found} held-out images: the boundary has few points"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        fooled, confidence = self._points(view, images)
        curve = upper_parabola(*self._known_points(view))
        return torch.from_numpy(distances(curve, confidence, fooled)).to(images.device)

    def threshold(self, view: DefenderView) -> float:
        confidence, fooled = self._known_points(view)
        known = distances(upper_parabola(confidence, fooled), confidence, fooled)
        return float(-known[known < 0].mean()) if bool((known < 0).any()) else 0.0

    def _parts(self, view: DefenderView) -> tuple[Tensor, Tensor]:
        """The held-out images that regions are pasted on, and those that set the boundary."""
        held = view.holdout.images
        order = torch.randperm(len(held), generator=view.generator(self.name, "overlays"))
        order = order.to(held.device)
        count = min(self.options.overlays, len(held) // 2)
        return held[order[:count]], held[order[count : count + _KNOWN]]

    def _known_points(self, view: DefenderView) -> tuple[Array, Array]:
        """Mean confidence and fooled share, each ``(N,)``, of the images that set the boundary."""

        def make() -> tuple[Array, Array]:
            fooled, confidence = self._points(view, self._parts(view)[1])
            return confidence, fooled

        return view.once((self.name, "known points", self.options), make)

    def _points(self, view: DefenderView, images: Tensor) -> tuple[Array, Array]:
        """Fooled share and mean confidence of each image, each ``(N,)``."""
        under, _ = self._parts(view)
        predicted = view.logits(images).argmax(dim=1)
        masks = salient(saliency(view.victim, images, predicted), self.options.share)
        inert = torch.rand(under.shape, generator=view.generator(self.name, "inert"))
        inert = inert.to(images.device)
        fooled, confidence = [], []
        together = max(1, micro_batch(images.device) // len(under))
        for some, mask, label in zip(
            images.split(together), masks.split(together), predicted.split(together), strict=True
        ):
            answered = over_each(view.victim, mask, some.unsqueeze(1), under).argmax(dim=2)
            hidden = over_each(view.victim, mask, inert, under).softmax(dim=2)
            fooled.append((answered == label[:, None]).double().mean(dim=1))
            confidence.append(hidden.amax(dim=2).double().mean(dim=1))
        return torch.cat(fooled).cpu().numpy(), torch.cat(confidence).cpu().numpy()


def over_each(network: nn.Module, masks: Tensor, filling: Tensor, under: Tensor) -> Tensor:
    """Logits ``(N, M, classes)`` of each of ``under`` (M, C, H, W) with each of ``masks``
    (N, 1, H, W) filled from ``filling``, which expands to ``(N, M, C, H, W)``."""
    filled = torch.where(masks.unsqueeze(1), filling, under)
    return in_pieces(network, filled.flatten(0, 1)).view(*filled.shape[:2], -1)


def saliency(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What ``labels`` (N,) rest on: ``(N, H, W)`` in the size of ``images``, not negative.

    Gradient times activation on the last feature maps (HiResCAM, Draelos and Carin, 2020). Where
    maps are averaged before a linear head this is Grad-CAM (Selvaraju et al., ICCV 2017); heads
    that see every place apart, as the ConvNet's, make Grad-CAM's mean over places meaningless.
    """
    halves = split_at_last_maps(network)
    assert halves is not None and isinstance(network, Network)
    size = micro_batch(images.device)
    found = []
    for some, own in zip(images.split(size), labels.split(size), strict=True):
        with torch.no_grad():
            maps = halves.maps(network.normalise(some))
        maps = maps.detach().requires_grad_()
        with torch.enable_grad():
            logits = halves.rest(maps)
            chosen = logits.gather(1, own.unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(chosen, maps)
        heat = (gradient * maps.detach()).sum(dim=1, keepdim=True).relu()
        large = interpolate(heat, images.shape[-2:], mode="bilinear", align_corners=False)
        found.append(large[:, 0])
    return torch.cat(found)


def salient(heat: Tensor, share: float) -> Tensor:
    """The ``share`` of pixels with the highest ``heat`` (N, H, W): ``bool (N, 1, H, W)``."""
    flat = heat.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    rows = flat.argsort(dim=1, descending=True, stable=True)[:, :count]  # ties: the first pixels
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, rows, True)
    return chosen.view(len(heat), 1, *heat.shape[1:])


def upper_parabola(x: Array, y: Array) -> Array:
    """Coefficients, highest power first, of a parabola fitted to the highest point in each bin of
    ``x`` (N,); of a lower degree if fewer than three bins have points."""
    bins = np.floor(x / _BIN).astype(int)
    chosen = [np.flatnonzero(bins == each) for each in np.unique(bins)]
    tops = np.array([members[np.argmax(y[members])] for members in chosen])
    degree = min(2, len(tops) - 1)
    found: Array = np.polyfit(x[tops], y[tops], degree)
    return found


def distances(curve: Array, x: Array, y: Array) -> Array:
    """Distances of points ``(x, y)``, each (N,), from the polynomial ``curve`` of degree 2 or less;
    negative below it."""
    a, b, c = (0.0,) * (3 - len(curve)) + tuple(float(each) for each in curve)
    found = []
    for left, up in zip(x.tolist(), y.tolist(), strict=True):
        # The derivative of the squared distance to (t, a t² + b t + c), divided by 2.
        slope = (2 * a * a, 3 * a * b, b * b + 2 * a * (c - up) + 1, b * (c - up) - left)
        turns = np.roots(slope)
        places = turns.real[np.abs(turns.imag) < _REAL]
        found.append(np.hypot(places - left, np.polyval(curve, places) - up).min())
    signed: Array = np.where(y < np.polyval(curve, x), -1.0, 1.0) * np.array(found)
    return signed
