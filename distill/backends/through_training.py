"""Back-propagation through training: ``dd``, where the learning rates are distilled too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from .. import weights as flat
from ..batch_norm import batch_norm_layers
from ..core.backend import Backend, BackendOptions
from ..core.run import Run
from ..core.task import Task
from ..engine import Engine
from ..slopes import micro_batch
from ..types import Batch, Recipe, RequestError, Step
from .matching import attached
from .unroll import StudentStep, unroll, value_and_slope

_BETAS = (0.5, 0.999)


class ThroughTrainingOptions(BackendOptions):
    """Options of ``dd``; the defaults are the published ones (for 60,000 training images)."""

    iterations: int = Field(
        23_600, ge=1, description="outer iterations, one step each (published: 400 epochs)"
    )
    lr_img: float = Field(0.01, gt=0, description="Adam's rate, for images and learned rates")
    decay_every: int = Field(
        2_360, ge=1, description="iterations after which Adam's rate is halved (40 epochs)"
    )
    batch_real: int = Field(1024, ge=1, description="real images per step, all classes together")
    per_step: int = Field(
        1, ge=1, description="images per class in one step of training; IPC must be a multiple"
    )
    passes: int = Field(3, ge=1, description="times that training goes through all images")
    rate: float = Field(0.02, gt=0, description="where the learned rates of the steps start")
    student_init: Literal["random", "fixed"] = Field(
        "random",
        description="weights that training starts from: fresh ones each time, or always the "
        "same (stored with the set)",
    )
    networks: int = Field(1, ge=1, description="students per step, their gradients averaged")
    gradient: Literal["exact", "recompute"] = Field(
        "recompute", description="through training: exact keeps all steps in memory"
    )


@final
class DD(Backend):
    """Dataset Distillation (Wang, Zhu, Torralba, Efros; 2018): back-propagation through training.

    In words: a student starts from fresh weights (or always the same) and takes one step of plain
    gradient descent on each group of images, going through all groups several times, each step at
    its own learned rate; its loss on a batch of real images is differentiated through the whole
    training, and Adam moves images and rates. The set's recipe is exactly these steps.

    Defaults: the official code's (10 groups of one image a class at IPC 10, 3 passes, rates that
    start at 0.02 and stay positive through a softplus, Adam 0.01 with betas 0.5 and 0.999 halved
    every 40 epochs, batches of 1,024, noise). Deviations: real batches are drawn afresh in every
    iteration, not epoch by epoch; networks have PyTorch's default initialisation, not Xavier's;
    the student stays in training mode for the real batch, so batch norm uses that batch there.
    Fixed initial weights are stored in the recipe.
    """

    name = "dd"
    Options = ThroughTrainingOptions
    cost = "high: a whole short training is differentiated in every step"
    needs = "IPC a multiple of per_step; victims that train by the learned steps"
    victim_epochs = None
    victim_lr = None

    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        assert isinstance(options, ThroughTrainingOptions)
        if ipc % options.per_step:
            raise RequestError(
                f"dd trains on {options.per_step} images per class at a time: "
                f"IPC {ipc} is no multiple of that (--set per_step=N)"
            )
        self._options, self._ipc = options, ipc
        self._last: Tensor | None = None
        self._initial: Tensor | None = None  # of fixed students

    # Images, rates, recipe -----------------------------------------------------------------------

    def learned(self) -> dict[str, Tensor]:
        """The rates before their softplus, ``(passes · groups,)``."""
        count = self._options.passes * (self._ipc // self._options.per_step)
        rate = torch.tensor(self._options.rate, dtype=torch.float64)
        return {"raw_rates": rate.expm1().log().float().expand(count).clone()}

    def recipe(self, task: Task, learned: Mapping[str, Tensor]) -> Recipe:
        """The task's recipe with the learned steps, which otherwise need its preprocessing only."""
        rates = functional.softplus(learned["raw_rates"].detach()).tolist()
        groups = [tuple(group.tolist()) for group in self._groups(task)]
        steps = zip(groups * self._options.passes, rates, strict=True)
        if self._options.student_init == "fixed" and self._initial is None:
            self._initial = flat.laid_out(self._student(task, 0, 0))
        return replace(
            task.recipe,
            augment="",
            steps=tuple(Step(rows=rows, rate=rate) for rows, rate in steps),
            initial=self._initial,
        )

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam([leaf, *learned.values()], lr=self._options.lr_img, betas=_BETAS)

    def pace(self, iteration: int) -> float:
        return float(0.5 ** (iteration // self._options.decay_every))

    # What an iteration does ----------------------------------------------------------------------

    def steps(self) -> int:
        return 1

    def network(self, run: Run) -> nn.Module:
        return self._student(run.task, run.position.iteration, 0)

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        task, iteration = run.task, run.position.iteration
        steps = [StudentStep(rows=group) for group in self._groups(task)] * self._options.passes
        draws, count = run.position.generator("draw"), self._options.networks
        for number in range(count):
            # Once for each student: the loop frees a loss's graph before it takes the next one.
            rates = functional.softplus(run.synthetic.learned["raw_rates"])
            student = network if number == 0 else self._student(task, iteration, number)
            start = flat.laid_out(student)
            gradient, engine = self._options.gradient, task.engine
            last = unroll(student, start, synthetic, steps, rates, gradient, engine)
            real = run.real.draw_mixed(self._options.batch_real, draws)
            loss = _loss(student, last, real, engine) / count
            self._last = last.detach() if number == 0 else self._last
            yield loss

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        """The network becomes the student that this step has trained."""
        assert self._last is not None
        flat.write(network, self._last)

    def _student(self, task: Task, iteration: int, number: int) -> nn.Module:
        """An untrained student: number ``number`` of ``iteration``, or always the same."""
        random = self._options.student_init == "random"
        return task.fresh_network(*((iteration, number) if random else (0, 0)))

    def _groups(self, task: Task) -> list[Tensor]:
        """The rows of each step of one pass, ``per_step`` of every class."""
        count, device = task.classes * self._ipc, task.real.images.device
        rows = torch.arange(count, device=device).view(-1, self._ipc)
        return [group.flatten() for group in rows.split(self._options.per_step, dim=1)]


def _loss(network: nn.Module, weights: Tensor, real: Batch, engine: Engine) -> Tensor:
    """Mean loss on ``real`` with ``weights``, attached to them, gathered in pieces that fit."""
    size = len(real) if batch_norm_layers(network) else micro_batch(real.images.device)
    now = weights.detach().requires_grad_()
    static = engine.static(network)
    total, slope = torch.zeros((), device=now.device), torch.zeros_like(now)
    for images, labels in zip(real.images.split(size), real.labels.split(size), strict=True):
        batch, share = Batch(images=images, labels=labels), len(labels) / len(real)
        piece, found = value_and_slope(network, static, now, batch)
        total, slope = total + share * piece.detach(), slope + share * found
    return attached(total, weights, slope)
