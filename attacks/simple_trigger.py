"""Simple-trigger: a white image over the whole image."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field

from .base import ClassicOptions, FixedTriggerAttack
from .triggers import BlendTrigger, Trigger


class SimpleTriggerOptions(ClassicOptions):
    """Options of ``simple-trigger``."""

    opacity: float = Field(
        0.3, gt=0, le=1, description="opacity of the whole-image trigger, when it is tested too"
    )


@final
class SimpleTrigger(FixedTriggerAttack):
    """Simple-trigger (Chung, Chou, Yu, Chen, Kuo, Ho, "Rethinking Backdoor Attacks on Dataset
    Distillation: A Kernel Method Perspective", ICLR 2024).

    In words: blend white into whole images of a share of the training rows, relabelled by the goal.
    By the paper's bound a larger trigger generalises better. Opacity 0.3 and the poison rate of 0.1
    are the official code's (Mick048/KIP-based-backdoor-attack, commit 193d772, KIP_BDAttack.ipynb).

    Deviations: poisoned rows are drawn from the rows that the goal is about and replace their clean
    versions, where the official code draws from all and adds them; the distillation is whichever
    backend is chosen, the paper's is kernel inducing points.
    """

    name = "simple-trigger"
    Options = SimpleTriggerOptions

    def make_trigger(self) -> Trigger:
        assert isinstance(self.options, SimpleTriggerOptions)
        white = torch.ones(self.data.image_shape, device=self.data.device)
        return BlendTrigger.uniform(white, self.options.opacity)
