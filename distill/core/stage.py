"""What a distillation works on: the task, and the stage on which one run of it plays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..randomness import StreamName, Streams
from ..training import fit, shuffled
from ..types import Batch, Distillate, Recipe, RequestError, RunError
from .hooks import EVENTS, Hook, Moment, Phase, fold, listeners

Start = Literal["noise", "real", "poisoned"]

_NO_STEP = -1  # marks random streams of what happens between synthetic steps


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is to be distilled.

    real: the clean training set. classes: how many. ipc: synthetic images per class.
    iterations: outer iterations. init: where the images start (``noise`` N(0, 1) in normalised
    space, ``real`` rows whose label no attack changed and whose pixels no attack stamped,
    ``poisoned`` rows as the distillation sees them). clip_pixels: project onto [0, 1] after every
    step. recipe: how victims will train. network: a fresh network from a seed. streams: the run's
    random streams. scratch: a folder for what a backend keeps between sessions; ``None``: it keeps
    nothing. identity: what the configuration says that trained networks depend on, for people and
    for telling whether what lies in ``scratch`` may be used.
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
    scratch: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@final
class Stage:
    """One run of a task: the training set as the hooks left it, the images, where we are.

    The images are a leaf in normalised space, for which the published learning rates are made;
    everything that leaves the stage is in pixel space. ``learned`` are the leaves beside them,
    ``recipe`` the backend's word on how networks train on the set, ``start`` its word on where the
    images start. ``on_expert`` is told how many epochs of expert training are over, of how many.
    """

    def __init__(
        self,
        task: Task,
        hooks: Sequence[Hook],
        steps_per_iteration: int,
        *,
        learned: Mapping[str, Tensor] | None = None,
        recipe: Callable[[Stage], Recipe] | None = None,
        start: Callable[[Stage], Batch | None] | None = None,
    ) -> None:
        self.task = task
        self.hooks = hooks
        self.total_steps = task.iterations * steps_per_iteration
        self.on_expert: Callable[[int, int], None] = lambda done, total: None
        self._steps_per_iteration = steps_per_iteration
        self._space = task.recipe.preprocessing
        self._recipe = recipe
        self._leaf: Tensor | None = None
        device = task.real.images.device
        self.learned = {
            name: value.detach().clone().to(device).requires_grad_()
            for name, value in (learned or {}).items()
        }
        self.labels = torch.arange(task.classes, device=device).repeat_interleave(task.ipc)
        self.enter(0, 0)
        self.real = fold(hooks, "on_start", self.moment("on_start"), task.real)
        self._rows = self._rows_by_class(self.real.labels)
        given = start(self) if start else None
        if given is None:
            leaf = self._initial()
        else:
            self.labels, leaf = given.labels, self._space.normalise(given.images)
        self._leaf = leaf.requires_grad_()

    # Where we are ------------------------------------------------------------------------------

    def enter(self, iteration: int, step: int) -> None:
        """Move to synthetic step ``step`` of ``iteration``, both counted from 0."""
        self.phase: Phase = "distill"
        self.iteration = iteration
        self.step = iteration * self._steps_per_iteration + step
        self._place: tuple[int, ...] = (self.step,)
        self._moments = 0

    def enter_expert(self, round_: int, expert: int, epoch: int) -> None:
        """Move to an expert's training, before the synthetic step at hand."""
        self.phase = "expert"
        self._place = (_NO_STEP, round_, expert, epoch)
        self._moments = 0

    @property
    def progress(self) -> float:
        """The share of synthetic steps that are done, 0 to 1."""
        return self.step / max(1, self.total_steps)

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
        return self._space.pixels(self.leaf)

    def synthetic(self) -> Batch:
        """The current set in pixel space, detached."""
        return Batch(images=self.pixels().detach(), labels=self.labels)

    @property
    def recipe(self) -> Recipe:
        """How networks train on the current set."""
        return self._recipe(self) if self._recipe else self.task.recipe

    def made(self) -> Distillate:
        """The current set with its recipe."""
        return Distillate(batch=self.synthetic(), recipe=self.recipe)

    def write(self, images: Tensor) -> None:
        """Write pixel-space ``images`` into the leaf; the optimiser's state stays."""
        with torch.no_grad():
            self.leaf.copy_(self._space.normalise(images))

    # Real images -------------------------------------------------------------------------------

    def draw(self, label: int, count: int, generator: torch.Generator) -> Batch:
        """At most ``count`` real rows of class ``label``, without repetition, as the hooks show."""
        rows = self._rows[label]
        order = torch.randperm(len(rows), generator=generator)[:count]
        return self._show(self._sampled(label, rows[order.to(rows.device)]))

    def whole(self) -> Batch:
        """All real rows in their order, as the hooks show them."""
        return self._show(torch.arange(len(self.real), device=self.real.labels.device))

    def draw_mixed(self, count: int, generator: torch.Generator) -> Batch:
        """At most ``count`` rows of all classes as they come, as the hooks show them."""
        return next(self.batches(count, generator))

    def batches(
        self, size: int, generator: torch.Generator, count: int | None = None
    ) -> Iterator[Batch]:
        """``count`` rows (all) in random order, ``size`` at a time, as the hooks show them."""
        device = self.real.labels.device
        for rows in shuffled(len(self.real), size, generator, device, count):
            chosen = rows
            if listeners(self.hooks, "on_sample"):
                chosen = rows.clone()
                for label in self.real.labels[rows].unique().tolist():
                    own = self.real.labels[rows] == label
                    chosen[own] = self._sampled(label, rows[own])
            yield self._show(chosen)

    def _sampled(self, label: int, rows: Tensor) -> Tensor:
        """The rows that the hooks want in place of ``rows`` of class ``label``."""
        chosen = fold(self.hooks, "on_sample", self.moment("on_sample"), rows, label)
        if chosen is not rows and not bool(((chosen >= 0) & (chosen < len(self.real))).all()):
            raise RunError(f"on_sample at step {self.step}: a row outside the training set")
        return chosen

    def _show(self, rows: Tensor) -> Batch:
        return fold(self.hooks, "on_draw", self.moment("on_draw"), self.real.rows(rows))

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
                phase=self.phase,
                iteration=self.iteration,
                step=self.step,
                progress=self.progress,
                network=None if network is None else frozen_copy(network),
                real=self.task.real,
                synthetic=None if self._leaf is None else self.synthetic(),
                recipe=self.recipe,
                train_student=lambda: self._student(*key, next(students)),
                rng=self.task.streams.generator("attack", *self._place, *key),
            )

        return make

    def _student(self, *key: int) -> nn.Module:
        """A fresh network trained on the current set by the victims' recipe."""
        streams = self.task.streams
        network = self.task.network(streams.integer("attack", *self._place, *key, 0))
        generator = streams.generator("attack", *self._place, *key, 1)
        return fit(network, self.synthetic(), self.recipe, generator)

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
        return self._space.normalise(torch.cat(drawn))

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
