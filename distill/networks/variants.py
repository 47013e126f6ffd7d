"""Architectures beside a given one: with batch norm, twice as wide, and an MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..types import LARGEST_WIDTH
from .architectures import NETWORKS
from .makers import NetworkMaker
from .registry import NetworkSpec

VariantName = Literal["own", "batch-norm", "wide", "mlp"]


def variant_of(own: NetworkSpec, name: VariantName) -> NetworkSpec:
    """The variant ``name`` of ``own``; ``own`` itself is one of them.

    Where ``own`` has no norm or no width to change, the published ConvNet takes its place.
    """
    if name == "mlp":
        return NetworkSpec(network="mlp")
    if name == "batch-norm":
        return _with(own, "norm").model_copy(update={"norm": "batch"})
    if name == "wide":
        narrow = _with(own, "width")
        width = 2 * int(narrow.width or NETWORKS[narrow.network].published["width"])
        return narrow.model_copy(update={"width": min(width, LARGEST_WIDTH)})
    return own


def maker_of(own: NetworkMaker, name: VariantName) -> NetworkMaker:
    """The maker of networks of a variant of ``own``'s architecture."""
    return replace(own, spec=variant_of(own.spec, name))


def _with(own: NetworkSpec, parameter: str) -> NetworkSpec:
    """``own`` where it takes ``parameter``, else the published ConvNet."""
    entry = NETWORKS.get(own.network)
    return own if entry is not None and parameter in entry.published else NetworkSpec()
