"""The one outer loop of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, final

import torch
from torch import Tensor, nn

from ..types import Batch, Distillate, RunError
from .backend import Backend
from .hooks import Hook, announce, extra_loss, fold, listeners
from .resume import of_optimiser, to_optimiser
from .stage import Stage, Task


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LoopState:
    """All that a resumed loop needs to go on after ``iteration`` finished iterations.

    leaf: the images in normalised space. learned: what is learned beside them. optimiser: its
    tensors, by ``parameter.name``. hooks: one state per hook.
    """

    iteration: int
    leaf: Tensor
    learned: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    hooks: Sequence[Mapping[str, Tensor]]


class Observer(Protocol):
    """Who watches a loop: shows progress, keeps checkpoints, draws the learning curve."""

    def on_expert(self, done: int, total: int) -> None:
        """``done`` of the ``total`` epochs of expert training that this round needs are over."""

    def on_step(self, done: int, total: int) -> None:
        """``done`` of the run's ``total`` synthetic steps are over."""

    def on_iteration(
        self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
    ) -> None:
        """``iteration`` outer iterations are over; ``loss`` is the last one's mean per step."""


def distil(
    task: Task,
    backend: Backend,
    hooks: Sequence[Hook] = (),
    *,
    observer: Observer | None = None,
    state: LoopState | None = None,
) -> Distillate:
    """Distil ``task`` from the start, or go on from ``state``; returns the set in pixel space.

    Where each hook fires::

        real = on_start(real)                            # again after a resume: it is repeatable
        S = the initial images
        for iteration in 1 … iterations:
            backend.prepare()                            # mtt trains experts: on_sample, on_draw
                                                         #   and on_network fire in there too
            network = backend.network()
            for step in 1 … backend.steps():
                loss = backend.losses(network, S)        # for each real batch drawn:
                                                         #   rows  = on_sample(label, rows)
                                                         #   batch = on_draw(real[rows])
                loss += on_loss(S)
                S = on_synthetic(S − rate · gradient of loss)
                if further steps follow in the run:
                    backend.advance(network, S)
                    on_network(network)                  # the Doorping moment
        S = on_finish(S)

    An iteration's last network is advanced only for a hook's sake: nobody else would look at it.
    The streams are stateless, so that extra work changes no other random number.
    Errors: ``RunError`` when the loss or the images are no longer finite, or a hook fails.
    """
    stage = _set_up(task, backend, hooks, observer)
    optimiser = backend.optimiser(stage.leaf, stage.learned)
    rates = [group["lr"] for group in optimiser.param_groups]
    first = _restore(state, stage, optimiser) if state else 0
    for iteration in range(first, task.iterations):
        stage.enter(iteration, 0)
        backend.prepare(stage)
        stage.enter(iteration, 0)
        _pace(optimiser, rates, backend.pace(iteration))
        network = backend.network(stage)
        losses = []
        for step in range(backend.steps()):
            stage.enter(iteration, step)
            losses.append(_improve(stage, backend, network, optimiser))
            looked_at = step + 1 < backend.steps() or listeners(hooks, "on_network")
            if looked_at and not stage.on_last_step:
                backend.advance(stage, network, stage.synthetic())
                announce(hooks, stage.moment("on_network", network))
            if observer:
                observer.on_step(stage.step + 1, stage.total_steps)
        if observer:
            mean = sum(losses) / len(losses)
            state_now = partial(_state, iteration + 1, stage, optimiser)
            observer.on_iteration(iteration + 1, mean, stage.made(), state_now)
    stage.enter(task.iterations, 0)
    finished = fold(hooks, "on_finish", stage.moment("on_finish"), stage.synthetic())
    return Distillate(batch=finished, recipe=stage.recipe)


def _set_up(
    task: Task, backend: Backend, hooks: Sequence[Hook], observer: Observer | None
) -> Stage:
    learned, recipe, start = backend.learned(), backend.recipe, backend.start
    stage = Stage(task, hooks, backend.steps(), learned=learned, recipe=recipe, start=start)
    if observer:
        stage.on_expert = observer.on_expert
    return stage


def _pace(optimiser: torch.optim.Optimizer, rates: Sequence[float], share: float) -> None:
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * share


def _improve(
    stage: Stage, backend: Backend, network: nn.Module, optimiser: torch.optim.Optimizer
) -> float:
    """One synthetic step: match, descend, offer the images to the hooks. Returns the loss."""
    optimiser.zero_grad()
    pixels = stage.pixels()
    # Each partial loss stops at this leaf, so that its graph is freed before the next is built.
    seen = pixels.detach().requires_grad_()
    synthetic = Batch(images=seen, labels=stage.labels)
    total = 0.0
    for loss in backend.losses(stage, network, synthetic):
        loss.backward(inputs=[seen, *stage.learned.values()])
        total += loss.item()
    extra = extra_loss(stage.hooks, stage.moment("on_loss", network), synthetic)
    if extra is not None:
        extra.backward(inputs=[seen])
        total += extra.item()
    if not math.isfinite(total):
        raise RunError(f"the distillation diverged: the loss is {total} at step {stage.step}")
    pixels.backward(seen.grad)
    optimiser.step()
    _offer(stage)
    return total


def _offer(stage: Stage) -> None:
    """Let the hooks and the pixel projection change the images after a step."""
    if not bool(stage.leaf.isfinite().all()):
        raise RunError(f"the distillation diverged: an image is not finite at step {stage.step}")
    for name, value in stage.learned.items():
        if not bool(value.isfinite().all()):
            raise RunError(f"the distillation diverged: {name} is not finite at step {stage.step}")
    if listeners(stage.hooks, "on_synthetic"):
        moment = stage.moment("on_synthetic")
        offered = stage.synthetic()
        answer = fold(stage.hooks, "on_synthetic", moment, offered)
        if answer is not offered:  # a detour through pixel space would cost the last bits
            stage.write(answer.images)
    if stage.task.clip_pixels:
        stage.write(stage.synthetic().images.clamp(0, 1))


def _state(iteration: int, stage: Stage, optimiser: torch.optim.Optimizer) -> LoopState:
    return LoopState(
        iteration=iteration,
        leaf=stage.leaf.detach().clone(),
        learned={name: value.detach().clone() for name, value in stage.learned.items()},
        optimiser=of_optimiser(optimiser),
        hooks=[hook.state_dict() for hook in stage.hooks],
    )


def _restore(state: LoopState, stage: Stage, optimiser: torch.optim.Optimizer) -> int:
    """Put ``state`` back; returns how many iterations it has behind it."""
    with torch.no_grad():
        stage.leaf.copy_(state.leaf)
        for name, value in stage.learned.items():
            value.copy_(state.learned[name])
    to_optimiser(optimiser, state.optimiser)
    for hook, own in zip(stage.hooks, state.hooks, strict=True):
        hook.load_state_dict(dict(own))
    return state.iteration
