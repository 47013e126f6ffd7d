"""The one outer loop of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..types import Batch, Distillate, RequestError
from .backend import Backend
from .hooks import Hook, announce, extra_loss, fold, listeners
from .resume import LoopState
from .run import Observer, Run
from .start import start_run
from .task import Task


def distil(
    task: Task,
    backend: Backend,
    hooks: Sequence[Hook] = (),
    *,
    observer: Observer | None = None,
    state: LoopState | None = None,
) -> Distillate:
    """Distil ``task`` from the start, or continue from ``state``; returns the set in pixel space.

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

    An iteration's last network is advanced only where a hook listens: nothing else reads it. The
    streams are stateless, so this extra work changes no other random number.
    Errors: ``RunError`` when the loss or the images are no longer finite, or a hook fails;
    ``RequestError`` for a state that is not of this task, backend and hooks.
    """
    run = start_run(task, backend, hooks, observer)
    position, synthetic = run.position, run.synthetic
    optimiser = backend.optimiser(synthetic.leaf, synthetic.learned)
    rates = [group["lr"] for group in optimiser.param_groups]
    if state:
        if state.iteration > task.iterations:
            raise RequestError(
                f"the kept state is of {state.iteration} iterations, the run has {task.iterations}"
            )
        state.restore(synthetic, optimiser, hooks)
    for iteration in range(state.iteration if state else 0, task.iterations):
        position.enter(iteration)
        backend.prepare(run)
        position.enter(iteration)
        network = backend.network(run)
        _set_rates(optimiser, rates, backend.pace(iteration))
        losses = []
        for step in range(backend.steps()):
            position.enter(iteration, step)
            losses.append(_back_propagate(run, backend, network, optimiser))
            optimiser.step()
            _change_images(run)
            is_read = step + 1 < backend.steps() or listeners(hooks, "on_network")
            if is_read and not position.is_last_step:
                backend.advance(run, network, synthetic.batch())
                announce(hooks, run.moments.at("on_network", network))
            run.observer.on_step(position.step + 1, position.total_steps)
        run.checks.read()
        loss = torch.stack(losses).mean().item()
        state_now = partial(LoopState.of, iteration + 1, synthetic, optimiser, hooks)
        run.observer.on_iteration(iteration + 1, loss, synthetic.distillate(), state_now)
    position.enter(task.iterations)
    finished = fold(hooks, "on_finish", run.moments.at("on_finish"), synthetic.batch())
    return Distillate(batch=finished, recipe=synthetic.recipe)


def _set_rates(optimiser: torch.optim.Optimizer, rates: Sequence[float], factor: float) -> None:
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * factor


def _back_propagate(
    run: Run, backend: Backend, network: nn.Module, optimiser: torch.optim.Optimizer
) -> Tensor:
    """Leave the gradient of one step's loss, the hooks' losses included; returns the loss.

    It is a detached scalar on the images' device, which the CPU does not wait for.
    """
    optimiser.zero_grad()
    pixels = run.synthetic.pixels()
    # Each partial loss stops at this leaf, so that its graph is freed before the next is built.
    seen = pixels.detach().requires_grad_()
    synthetic = Batch(images=seen, labels=run.synthetic.labels)
    total = seen.new_zeros(())
    for loss in backend.losses(run, network, synthetic):
        loss.backward(inputs=[seen, *run.synthetic.learned.values()])
        total += loss.detach()
    extra = extra_loss(run.hooks, run.moments.at("on_loss", network), synthetic, run.checks)
    if extra is not None:
        extra.backward(inputs=[seen])
        total += extra.detach().squeeze()
    _expect_finite(run, total, "the loss")
    pixels.backward(seen.grad)
    return total


def _change_images(run: Run) -> None:
    """After the optimiser's step: ``on_synthetic``, and the projection of the pixels."""
    synthetic = run.synthetic
    for name, value in synthetic.values().items():
        _expect_finite(run, value, name)
    if listeners(run.hooks, "on_synthetic"):
        offered, moment = synthetic.batch(), run.moments.at("on_synthetic")
        answer = fold(run.hooks, "on_synthetic", moment, offered, checks=run.checks)
        if answer is not offered:  # a detour through pixel space would cost the last bits
            synthetic.write(answer.images)
    if run.task.clip_pixels:
        synthetic.write(synthetic.batch().images.clamp(0, 1))


def _expect_finite(run: Run, value: Tensor, name: str) -> None:
    run.checks.expect(
        value, f"the distillation diverged: {name} is not finite at step {run.position.step}"
    )
