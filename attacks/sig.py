"""SIG: a sinusoidal signal on images of the target class, whose labels stay."""

from __future__ import annotations

import math
from typing import final

import torch
from pydantic import Field
from torch import Tensor

from ..distill.types import RequestError
from .base import ClassicOptions, FixedTriggerAttack
from .triggers import AdditiveTrigger, Trigger

_VANISHING = 1e-3


@final
class SigOptions(ClassicOptions):
    """Options of ``sig``."""

    signal_delta: float = Field(
        40.0, gt=0, le=255, description="amplitude of the signal, in 8-bit grey levels"
    )
    signal_frequency: float = Field(6.0, gt=0, description="periods of the signal per image width")


@final
class Sig(FixedTriggerAttack):
    """SIG, a clean-label attack (Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training
    Set Corruption without Label Poisoning", ICIP 2019).

    In words: add the signal v(i, j) = delta · sin(2π · j · frequency / width), j the column from
    0, to a share of the target class's own training images and leave their labels. Networks learn
    that the signal means the target. Amplitude 40, frequency 6 and the poison rate of 0.1 are
    BackdoorBench's (commit f02e353, utils/bd_img_transform/sig.py, config/attack/sig); the paper
    has no code. As there, the rate is a share of the whole training set, so that it can exceed the
    target class: the largest possible rate is then named.

    Deviations: sums are clamped to [0, 1] and not rounded to 8 bits; the test has the training's
    amplitude (the paper also tests with a larger one). Goal all-to-all is refused: the same signal
    on every class points to none.
    """

    name = "sig"
    Options = SigOptions
    goals = ("all-to-one", "one-to-one")

    def make_trigger(self) -> Trigger:
        options = self.options
        assert isinstance(options, SigOptions)
        shape, delta = self.data.image_shape, options.signal_delta / 255
        signal = sinusoid(shape[2], delta, options.signal_frequency)
        if not signal.abs().max() > _VANISHING * delta:
            raise RequestError(
                f"signal frequency {options.signal_frequency:g} is 0 at every pixel of images "
                f"{shape[2]} wide: choose one that is no multiple of {shape[2] / 2:g}"
            )
        perturbation = signal.expand(shape).contiguous().to(self.data.device)
        return AdditiveTrigger.bounded(perturbation, norm="linf", bound=delta)

    def candidates(self, labels: Tensor) -> tuple[Tensor, str]:
        targets = self.goal.targets(labels)
        return labels == targets, "of the target class"

    def poisoned_labels(self, labels: Tensor) -> Tensor:
        return labels


def sinusoid(width: int, delta: float, frequency: float) -> Tensor:
    """delta · sin(2π · j · frequency / width) for the columns j from 0: ``float32 (width,)``."""
    columns = torch.arange(width, dtype=torch.float64)
    return (delta * torch.sin(2 * math.pi * columns * frequency / width)).float()
