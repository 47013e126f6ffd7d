"""An attack of your own: a faint checkerboard over the whole image.

    cd examples
    distillsec attack --preset digits-dm --attack own_attack:Checkerboard --set opacity=0.3

An attack whose trigger does not change needs one method, ``make_trigger``. ``poison_rate``,
``target``, ``goal`` and the other common options work by themselves.
"""

import torch
from pydantic import Field

from distillsec.ext import BlendTrigger, FixedTriggerAttack, PoisoningOptions, Trigger


class CheckerboardOptions(PoisoningOptions):
    opacity: float = Field(0.2, gt=0, le=1, description="opacity of the checkerboard")
    side: int = Field(2, ge=1, description="side of a square in pixels")


class Checkerboard(FixedTriggerAttack):
    """Black and white squares, blended into a share of the training images."""

    name = "checkerboard"
    Options = CheckerboardOptions

    def make_trigger(self) -> Trigger:
        options = self.options
        assert isinstance(options, CheckerboardOptions)
        channels, height, width = self.data.image_shape
        rows, columns = torch.arange(height) // options.side, torch.arange(width) // options.side
        white = ((rows[:, None] + columns[None, :]) % 2).float()
        pattern = white.expand(channels, height, width).to(self.data.device)
        return BlendTrigger.uniform(pattern, options.opacity)
