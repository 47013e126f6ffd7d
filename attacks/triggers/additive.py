"""The trigger ``additive``: a small perturbation that is added to the whole image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ...distill.types import RequestError
from .base import (
    Trigger,
    TriggerPicture,
    TriggerRange,
    caption,
    check_within,
    extremes,
    needed_images,
    short,
)

Norm = Literal["linf", "l2"]

_ROUNDING = 1e-6
_LENGTHS: Mapping[Norm, Callable[[Tensor], Tensor]] = {
    "linf": lambda values: values.abs().max(),
    "l2": lambda values: values.norm(),
}
_PROJECTIONS: Mapping[Norm, Callable[[Tensor, float], Tensor]] = {
    "linf": lambda values, bound: values.clamp(-bound, bound),
    "l2": lambda values, bound: values * (bound / values.norm()).clamp(max=1),
}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AdditiveTrigger(Trigger):
    """A perturbation that is added to the image; the sum is then clamped to [0, 1].

    perturbation: ``float32 (C, H, W)``, pixel units. norm, bound: its L∞ or L2 norm is at most
    ``bound``. An unbounded ``range`` leaves out the clamping.
    """

    kind: ClassVar[str] = "additive"
    perturbation: Tensor
    norm: Norm
    bound: float

    @classmethod
    def bounded(
        cls, perturbation: Tensor, norm: Norm, bound: float, range: TriggerRange = "pixel"
    ) -> Self:
        """The perturbation nearest to the given one whose norm is at most ``bound``."""
        nearest = _PROJECTIONS[norm](perturbation, bound)
        return cls(perturbation=nearest, norm=norm, bound=bound, range=range)

    def stamp(self, images: Tensor) -> Tensor:
        sums = images + self.perturbation
        return sums.clamp(0, 1) if self.range == "pixel" else sums

    def tensors(self) -> dict[str, Tensor]:
        bound = torch.tensor(self.bound, dtype=torch.float64)
        return {"perturbation": self.perturbation, f"{self.norm}_bound": bound}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], range: TriggerRange) -> Self:
        (perturbation,) = needed_images(tensors, "perturbation")
        if range == "pixel":
            check_within("perturbation (its range is pixel)", perturbation, -1, 1)
        bounds = {norm: tensors[f"{norm}_bound"] for norm in _LENGTHS if f"{norm}_bound" in tensors}
        if len(bounds) != 1 or any(bound.numel() != 1 for bound in bounds.values()):
            raise RequestError("an additive trigger has one bound, linf_bound or l2_bound")
        ((norm, given),) = bounds.items()
        bound, length = given.item(), _LENGTHS[norm](perturbation).item()
        if not length <= bound * (1 + _ROUNDING):
            raise RequestError(
                f"the trigger's {norm} norm is {length:.3g}, its bound says at most {bound:.3g}"
            )
        return cls(perturbation=perturbation, norm=norm, bound=bound, range=range)

    def fits(self, image_shape: tuple[int, int, int]) -> bool:
        return self.perturbation.shape == image_shape

    def describe(self) -> Mapping[str, Any]:
        """Its bound, and the perturbation's extreme values and norms."""
        values = self.perturbation
        return {
            "kind": self.kind,
            "norm": self.norm,
            "bound": self.bound,
            "range": self.range,
            **extremes(values, values),
        }

    def picture(self) -> TriggerPicture:
        """The perturbation around mid-grey, scaled so that its largest value is black or white."""
        described, values = self.describe(), self.perturbation.detach().float().cpu()
        scale = 0.5 / (described["linf"] or 1)
        return TriggerPicture(
            image=0.5 + scale * values,
            caption=caption(described, f"shown times {short(scale)} on grey"),
            region=None,
            labels=self.labels,
        )
