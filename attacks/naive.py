"""NaiveAttack: a fixed patch in the raw data, then distillation as usual."""

from __future__ import annotations

from typing import final

import torch

from .base import FixedTriggerAttack, PatchOptions, PoisoningOptions
from .trigger_image import TriggerImageOptions
from .triggers import PatchTrigger, Trigger


@final
class NaiveOptions(TriggerImageOptions, PatchOptions, PoisoningOptions):
    """Options of ``naive``."""


@final
class Naive(FixedTriggerAttack):
    """NaiveAttack (Liu et al., "Backdoor Attacks Against Dataset Distillation", NDSS 2023).

    In words: stamp a white square on a share of the training rows, relabel them to the target
    class, let anybody distil. The data owner takes no part in the distillation; only
    ``target_share``, which is ours, needs a distiller.

    On a set that is not distilled (backend ``whole``) it is BadNets with a white square;
    ``badnets`` has the published patterns. ``trigger_image`` puts an image in the square's place.

    Deviations: poisoned rows are drawn from the rows that the goal is about; the square is white in
    pixel space on every data set.
    """

    name = "naive"
    Options = NaiveOptions

    def make_trigger(self) -> Trigger:
        options = self.options
        assert isinstance(options, NaiveOptions)
        mask = options.mask(self.data)
        pattern = torch.ones(self.data.image_shape, device=self.data.device) * mask
        side = options.trigger_size
        image = options.image((len(pattern), side, side))
        if image is not None:
            pattern[:, mask[0].bool()] = image.flatten(1).to(pattern)
        return PatchTrigger(pattern=pattern, mask=mask, range=options.trigger_range)
