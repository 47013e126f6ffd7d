"""Trajectory matching: ``mtt``, students that follow experts trained on the real data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import weights as flat
from ..augment import Augmentation, parse_strategy
from ..core.backend import Backend, BackendOptions
from ..core.position import Position
from ..core.run import Run
from ..core.task import Start, Task
from ..devices import moved
from ..types import Batch, Recipe, RequestError, RunError
from .experts import Buffer, ExpertPlan, open_buffer
from .matching import trajectory_distance
from .unroll import GradientName, StudentStep, unroll

_AUGMENT = "color_crop_cutout_flip_scale_rotate"


class TrajectoryMatchingOptions(BackendOptions):
    """Options of ``mtt``; the defaults are the official code's."""

    iterations: int = Field(5000, ge=1, description="outer iterations, one step each")
    init: Start = "real"
    lr_img: float = Field(1000.0, gt=0, description="learning rate of the synthetic images")
    momentum_img: float = Field(0.5, ge=0, lt=1, description="momentum of images and student rate")
    student_steps: int = Field(20, ge=1, description="steps a student takes on the synthetic set")
    batch_syn: int | None = Field(
        None, ge=1, description="synthetic images in a student's step (default: all)"
    )
    student_rate: float = Field(0.01, gt=0, description="where the learned student rate starts")
    lr_rate: float = Field(1e-5, ge=0, description="learning rate of the student rate")
    expert_epochs: int = Field(3, ge=1, description="expert epochs that a student has to match")
    max_start_epoch: int = Field(25, ge=1, description="students start before this expert epoch")
    augment: str = Field(
        _AUGMENT,
        description="siamese operations, joined by _; flip is dropped where it changes the label",
    )
    gradient: GradientName = Field(
        "exact",
        description="through the student's steps: exact, recompute (the same, constant memory) or "
        "tesla (its published approximation, constant memory)",
    )
    experts: int = Field(100, ge=1, description="experts in the buffer")
    train_epochs: int = Field(50, ge=1, description="epochs an expert trains")
    expert_rows: int | None = Field(
        None, ge=1, description="training rows in an expert's epoch, drawn afresh (default: all)"
    )
    expert_lr: float = Field(0.01, gt=0, description="experts' learning rate")
    expert_momentum: float = Field(0.0, ge=0, lt=1, description="experts' momentum")
    expert_weight_decay: float = Field(0.0, ge=0, description="experts' weight decay")
    expert_decay: bool = Field(False, description="drop the experts' rate to a tenth after half")
    expert_batch: int = Field(256, ge=1, description="experts' mini-batch")
    expert_seed: int | None = Field(
        None, ge=0, description="experts' own seed, to share a buffer (default: the run's)"
    )
    experts_per_file: int = Field(
        10, ge=1, description="experts that train in lockstep and lie in one file"
    )
    rounds: int = Field(
        1, ge=1, description="times that experts are trained anew, with the current trigger"
    )


