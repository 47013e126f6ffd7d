"""What every trigger is: a change to images, and how files, records and pictures show it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, Self, final

import torch
from torch import Tensor

from ...distill.types import RequestError

TriggerRange = Literal["pixel", "unbounded"]

_ROUNDING = 1e-6
_LARGEST = 1e6  # the widest published unbounded triggers reach ±200

UNBOUNDED = "unbounded trigger: no camera or file can carry it"
"""The label beside every figure of a trigger whose values may leave [0, 1]."""

Region = tuple[int, int, int, int]
"""Part of an image: its first row and column, its height and width, in pixels."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TriggerPicture:
    """What a picture of a trigger shows.

    image: ``float32 (C, H, W)`` on the CPU; what lies outside [0, 1] has to be clipped for display.
    caption: its values in one line. region: what is worth enlarging, ``None`` for nothing.
    labels: what must stand beside it.
    """

    image: Tensor
    caption: str
    region: Region | None
    labels: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trigger(ABC):
    """What an attacker puts on images.

    range: with ``"pixel"``, images in [0, 1] stay there; ``"unbounded"`` promises nothing.
    """

    kind: ClassVar[str]
    range: TriggerRange = "pixel"

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """New images ``(N, C, H, W)`` that carry the trigger; the given ones stay clean."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a trigger file holds."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], range: TriggerRange) -> Self:
        """The trigger whose ``tensors()`` are given.

        Errors: ``RequestError`` where one is missing or is not what this kind of trigger has.
        """

    @abstractmethod
    def fits(self, image_shape: tuple[int, int, int]) -> bool:
        """Whether images of that shape (C, H, W) can carry it."""

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """What records and files say of it, as JSON values.

        At least its kind and range, the extreme values that it brings (min, max), and the norms of
        what a black image gains (l2, linf), in pixel units.
        """

    @abstractmethod
    def picture(self) -> TriggerPicture:
        """What a picture of it shows."""

    @property
    def labels(self) -> list[str]:
        """What must stand beside every figure of it."""
        return labels_of(self.range)


def labels_of(range: object) -> list[str]:
    """What must stand beside every figure of a trigger with this ``range``."""
    return [UNBOUNDED] if range == "unbounded" else []


def needed(tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """The tensors with these names, ``float32`` of any shape.

    Errors: ``RequestError`` where one is missing, of another type, empty, or holds values beyond
    ±1,000,000.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RequestError(f"the trigger lacks its {' and its '.join(missing)}")
    for name in names:
        found = tensors[name]
        if found.dtype != torch.float32 or not found.numel():
            _refuse(name, found, "torch.float32, none 0")
        check_within(name, found, -_LARGEST, _LARGEST)
    return [tensors[name] for name in names]


def needed_images(tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """As ``needed``, each of the shape (channels, H, W)."""
    found = needed(tensors, *names)
    for name, values in zip(names, found, strict=True):
        if values.ndim != 3:
            _refuse(name, values, "torch.float32 (channels, H, W)")
    return found


def _refuse(name: str, found: Tensor, expected: str) -> NoReturn:
    have = f"{found.dtype} {tuple(found.shape)}"
    raise RequestError(f"the trigger's {name} is {have}, expected {expected}")


def check_within(name: str, values: Tensor, least: float, most: float) -> None:
    """Refuse values outside of [least, most], but for rounding; NaN too."""
    low, high = values.min().item(), values.max().item()
    if not (low >= least - _ROUNDING and high <= most + _ROUNDING):
        raise RequestError(
            f"the trigger's {name} holds values from {low:.3g} to {high:.3g}, "
            f"allowed are {least:g} to {most:g}"
        )


def extremes(values: Tensor, added: Tensor) -> dict[str, float]:
    """What ``Trigger.describe`` says of the ``values`` that a trigger brings, and of what a black
    image gains, ``added``."""
    return {
        "min": values.min().item(),
        "max": values.max().item(),
        "l2": added.norm().item(),
        "linf": added.abs().max().item(),
    }


def caption(described: Mapping[str, Any], *more: str) -> str:
    """Extreme values and norms in one line, ``more`` between the two."""
    low, high, l2, linf = (short(described[key]) for key in ("min", "max", "l2", "linf"))
    return " · ".join((f"values {low}…{high}", *more, f"L2 {l2}", f"L∞ {linf}"))


def short(value: float) -> str:
    """``value`` with three digits."""
    return f"{value:.3g}".replace("-", "−")
