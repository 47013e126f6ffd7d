"""What is to be distilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from torch import nn

from ..engine import PLAIN, Engine
from ..randomness import Streams
from ..types import Batch, Recipe

Start = Literal["noise", "real", "poisoned"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is to be distilled.

    real: the clean training set. classes: how many. ipc: synthetic images per class.
    iterations: outer iterations. init: where the images start (``noise`` N(0, 1) in normalised
    space, ``real`` rows whose label no attack changed and whose pixels no attack stamped,
    ``poisoned`` rows as the distillation sees them). clip_pixels: project onto [0, 1] after every
    step. recipe: how victims will train. network: a fresh network from a seed. streams: the run's
    random streams. scratch: a folder for what a backend keeps on disk; ``None``: it keeps nothing.
    identity: the part of the configuration that trained networks depend on. It decides whether
    networks found in ``scratch`` may be reused. engine: how the networks' passes run.
    """

    real: Batch
    classes: int
    ipc: int
    iterations: int
    init: Start
    clip_pixels: bool
    recipe: Recipe
    network: Callable[[int], nn.Module]
    streams: Streams
    scratch: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine = PLAIN

    def fresh_network(self, *key: int) -> nn.Module:
        """An untrained network in training mode, its weights drawn from ``network`` at ``key``."""
        return self.network(self.streams.integer("network", *key)).train()
