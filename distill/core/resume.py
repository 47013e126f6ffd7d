"""States as flat mappings of tensors, which files hold and a resumed run continues from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..files.prefixes import add_prefix, select_prefix
from ..types import RequestError
from .hooks import Hook
from .synthetic import SyntheticSet


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LoopState:
    """All that a resumed loop needs to continue after ``iteration`` finished iterations.

    leaf: the images in normalised space. learned: what is learned beside them. optimiser, hooks:
    their tensors, named as ``optimiser_tensors`` and ``hook_tensors`` do.
    """

    iteration: int
    leaf: Tensor
    learned: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    hooks: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        iteration: int,
        synthetic: SyntheticSet,
        optimiser: torch.optim.Optimizer,
        hooks: Sequence[Hook],
    ) -> LoopState:
        """Copies of the state as it is now."""
        return cls(
            iteration=iteration,
            leaf=synthetic.leaf.detach().clone(),
            learned={name: value.detach().clone() for name, value in synthetic.learned.items()},
            optimiser=optimiser_tensors(optimiser),
            hooks=hook_tensors(hooks),
        )

    def restore(
        self, synthetic: SyntheticSet, optimiser: torch.optim.Optimizer, hooks: Sequence[Hook]
    ) -> None:
        """Put the state back.

        Errors: ``RequestError`` where it is not the state of such images, optimiser and hooks;
        then only the hooks may have changed.
        """
        _check_like("the images", {"leaf": self.leaf}, {"leaf": synthetic.leaf})
        _check_like("what is learned", self.learned, synthetic.learned)
        _check_like("the optimiser", self.optimiser, _stepped(optimiser, {}))
        try:
            _stepped(optimiser, self.optimiser)
        except Exception as error:  # a count of steps below 0 fails in several ways
            raise RequestError(f"the kept state of the optimiser is not one: {error}") from error
        restore_hooks(hooks, self.hooks)
        with torch.no_grad():
            synthetic.leaf.copy_(self.leaf)
            for name, value in synthetic.learned.items():
                value.copy_(self.learned[name])
        restore_optimiser(optimiser, self.optimiser)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, under the names that ``from_tensors`` reads."""
        groups = add_prefix("learned", self.learned) | add_prefix("optimiser", self.optimiser)
        return {"leaf": self.leaf, **groups, **self.hooks}

    @classmethod
    def from_tensors(cls, iteration: int, tensors: Mapping[str, Tensor]) -> LoopState:
        """The state that ``tensors`` gave.

        Errors: ``KeyError`` where the images are missing, ``ValueError`` for another number of
        iterations than 0 or more.
        """
        if iteration < 0:
            raise ValueError(f"{iteration} iterations")
        return cls(
            iteration=iteration,
            leaf=tensors["leaf"],
            learned=select_prefix("learned", tensors),
            optimiser=select_prefix("optimiser", tensors),
            hooks=add_prefix("hook", select_prefix("hook", tensors)),
        )


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of an optimiser's tensors, by ``parameter.name``."""
    return {
        f"{parameter}.{name}": value.clone()
        for parameter, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser back what ``optimiser_tensors`` took."""
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.split(".", 1)
        kept.setdefault(int(parameter), {})[name] = value.clone()
    optimiser.load_state_dict({**optimiser.state_dict(), "state": kept})


def hook_tensors(hooks: Sequence[Hook]) -> dict[str, Tensor]:
    """The hooks' tensors, by ``hook.number.name``."""
    states = [add_prefix(f"hook.{number}", hook.state_dict()) for number, hook in enumerate(hooks)]
    return {name: value for state in states for name, value in state.items()}


def restore_hooks(hooks: Sequence[Hook], tensors: Mapping[str, Tensor]) -> None:
    """Give the hooks back what ``hook_tensors`` took.

    Errors: ``RequestError`` where a hook cannot take it.
    """
    for number, hook in enumerate(hooks):
        try:
            hook.load_state_dict(select_prefix(f"hook.{number}", tensors))
        except Exception as error:  # a hook of the user's may fail in any way
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            text = " ".join(f"{type(hook).__name__} cannot take its kept state ({what})".split())
            raise RequestError(text) from error


def _stepped(optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a copy of ``optimiser`` has after a step from ``state``."""
    stepped = copy.deepcopy(optimiser)
    restore_optimiser(stepped, state)
    for group in stepped.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    return optimiser_tensors(stepped)


def _check_like(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not finite, or not of the names, types and shapes ``wanted``."""
    known = {name: (value.dtype, tuple(value.shape)) for name, value in wanted.items()}
    given = {name: (value.dtype, tuple(value.shape)) for name, value in found.items()}
    for name in sorted(known.keys() | given.keys()):
        if known.get(name) != given.get(name):
            raise RequestError(
                f"the kept state of {what} does not fit this run: {name:.60} is "
                f"{_described(given.get(name))}, expected {_described(known.get(name))}"
            )
    bad = next((name for name, value in found.items() if not value.isfinite().all()), None)
    if bad is not None:
        raise RequestError(f"the kept state of {what} holds NaN or infinite values ({bad})")


def _described(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {kind[1]}"