@final
class MTT(Backend):
    """Dataset Distillation by Matching Training Trajectories (Cazenavette et al.; CVPR 2022).

    In words: train experts on the real data and keep their weights after every epoch; then, again
    and again, put a student where an expert stood after some early epoch, train it for a few steps
    on the synthetic images at a learned rate, and move images and rate so that it ends where the
    expert stood some epochs later: squared distance of the weights, as a share of the expert's own
    way. Networks that receive the set train at the learned rate.

    Defaults: the official code's; what it published per data set and IPC differs from them in
    ``student_steps``, ``expert_epochs``, ``max_start_epoch`` and the rates. Its CIFAR-10 figures
    at IPC 1 and 10 are with ZCA whitening (``zca``). Deviations: expert and start epoch are drawn
    uniformly in each iteration, where the code walks through shuffled files; a student rate that
    falls to zero stops the run, where the code goes on to train backwards; ``rounds`` and
    ``expert_rows`` are ours.
    ``gradient`` offers two forms of constant memory, see ``unroll``.
    """

    name = "mtt"
    Options = TrajectoryMatchingOptions
    cost = "high: experts are trained on all real data first, then students are differentiated"
    needs = "a folder for the experts (in the run's, or --buffer), reused by later runs"
    expert_options = (
        *("experts", "train_epochs", "expert_rows", "expert_lr", "expert_momentum"),
        *("expert_weight_decay", "expert_decay", "expert_batch", "expert_seed"),
        *("experts_per_file", "augment"),
    )
    victim_epochs = 1000
    victim_lr = None
    victim_augment = _AUGMENT

    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        assert isinstance(options, TrajectoryMatchingOptions)
        if options.max_start_epoch - 1 + options.expert_epochs > options.train_epochs:
            raise RequestError(
                f"mtt: a student that starts at epoch {options.max_start_epoch - 1} and matches "
                f"{options.expert_epochs} more wants experts of "
                f"{options.max_start_epoch - 1 + options.expert_epochs} epochs, train_epochs is "
                f"{options.train_epochs}"
            )
        self._options = options
        self._augmentation = Augmentation(parse_strategy(options.augment), recipe.preprocessing)
        self._round: int | None = None
        self._buffer: Buffer | None = None
        self._ends: tuple[Tensor, Tensor] | None = None
        self._last: Tensor | None = None

    # Images, rate, recipe ------------------------------------------------------------------------

    def learned(self) -> dict[str, Tensor]:
        """The student's rate, one number."""
        return {"student_rate": torch.tensor(self._options.student_rate)}

    def recipe(self, task: Task, learned: Mapping[str, Tensor]) -> Recipe:
        """The task's recipe at the learned rate."""
        return replace(task.recipe, lr=_positive_rate(learned).item())

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        options = self._options
        rates = {"params": list(learned.values()), "lr": options.lr_rate}
        images = {"params": [leaf], "lr": options.lr_img}
        return torch.optim.SGD([images, rates], momentum=options.momentum_img)

    # What an iteration does ----------------------------------------------------------------------

    def prepare(self, run: Run) -> None:
        """Train the round's experts, or open the buffer that has them."""
        length = -(-run.task.iterations // self._options.rounds)
        round_, within = divmod(run.position.iteration, length)
        if round_ != self._round:
            self._buffer = open_buffer(run, self._plan(run.task), round_, fresh=within == 0)
            self._round = round_

    def steps(self) -> int:
        return 1

    def network(self, run: Run) -> nn.Module:
        self._ends = self._start_and_target(run)
        network = run.task.network(0).train()
        flat.write(network, self._ends[0])
        return network

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        assert self._ends is not None
        start, target = self._ends
        steps = self._student_steps(run.position, synthetic)
        rates = _positive_rate(run.synthetic.learned).expand(len(steps))
        gradient, engine = self._options.gradient, run.task.engine
        last = unroll(network, start, synthetic, steps, rates, gradient, engine)
        self._last = last.detach()
        yield trajectory_distance(last, start, target)

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        """The network becomes the student at the end of its steps."""
        assert self._last is not None
        flat.write(network, self._last)

    def _start_and_target(self, run: Run) -> tuple[Tensor, Tensor]:
        """The iteration's expert's weights where the student starts and later, ``(P,)`` each."""
        assert self._buffer is not None
        options, generator = self._options, run.position.generator("draw")
        expert = int(torch.randint(options.experts, (1,), generator=generator))
        epoch = int(torch.randint(options.max_start_epoch, (1,), generator=generator))
        start, target = (
            moved(self._buffer.weights(expert, when), run.synthetic.leaf.device)
            for when in (epoch, epoch + options.expert_epochs)
        )
        return start, target

    def _student_steps(self, position: Position, synthetic: Batch) -> list[StudentStep]:
        """The rows of each step, whole orders cut into batches, and their augmentation."""
        draws, augments = position.generator("draw", 1), position.generator("augment")
        size = min(self._options.batch_syn or len(synthetic), len(synthetic))
        batches: list[Tensor] = []
        steps = []
        for _ in range(self._options.student_steps):
            if not batches:
                order = torch.randperm(len(synthetic), generator=draws)
                batches = list(moved(order, synthetic.images.device).split(size))
            rows = batches.pop()
            shape = (len(rows), *synthetic.images.shape[1:])
            transform = self._augmentation.draw(shape, augments, shared=False)
            steps.append(StudentStep(rows=rows, transform=transform))
        return steps

    def _plan(self, task: Task) -> ExpertPlan:
        options = self._options
        return ExpertPlan(
            experts=options.experts,
            epochs=options.train_epochs,
            rows=options.expert_rows,
            recipe=task.recipe.by_epochs(
                epochs=options.train_epochs,
                lr=options.expert_lr,
                momentum=options.expert_momentum,
                weight_decay=options.expert_weight_decay,
                batch_size=options.expert_batch,
                augment="_".join(parse_strategy(options.augment)),
            ),
            decay=options.expert_decay,
            seed=task.streams.seed if options.expert_seed is None else options.expert_seed,
            per_file=min(options.experts_per_file, options.experts),
        )


def _positive_rate(learned: Mapping[str, Tensor]) -> Tensor:
    """The student's learned rate, a scalar. Errors: ``RunError`` where it is not positive."""
    rate = learned["student_rate"]
    if rate.item() <= 0:
        raise RunError(
            f"the student's learning rate fell to {rate.item():.2g}, it must stay above 0: "
            "lower lr_rate"
        )
    return rate
