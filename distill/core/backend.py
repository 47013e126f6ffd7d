"""What a distillation backend is: a small final class that says what a step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..types import Batch, Recipe
from .real import RealData
from .run import Run
from .task import Start, Task


class BackendOptions(BaseModel):
    """The options every backend has; a backend's own defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    iterations: int = Field(1000, ge=1, description="outer iterations")
    init: Start = Field("noise", description="where the images start: noise, real or poisoned rows")
    lr_img: float = Field(0.1, gt=0, description="learning rate of the synthetic images")
    clip_pixels: bool = Field(False, description="project the images onto [0, 1] after every step")


class Backend(ABC):
    """One way to distil. The loop owns the images, the hooks and the order of events.

    ``Options`` holds the backend's own options. ``victim_epochs``, ``victim_lr`` and
    ``victim_augment`` are the published recipe for networks trained on its sets; ``None``: the
    set's own recipe decides. ``keeps_rows``: whether row i of the set is row i of the
    training data.
    ``expert_options``: the options that its experts depend on; empty for a backend without any.
    ``cost`` and ``needs`` are shown to users.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BackendOptions]]
    cost: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    keeps_rows: ClassVar[bool] = False
    expert_options: ClassVar[tuple[str, ...]] = ()
    victim_epochs: ClassVar[int | None] = 300
    victim_lr: ClassVar[float | None] = 0.01
    victim_augment: ClassVar[str] = ""

    @abstractmethod
    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        """A backend with ``options`` (of its ``Options``) for ``ipc`` images per class."""

    # What is made --------------------------------------------------------------------------------

    def start(self, real: RealData) -> Batch | None:
        """The set that the run starts from; ``None`` for what ``Task.init`` says."""
        return None

    def learned(self) -> dict[str, Tensor]:
        """First values of what is learned beside the images, such as learning rates, by name."""
        return {}

    def recipe(self, task: Task, learned: Mapping[str, Tensor]) -> Recipe:
        """How networks train on the current set: the task's recipe with what was ``learned``."""
        return task.recipe

    @abstractmethod
    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The optimiser of the images ``(N, C, H, W)`` in normalised space, and of ``learned``."""

    def pace(self, iteration: int) -> float:
        """The factor on the optimiser's learning rates in ``iteration``."""
        return 1.0

    # What an iteration does, in this order -------------------------------------------------------

    @abstractmethod
    def steps(self) -> int:
        """Synthetic steps per outer iteration."""

    def prepare(self, run: Run) -> None:  # noqa: B027 (most need nothing)
        """Make what the iteration needs from the real data before it begins, such as experts."""

    @abstractmethod
    def network(self, run: Run) -> nn.Module:
        """The network that an outer iteration begins with."""

    @abstractmethod
    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        """The step's loss as scalars to be summed; each is back-propagated before the next is made.

        ``synthetic`` is in pixel space and attached to the images; ``run.synthetic.learned`` may
        be used too.
        """

    @abstractmethod
    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        """Move ``network`` in place, between two synthetic steps. ``synthetic`` is detached."""
