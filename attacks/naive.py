"""NaiveAttack: a fixed patch in the raw data, then distillation as usual."""

from __future__ import annotations

from typing import final

import torch

from ..distill.core.hooks import Moment
from ..distill.types import Batch
from .base import AttackOptions, CommonOptions, PatchAttack, Scenery, ThreatModel
from .triggers import PatchTrigger


@final
class Naive(PatchAttack):
    """NaiveAttack (Liu et al., "Backdoor Attacks Against Dataset Distillation", NDSS 2023).

    In words: stamp a white square on a share of the training rows, relabel them to the target
    class, let anybody distil. The data owner takes no part in the distillation; only
    ``target_share``, which is ours, needs a distiller.

    On a set that is not distilled (backend ``whole``) it is BadNets (Gu, Dolan-Gavitt, Garg, 2017).

    Deviations: poisoned rows are drawn from the non-target rows; the square is white in pixel
    space on every data set.
    """

    name = "naive"
    Options = AttackOptions

    def __init__(self, options: CommonOptions, scenery: Scenery) -> None:
        super().__init__(options, scenery)
        assert isinstance(options, AttackOptions)
        self._trigger = PatchTrigger(
            pattern=torch.ones(scenery.image_shape, device=scenery.device) * self._mask,
            mask=self._mask,
            range=options.trigger_range,
        )

    @property
    def threat_model(self) -> ThreatModel:
        return "data owner" if self.options.target_share is None else "distiller"

    @property
    def trigger(self) -> PatchTrigger:
        return self._trigger

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        return self.hand_in(moment, real)
