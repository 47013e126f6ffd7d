"""Small victims that tell the readings of a set apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch

from ...distill.networks.makers import NetworkMaker
from ...distill.networks.registry import NetworkSpec
from ...distill.preprocessing import Preprocessing
from ...distill.training import accuracy, fit
from ...distill.types import Batch, Recipe, RunError
from .setup import Setup

HELD_OUT: Final = 500
"""Clean images that readings are tested on."""

VICTIMS: Final = 2
_VISITS: Final = 12_000
_FEWEST_EPOCHS, _MOST_EPOCHS = 20, 60
_ROWS: Final = 2000
_SMALL: Final = 8


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SmallVictims:
    """Trains small networks on a set for a short time, and tests them on ``clean`` images.

    They are ConvNets of width 32 with batch norm. Batch norm takes its statistics from the set: if
    the set is in another space than the clean images, it costs much accuracy. Networks with
    instance norm take away any shift and scale of an image, and hardly notice.
    """

    setup: Setup
    clean: Batch

    def accuracy(self, batch: Batch, preprocessing: Preprocessing) -> float:
        """The victims' mean accuracy, 0 to 1, if networks do ``preprocessing`` with pixels first.

        batch: the set, on the run's device; of more than 2,000 rows a random part is used. The same
        weights and orders are drawn for every call.
        """
        rows = self._rows(len(batch))
        epochs = max(_FEWEST_EPOCHS, min(_MOST_EPOCHS, _VISITS // len(rows)))
        recipe = Recipe(preprocessing=preprocessing, epochs=epochs)
        streams, found = self.setup.streams, 0.0
        for number in range(VICTIMS):
            victim = self._network(preprocessing)(streams.integer("victim", "reading", number, 0))
            generator = streams.generator("victim", "reading", number, 1)
            try:
                found += accuracy(fit(victim, batch.rows(rows), recipe, generator), self.clean)
            except RunError:  # it diverged: the values are on quite another scale
                continue
        return found / VICTIMS

    def _rows(self, count: int) -> torch.Tensor:
        generator = self.setup.streams.generator("victim", "rows of a reading")
        rows = torch.randperm(count, generator=generator)[:_ROWS].sort().values
        return rows.to(self.setup.config.run.device)

    def _network(self, preprocessing: Preprocessing) -> NetworkMaker:
        shape = self.setup.data.image_shape
        depth = 2 if min(shape[1:]) >= _SMALL else 1
        return NetworkMaker(
            spec=NetworkSpec(network="convnet", norm="batch", width=32, depth=depth),
            image_shape=shape,
            classes=len(self.setup.data.classes),
            preprocessing=preprocessing,
            device=self.setup.config.run.device,
        )


def held_out_images(setup: Setup) -> Batch:
    """Up to 500 training images of the data: the test images measure victims and choose nothing."""
    train = setup.data.train
    generator = setup.streams.generator("victim", "clean images of a reading")
    rows = torch.randperm(len(train), generator=generator)[:HELD_OUT].sort().values
    return train.rows(rows.to(train.labels.device))
