"""What a distillation backend is: a small final class that says what a step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .stage import Stage, Start
from .types import Batch, Recipe


class BackendOptions(BaseModel):
    """The options every backend has; a backend's own defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    iterations: int = Field(1000, ge=1, description="outer iterations")
    init: Start = Field("noise", description="where the images start: noise, real or poisoned rows")
    lr_img: float = Field(0.1, gt=0, description="learning rate of the synthetic images")
    clip_pixels: bool = Field(False, description="project the images onto [0, 1] after every step")


class Backend(ABC):
    """One way to distil. The loop owns the images, the hooks and the order of events.

    ``Options`` holds the backend's own options, ``victim_epochs`` and ``victim_augment`` the
    published recipe for networks trained on its sets.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BackendOptions]]
    victim_epochs: ClassVar[int] = 300
    victim_augment: ClassVar[str] = ""

    @abstractmethod
    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        """A backend with ``options`` (of its ``Options``) for ``ipc`` images per class."""

    @abstractmethod
    def steps(self) -> int:
        """Synthetic steps per outer iteration."""

    @abstractmethod
    def optimiser(self, leaf: Tensor) -> torch.optim.Optimizer:
        """The optimiser of the images ``(N, C, H, W)`` in normalised space."""

    @abstractmethod
    def network(self, stage: Stage) -> nn.Module:
        """The network that an outer iteration begins with."""

    @abstractmethod
    def losses(self, stage: Stage, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        """The step's loss as scalars to be summed; each is back-propagated before the next is made.

        ``synthetic`` is in pixel space and attached to the images.
        """

    @abstractmethod
    def advance(self, stage: Stage, network: nn.Module, synthetic: Batch) -> None:
        """Move ``network`` in place, between two synthetic steps. ``synthetic`` is detached."""
