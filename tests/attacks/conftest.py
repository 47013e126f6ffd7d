"""What the tests of attacks share: all that a hook could change by accident."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from distillsec.distill.core.hooks import Moment
from distillsec.distill.types import Batch


@pytest.fixture
def tensors() -> Callable[[object], list[Tensor]]:
    """Every tensor that a hook can reach through one of its arguments."""
    return _tensors


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Batch):
        return [t for t in (value.images, value.labels, value.index) if t is not None]
    if isinstance(value, Moment):
        network = [] if value.network is None else list(value.network.state_dict().values())
        return [*network, *_tensors(value.real), *_tensors(value.synthetic)]
    return []
