"""The network that a set was distilled with: its victims have it, unless the user chose another."""

from __future__ import annotations

from collections.abc import Collection

from ...distill.files.artifact import load_set
from ...distill.networks.registry import NetworkSpec, count_parameters
from ...distill.plugins import is_reference
from ...distill.types import DistilledSet, RequestError
from ..config.schema import Config, build_options
from ..results.subject import victims_text
from .source import SetFiles

_MOST_PARAMETERS = 2**26
"""Of a network that a file or a record names; its training takes about a gigabyte."""


def with_own_network(
    config: Config, found: SetFiles, given: Collection[str]
) -> tuple[Config, list[str]]:
    """``config`` with the network that the set's file names, where ``config`` leaves it open; and
    warnings of what was assumed.

    given: the keys that the user chose.
    Errors: ``RequestError`` where the file names a class, which is not imported for its sake, or
    for a network too large to be made for the sake of a file.
    """
    distilled = load_set(found.set_file) if found.is_own else None
    warnings = []
    if "network" not in config.network.model_fields_set and not config.victims.victim_network:
        own = distilled.recipe.network if distilled else None
        if own is None:
            text = victims_text(config.flat())
            known = "as published where nothing else is said"
            warnings.append(f"the set's file names no network: {text} assumed, {known}")
        else:
            spec = _spec({**own, **config.network.model_dump(exclude_unset=True)}, found)
            config = config.model_copy(update={"network": spec})
    chosen = NetworkSpec.model_fields.keys() & set(given)
    if distilled is not None and not chosen and not is_reference(config.network.network):
        _check_size(config.network, distilled, found)
    return config, warnings


def _spec(own: dict[str, object], found: SetFiles) -> NetworkSpec:
    if is_reference(str(own["network"])):
        raise RequestError(
            f"{found.set_file} was distilled with the network {own['network']}, a class, and is "
            "not trusted to name one: choose a network with --victim-network NAME"
        )
    spec: NetworkSpec = build_options(NetworkSpec, own, str(found.set_file))
    return spec


def _check_size(spec: NetworkSpec, distilled: DistilledSet, found: SetFiles) -> None:
    count = count_parameters(spec, distilled.image_shape, len(distilled.classes))
    if count > _MOST_PARAMETERS:
        raise RequestError(
            f"{found.path} names a network of {count} parameters, more than {_MOST_PARAMETERS}: "
            f"choose one with --set network={spec.network} or --victim-network NAME"
        )
