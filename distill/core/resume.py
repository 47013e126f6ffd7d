"""States as flat mappings of tensors, which files hold and a resumed run continues from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..files.prefixes import add_prefix, select_prefix
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
        """Put the state back."""
        with torch.no_grad():
            synthetic.leaf.copy_(self.leaf)
            for name, value in synthetic.learned.items():
                value.copy_(self.learned[name])
        restore_optimiser(optimiser, self.optimiser)
        restore_hooks(hooks, self.hooks)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, under the names that ``from_tensors`` reads."""
        groups = add_prefix("learned", self.learned) | add_prefix("optimiser", self.optimiser)
        return {"leaf": self.leaf, **groups, **self.hooks}

    @classmethod
    def from_tensors(cls, iteration: int, tensors: Mapping[str, Tensor]) -> LoopState:
        """The state that ``tensors`` gave. Errors: ``KeyError`` where the images are missing."""
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
    """Give the hooks back what ``hook_tensors`` took."""
    for number, hook in enumerate(hooks):
        hook.load_state_dict(select_prefix(f"hook.{number}", tensors))
