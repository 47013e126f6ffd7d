"""Doorping: the trigger is optimised again during the distillation."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from .base import AttackOptions, DataInfo, PatchOptions
from .moving import MovingTriggerAttack, MovingTriggerOptions
from .search import SearchSpace
from .triggers import PatchTrigger


class DoorpingOptions(PatchOptions, MovingTriggerOptions):
    """Options of ``doorping``; the search's are the reference code's where it has them."""


@final
class Doorping(MovingTriggerAttack):
    """Doorping (Liu et al., "Backdoor Attacks Against Dataset Distillation", NDSS 2023).

    In words: poisoned rows carry a patch that starts as random pixels; whenever the distilling
    network has moved, the patch is optimised against it (``objective``), and from the next draw
    on the poisoned rows carry the new one.

    Deviations from the reference code: updates happen at every IPC (there, never at IPC 1);
    clean pixels are kept and every drawn batch is stamped afresh; values stay in [0, 1] unless
    ``trigger_range`` is ``unbounded``; an update that changed nothing is counted; poisoned rows
    are drawn from the rows that the goal is about; ``moves_with`` is ours, for backends that train
    experts first (benchmarks/results/mtt-doorping). ``neuron-reference`` keeps the reference's
    update itself.
    """

    name = "doorping"
    Options = DoorpingOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        assert isinstance(options, DoorpingOptions)
        self._mask = options.mask(data)
        self._range = options.trigger_range

    @property
    def trigger(self) -> PatchTrigger:
        """The patch as it is now."""
        return self.trigger_of(self._pattern)

    def first_pattern(self, rng: torch.Generator) -> Tensor:
        """Uniform 8-bit pixels from 1 to 255 under the mask, as the reference starts."""
        values = torch.randint(1, 256, self.data.image_shape, generator=rng) / 255
        return values.to(self.data.device) * self._mask

    def trigger_of(self, pattern: Tensor) -> PatchTrigger:
        return PatchTrigger(pattern=pattern, mask=self._mask, range=self._range)

    def search_space(self) -> SearchSpace:
        """The pixels under the mask; the reference's canvas is black."""
        return SearchSpace(
            mask=self._mask,
            shift=self._mean,
            scale=self._std,
            project=_onto_pixels if self._range == "pixel" else None,
            canvas=torch.zeros_like(self._pattern),
        )


def _onto_pixels(pattern: Tensor) -> Tensor:
    return pattern.clamp(0, 1)
