"""Objects in place of names: classes, functions, networks, data sets, given in Python.

Everything below works with names, which records can hold. So each object gets one, its
``module:qualname``, that means the object for as long as a run lasts. A record lists these names as
``objects``: nobody can load them from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

from torch import nn

from ...attacks import ATTACKS, Attack
from ...defenses import DEFENSES, Defense
from ...distill.backends import BACKENDS
from ...distill.core.backend import Backend
from ...distill.data.given import given_dataset
from ...distill.networks.makers import NetworkKind
from ...distill.plugins import objects_by_name, reference_to
from ...distill.types import RequestError

Keys = dict[str, Any]


@contextmanager
def named(given: Mapping[str, Any]) -> Iterator[Keys]:
    """The keys of ``given`` with names in place of objects; within, the names mean the objects.

    Errors: ``RequestError`` for an object that cannot stand for such a name.
    """
    names = ObjectNames()
    keys = names.keys(given)
    with objects_by_name(names.objects):
        yield keys


@final
class ObjectNames:
    """Names for objects. objects: those that have one now, by name."""

    def __init__(self) -> None:
        self.objects: Keys = {}

    def keys(self, given: Mapping[str, Any]) -> Keys:
        """``given`` with names in place of objects. The options that an object brings are keys too,
        and other keys win over them."""
        brought: Keys = {}
        plain: Keys = {}
        for key, value in given.items():
            if key not in _NAMERS or isinstance(value, str) or value is None:
                plain[key] = value
            else:
                name, options = _NAMERS[key](self, value)
                brought |= options
                plain[key] = name
        return {**brought, **plain}

    def defense(self, found: Any) -> str:
        """The name of a class of defenses."""
        return self._class(found, DEFENSES, Defense, "defense")

    def add(self, thing: object, named_by: object) -> str:
        """A name for ``thing``: that of ``named_by``, its class or function."""
        name = reference_to(named_by)
        if self.objects.setdefault(name, thing) is not thing:
            raise RequestError(f"two objects would be called {name}: give each a name of its own")
        return name

    def _attack(self, value: Any) -> tuple[str, Keys]:
        if isinstance(value, Attack):
            options = value.options.model_dump()
            return self._class(type(value), ATTACKS, Attack, "attack"), options
        return self._class(value, ATTACKS, Attack, "attack"), {}

    def _backend(self, value: Any) -> tuple[str, Keys]:
        return self._class(value, BACKENDS, Backend, "backend"), {}

    def _network(self, value: Any) -> tuple[str, Keys]:
        if isinstance(value, NetworkKind):
            return value.spec.network, value.spec.model_dump(exclude_none=True)
        if isinstance(value, nn.Module):
            return self.add(fresh_copies(value), value), {}
        if not callable(value):
            raise RequestError(f"network {value!r:.60}: expected a name, a class or a torch module")
        return self.add(value, value), {}

    def _victims(self, value: Any) -> tuple[list[str], Keys]:
        several = value if isinstance(value, (list, tuple)) else [value]
        found = [self.keys({"network": each}) for each in several]
        for keys in found:
            if len(keys) > 1:
                raise RequestError(
                    f"victim_network {keys['network']} takes no parameters: a victim of another "
                    "architecture than the distilling network has the published ones"
                )
        return [keys["network"] for keys in found], {}

    def _dataset(self, value: Any) -> tuple[str, Keys]:
        parts = [*value.values()] if isinstance(value, Mapping) else value
        first = parts[0] if isinstance(parts, (list, tuple)) and parts else value
        return self.add(given_dataset(value), first), {}

    def _class(self, found: Any, registry: Mapping[str, Any], base: type[Any], what: str) -> str:
        if not (isinstance(found, type) and issubclass(found, base)):
            raise RequestError(
                f"{what} {found!r:.60}: expected a name or a subclass of {base.__name__}"
            )
        own = next((name for name, entry in registry.items() if entry is found), None)
        return self.add(found, found) if own is None else own


_Namer = Callable[[ObjectNames, Any], tuple[Any, Keys]]
_NAMERS: Mapping[str, _Namer] = {
    "attack": ObjectNames._attack,
    "backend": ObjectNames._backend,
    "network": ObjectNames._network,
    "victim_network": ObjectNames._victims,
    "dataset": ObjectNames._dataset,
}


def fresh_copies(network: nn.Module) -> Callable[..., nn.Module]:
    """A function that copies ``network`` and draws the weights of all its layers anew: every victim
    is a fresh one.

    Errors: ``RequestError`` for a network with weights in a layer without ``reset_parameters``.
    """
    for name, layer in network.named_modules():
        if any(True for _ in layer.parameters(recurse=False)) and not callable(
            getattr(layer, "reset_parameters", None)
        ):
            raise RequestError(
                f"network {type(network).__name__}: layer {name or 'itself'} has no "
                "reset_parameters, and every victim needs fresh weights: give the class, or a "
                "function that makes the network"
            )

    def make(image_shape: Sequence[int], classes: int) -> nn.Module:
        fresh = copy.deepcopy(network)
        for layer in fresh.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
        return fresh

    return make
