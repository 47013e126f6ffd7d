"""What a distillation works on: the task, and the stage on which one run of it plays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from .hooks import EVENTS, Hook, Moment, fold
from .randomness import StreamName, Streams
from .training import fit
from .types import Batch, Recipe, RequestError, RunError

Start = Literal["noise", "real", "poisoned"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is to be distilled.

    real: the clean training set. classes: how many. ipc: synthetic images per class.
    iterations: outer iterations. init: where the images start (``noise`` N(0, 1) in normalised
    space, ``real`` rows whose label no attack changed and whose pixels no attack stamped,
    ``poisoned`` rows as the distillation sees them). clip_pixels: project onto [0, 1] after every
    step. recipe: how victims will train. network: a fresh network from a seed. streams: the run's
    random streams.
    """

    real: Batch
    classes: int
    ipc: int
    iterations: int
    init: Start
    clip_pixels: bool
    recipe: Recipe
    network: Callable[[int], nn.Module]
    streams: Streams


@final
class Stage:
    """One run of a task: the training set as the hooks left it, the images, where we are.

    The images are a leaf in normalised space, for which the published learning rates are made;
    everything that leaves the stage is in pixel space.
    """

    def __init__(self, task: Task, hooks: Sequence[Hook], steps_per_iteration: int) -> None:
        self.task = task
        self.hooks = hooks
        self.iteration = 0
        self.step = 0
        self.total_steps = task.iterations * steps_per_iteration
        self._steps_per_iteration = steps_per_iteration
        self._moments = 0
        self._leaf: Tensor | None = None
        shape = (1, -1, 1, 1)
        device = task.real.images.device
        self._mean = torch.tensor(task.recipe.mean, device=device).view(shape)
        self._std = torch.tensor(task.recipe.std, device=device).view(shape)
        self.real = fold(hooks, "on_start", self.moment("on_start"), task.real)
        self._rows = self._rows_by_class(self.real.labels)
        self.labels = torch.arange(task.classes, device=device).repeat_interleave(task.ipc)
        self._leaf = self._initial().requires_grad_()

    # Where we are ------------------------------------------------------------------------------

    def enter(self, iteration: int, step: int) -> None:
        """Move to synthetic step ``step`` of ``iteration``, both counted from 0."""
        self.iteration = iteration
        self.step = iteration * self._steps_per_iteration + step
        self._moments = 0

    @property
    def on_last_step(self) -> bool:
        """Whether no synthetic step follows this one."""
        return self.step + 1 >= self.total_steps

    def generator(self, name: StreamName, *key: int) -> torch.Generator:
        """The stream ``name`` at this step."""
        return self.task.streams.generator(name, self.step, *key)

    # The images --------------------------------------------------------------------------------

    @property
    def leaf(self) -> Tensor:
        """The images in normalised space ``(classes · ipc, C, H, W)``: what is optimised."""
        if self._leaf is None:
            raise RuntimeError("the stage has no images before on_start is over")
        return self._leaf

    def pixels(self) -> Tensor:
        """The images in pixel space, attached to the leaf."""
        return self.leaf * self._std + self._mean

    def synthetic(self) -> Batch:
        """The current set in pixel space, detached."""
        return Batch(images=self.pixels().detach(), labels=self.labels)

    def write(self, images: Tensor) -> None:
        """Write pixel-space ``images`` into the leaf; the optimiser's state stays."""
        with torch.no_grad():
            self.leaf.copy_((images - self._mean) / self._std)

    # Real images -------------------------------------------------------------------------------

    def draw(self, label: int, count: int, generator: torch.Generator) -> Batch:
        """At most ``count`` real rows of class ``label``, without repetition, as the hooks show."""
        rows = self._rows[label]
        order = torch.randperm(len(rows), generator=generator)[:count]
        drawn = rows[order.to(rows.device)]
        chosen = fold(self.hooks, "on_sample", self.moment("on_sample"), drawn, label)
        if chosen is not drawn and not bool(((chosen >= 0) & (chosen < len(self.real))).all()):
            raise RunError(f"on_sample at step {self.step}: a row outside the training set")
        return fold(self.hooks, "on_draw", self.moment("on_draw"), self.real.rows(chosen))

    def _rows_by_class(self, labels: Tensor) -> list[Tensor]:
        rows = [torch.nonzero(labels == label)[:, 0] for label in range(self.task.classes)]
        empty = [label for label, members in enumerate(rows) if not len(members)]
        if empty:
            raise RequestError(f"class {empty[0]} has no training rows left: lower the poison rate")
        return rows

    # Hooks -------------------------------------------------------------------------------------

    def moment(self, event: str, network: nn.Module | None = None) -> Callable[[], Moment]:
        """What hooks may read at ``event``, made only where a hook listens."""

        def make() -> Moment:
            self._moments += 1
            key = (EVENTS.index(event), self._moments)
            students = itertools.count()
            return Moment(
                phase="distill",
                iteration=self.iteration,
                step=self.step,
                progress=self.step / self.total_steps,
                network=None if network is None else frozen_copy(network),
                real=self.task.real,
                synthetic=None if self._leaf is None else self.synthetic(),
                recipe=self.task.recipe,
                train_student=lambda: self._student(*key, next(students)),
                rng=self.generator("attack", *key),
            )

        return make

    def _student(self, *key: int) -> nn.Module:
        """A fresh network trained on the current set by the victims' recipe."""
        streams = self.task.streams
        network = self.task.network(streams.integer("attack", self.step, *key, 0))
        generator = streams.generator("attack", self.step, *key, 1)
        return fit(network, self.synthetic(), self.task.recipe, generator)

    # The start ---------------------------------------------------------------------------------

    def _initial(self) -> Tensor:
        """The images the run starts from, in normalised space."""
        task, generator = self.task, self.task.streams.generator("init")
        shape = (task.classes * task.ipc, *task.real.images.shape[1:])
        if task.init == "noise":
            return torch.randn(shape, generator=generator).to(task.real.images.device)
        if task.init == "poisoned":
            drawn = [self.draw(c, task.ipc, generator).images for c in range(task.classes)]
        else:
            drawn = self._untouched_rows(generator)
        for label, images in enumerate(drawn):
            if len(images) < task.ipc:
                raise RequestError(
                    f"class {label} has {len(images)} rows to start {task.ipc} images per class "
                    f"from: lower --ipc or start from noise (--init noise)"
                )
        return (torch.cat(drawn) - self._mean) / self._std

    def _untouched_rows(self, generator: torch.Generator) -> list[Tensor]:
        """Clean pixels of rows that kept their label, class by class.

        One order of all rows is drawn and each class takes its first: the clean twin, whose rows
        all kept their label, then starts from nearly the same images.
        """
        clean = self.task.real
        order = torch.randperm(len(clean), generator=generator).to(clean.labels.device)
        kept = order[self.real.labels[order] == clean.labels[order]]
        return [
            clean.images[kept[clean.labels[kept] == label][: self.task.ipc]]
            for label in range(self.task.classes)
        ]


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy that hooks may call and differentiate through, but not train."""
    return copy.deepcopy(network).eval().requires_grad_(False)
