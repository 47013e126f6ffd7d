"""States as flat mappings of tensors, which is what files hold and a resumed run takes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .hooks import Hook


def of_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of an optimiser's tensors, by ``parameter.name``."""
    return {
        f"{parameter}.{name}": value.clone()
        for parameter, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def to_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser back what ``of_optimiser`` took."""
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.split(".", 1)
        kept.setdefault(int(parameter), {})[name] = value.clone()
    optimiser.load_state_dict({**optimiser.state_dict(), "state": kept})


def of_hooks(hooks: Sequence[Hook]) -> dict[str, Tensor]:
    """The hooks' tensors, by ``hook.number.name``."""
    states = [under(f"hook.{number}", hook.state_dict()) for number, hook in enumerate(hooks)]
    return {name: value for state in states for name, value in state.items()}


def to_hooks(hooks: Sequence[Hook], tensors: Mapping[str, Tensor]) -> None:
    """Give the hooks back what ``of_hooks`` took."""
    for number, hook in enumerate(hooks):
        hook.load_state_dict(below(f"hook.{number}", tensors))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with ``prefix.`` before each name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` whose names begin with ``prefix.``, without it."""
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}.")
    }
