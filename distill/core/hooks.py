"""Hooks: the only way in which an attack acts on a distillation.

The loop calls a hook at events; the hook returns a replacement and changes no argument. ``fold``
passes a value through the hooks in list order and refuses answers that the loop cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, final

import torch
from torch import Tensor, nn

from ..engine import PLAIN, Engine
from ..types import Batch, DistillsecError, Recipe, RunError
from .finite import FiniteChecks

Phase = Literal["expert", "distill"]
Event = Literal["on_start", "on_sample", "on_draw", "on_loss", "on_synthetic", "on_finish"]
Value = TypeVar("Value", Batch, Tensor)

EVENTS = (
    "on_start",
    "on_sample",
    "on_draw",
    "on_loss",
    "on_network",
    "on_synthetic",
    "on_finish",
)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """What a hook may read when an event fires.

    phase: ``"distill"``, or ``"expert"`` while a backend trains experts.
    iteration, step: the outer iteration, and the synthetic step counted over the whole run.
    progress: the share of the run's synthetic steps that are done, 0 to 1.
    network: a frozen, callable copy of the live network (pixel space to logits), or ``None``
    where there is none at this event.
    real: the clean training set. synthetic: the current set, detached (``None`` at ``on_start``).
    recipe: how victims will train. fresh_network: an untrained network of the distilling
    architecture, or of a variant of it (``fresh_network("mlp")``); train_student: one of the
    distilling architecture, trained on the current set. Each call gives another.
    rng: the attack's random stream, private to this event. engine: how networks' passes run.
    """

    phase: Phase
    iteration: int
    step: int
    progress: float
    network: nn.Module | None
    real: Batch
    synthetic: Batch | None
    recipe: Recipe
    fresh_network: Callable[..., nn.Module]
    train_student: Callable[[], nn.Module]
    rng: torch.Generator
    engine: Engine = PLAIN


class Hook:
    """Base of every attack: override the events of interest, return replacements.

    The defaults change nothing. A subclass with a method ``on_*`` that is no event is refused when
    the class is made: a misspelt hook would otherwise look like an attack without effect.
    """

    name: str = "hook"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unknown = [name for name in dir(cls) if name.startswith("on_") and name not in EVENTS]
        if unknown:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(unknown)}, which the loop never calls; "
                f"the events are {', '.join(EVENTS)}"
            )

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        """Once, the whole training set: choose, relabel, stamp rows."""
        return real

    def on_sample(self, moment: Moment, label: int, rows: Tensor) -> Tensor:
        """The rows ``int64 (n,)`` drawn from class ``label``; return as many rows of that class."""
        return rows

    def on_draw(self, moment: Moment, clean: Batch) -> Batch:
        """Every real batch drawn, its pixels unstamped by earlier draws."""
        return clean

    def on_loss(self, moment: Moment, synthetic: Batch) -> Tensor | None:
        """An extra scalar loss, attached to the synthetic images; ``None`` for none.

        ``synthetic.images.grad`` is the gradient of the backend's own loss at this step.
        """
        return None

    def on_network(self, moment: Moment) -> None:
        """The network moved. A trigger that lives on the hook may move with it."""

    def on_synthetic(self, moment: Moment, synthetic: Batch) -> Batch:
        """After each synthetic step; written into the leaf, the optimiser's state stays."""
        return synthetic

    def on_finish(self, moment: Moment, synthetic: Batch) -> Batch:
        """Once, the finished set."""
        return synthetic

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs to continue exactly, as tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave."""

    def listens_to(self, event: str) -> bool:
        """Whether this hook overrides ``event``."""
        return getattr(type(self), event) is not getattr(Hook, event)


def listeners(hooks: Sequence[Hook], event: str) -> list[Hook]:
    """The hooks that override ``event``, in order."""
    return [hook for hook in hooks if hook.listens_to(event)]


def fold(
    hooks: Sequence[Hook],
    event: Event,
    moment: Callable[[], Moment],
    value: Value,
    *before: Any,
    checks: FiniteChecks | None = None,
) -> Value:
    """Pass ``value`` through the hooks in list order.

    ``moment`` is called only where a hook listens (a moment may copy a network). ``before`` are
    the event's arguments before the value. checks: where answers wait to be checked for NaN and
    infinity; without it they are checked at once. Errors: ``RunError``, with the hook, the event
    and the step, for any exception in a hook and for an answer of another type, shape, dtype or
    device or with values that are not finite.
    """
    waiting = FiniteChecks() if checks is None else checks
    for hook in listeners(hooks, event):
        now = moment()
        answer = call(hook, event, now, *before, value)
        _check_alike(answer, value, f"{hook.name}.{event} at step {now.step}", waiting)
        value = answer
    if checks is None:
        waiting.read()
    return value


def announce(hooks: Sequence[Hook], moment: Callable[[], Moment]) -> None:
    """Call ``on_network`` of every listening hook."""
    for hook in listeners(hooks, "on_network"):
        call(hook, "on_network", moment())


def extra_loss(
    hooks: Sequence[Hook],
    moment: Callable[[], Moment],
    synthetic: Batch,
    checks: FiniteChecks | None = None,
) -> Tensor | None:
    """The sum of the hooks' losses, or ``None``; ``checks`` as for ``fold``.

    Errors: as for ``fold``; a loss must be one finite number, attached to the images.
    """
    waiting = FiniteChecks() if checks is None else checks
    total: Tensor | None = None
    for hook in listeners(hooks, "on_loss"):
        now = moment()
        loss = call(hook, "on_loss", now, synthetic)
        if loss is None:
            continue
        where = f"{hook.name}.on_loss at step {now.step}"
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise RunError(f"{where} must return one number")
        if not loss.requires_grad:
            raise RunError(f"{where}: the loss is not attached to the synthetic images")
        waiting.expect(loss, f"{where}: the loss is not finite")
        total = loss if total is None else total + loss
    if checks is None:
        waiting.read()
    return total


def call(hook: Hook, event: str, moment: Moment, *arguments: Any) -> Any:
    """One hook's answer to one event; errors name the hook, the event and the step."""
    try:
        return getattr(hook, event)(moment, *arguments)
    except DistillsecError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise RunError(f"{hook.name}.{event} at step {moment.step}: {kind}: {error}") from error


def _check_alike(answer: object, asked: Batch | Tensor, where: str, checks: FiniteChecks) -> None:
    """Refuse an answer that cannot replace the original value."""
    if isinstance(asked, Batch):
        if not isinstance(answer, Batch):
            raise RunError(f"{where} must return a Batch, not {type(answer).__name__}")
        _check_tensor(answer.images, asked.images, f"{where}: images", checks)
        _check_tensor(answer.labels, asked.labels, f"{where}: labels", checks)
        if asked.index is not None and answer.index is None:
            raise RunError(f"{where}: the batch lost its index")
    else:
        _check_tensor(answer, asked, where, checks)


def _check_tensor(answer: object, asked: Tensor, where: str, checks: FiniteChecks) -> None:
    if not isinstance(answer, Tensor):
        raise RunError(f"{where} must be a tensor, not {type(answer).__name__}")
    for trait in ("shape", "dtype", "device"):
        given, wanted = getattr(answer, trait), getattr(asked, trait)
        if given != wanted:
            raise RunError(f"{where}: {trait} is {given}, expected {wanted}")
    if answer.is_floating_point():
        checks.expect(answer, f"{where}: values are not finite")
