"""The trigger ``generator``: a small network makes a perturbation for each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor
from torch.nn import functional

from ...distill.training import in_pieces
from ...distill.types import RequestError
from .base import Trigger, TriggerPicture, TriggerRange, caption, extremes, needed, short

WIDEST = 256
"""The largest number of channels between the layers that a trigger file may have."""

Weights = Mapping[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratorTrigger(Trigger):
    """A network's answer to the image is added to it; the sum is then clamped to [0, 1].

    The architecture is fixed: five 3×3 convolutions (``perturb``), which fit images of any size
    from 2×2 on. weights: by layer and ``weight`` or ``bias``, ``float32``. epsilon:
    ``float32 (C, 1, 1)``, the largest change of a pixel, pixel units. example: ``float32
    (C, H, W)``, the image whose perturbation records and pictures show. An unbounded ``range``
    leaves out the clamping.
    """

    kind: ClassVar[str] = "generator"
    weights: Weights
    epsilon: Tensor
    example: Tensor

    def stamp(self, images: Tensor) -> Tensor:
        """As for every trigger; without gradients."""
        return in_pieces(self._stamped, images)

    def _stamped(self, images: Tensor) -> Tensor:
        sums = images + perturb(self.weights, self.epsilon, images)
        return sums.clamp(0, 1) if self.range == "pixel" else sums

    def tensors(self) -> dict[str, Tensor]:
        return {**self.weights, "epsilon": self.epsilon, "example": self.example}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], range: TriggerRange) -> Self:
        first, epsilon, example = needed(tensors, "enter.weight", "epsilon", "example")
        if first.dim() != 4 or not 1 <= len(first) <= WIDEST or example.dim() != 3:
            raise RequestError(
                f"the generator's first layer has the shape {tuple(first.shape)}, expected "
                f"(width, C, 3, 3) with a width of 1 to {WIDEST}, and its example "
                f"{tuple(example.shape)}, expected (C, H, W)"
            )
        shapes = weight_shapes(channels=len(example), width=len(first))
        shapes["epsilon"] = (len(example), 1, 1)
        found = dict(zip(shapes, needed(tensors, *shapes), strict=True))
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise RequestError(
                    f"the generator's {name} has the shape {tuple(found[name].shape)}, expected "
                    f"{shape}"
                )
        if min(example.shape[1:]) < 2 or not bool((epsilon >= 0).all()):
            raise RequestError("a generator needs an example from 2×2 on and an epsilon from 0 on")
        del found["epsilon"]
        return cls(weights=found, epsilon=epsilon, example=example, range=range)

    def fits(self, image_shape: tuple[int, int, int]) -> bool:
        return self.example.shape == image_shape

    def describe(self) -> Mapping[str, Any]:
        """Its width and epsilon; extreme values and norms of what the example gains, unclamped."""
        values = self._shown()
        return {
            "kind": self.kind,
            "width": len(self.weights["enter.weight"]),
            "epsilon": self.epsilon.max().item(),
            "range": self.range,
            **extremes(values, values),
        }

    def picture(self) -> TriggerPicture:
        """The example's perturbation around mid-grey, its largest value black or white."""
        described, values = self.describe(), self._shown().float().cpu()
        scale = 0.5 / (described["linf"] or 1)
        return TriggerPicture(
            image=(0.5 + scale * values).clamp(0, 1),
            caption=caption(described, f"of one image, times {short(scale)} on grey"),
            region=None,
            labels=self.labels,
        )

    @torch.no_grad()
    def _shown(self) -> Tensor:
        return perturb(self.weights, self.epsilon, self.example.unsqueeze(0))[0]


def perturb(weights: Weights, epsilon: Tensor, images: Tensor) -> Tensor:
    """The network's answer to ``images`` ``(N, C, H, W)``, pixel space, within ± ``epsilon``.

    One convolution at full size, two at half size, one at full size on the sum of both paths, one
    to the image's channels; epsilon · tanh of that. Differentiable in weights and images.
    """

    def layer(name: str, values: Tensor) -> Tensor:
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.conv2d(values, kernel, bias, padding=1)

    fine = layer("enter", 2 * images - 1).relu()
    coarse = layer("down", functional.avg_pool2d(fine, 2)).relu()
    coarse = layer("deep", coarse).relu()
    both = fine + functional.interpolate(coarse, size=images.shape[-2:])
    return epsilon * layer("exit", layer("up", both).relu()).tanh()


def weight_shapes(channels: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of ``perturb`` by name."""
    ends = {
        "enter": (channels, width),
        "down": (width, width),
        "deep": (width, width),
        "up": (width, width),
        "exit": (width, channels),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (read, made) in ends.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (made, read, 3, 3), (made,)
    return shapes


def fresh_weights(channels: int, width: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Weights and biases uniform within ± 1/√(inputs of a unit), PyTorch's default; on the CPU."""
    weights: dict[str, Tensor] = {}
    inputs = 1
    for name, shape in weight_shapes(channels, width).items():
        inputs = 9 * shape[1] if len(shape) == 4 else inputs  # a bias comes after its weight
        weights[name] = (2 * torch.rand(shape, generator=rng) - 1) / inputs**0.5
    return weights
