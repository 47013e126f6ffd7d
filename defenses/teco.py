"""TeCo: a triggered input gives way to some corruptions early and to others never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..distill.training import in_pieces
from .base import DefenderView, DefenseOptions, InputScorer
from .corruptions import CORRUPTIONS, SEVERITIES


@final
class TecoOptions(DefenseOptions):
    """All corruptions there are."""

    corruptions: tuple[str, ...] = Field(
        tuple(CORRUPTIONS), min_length=2, description=f"which: {', '.join(CORRUPTIONS)}"
    )

    @field_validator("corruptions")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in CORRUPTIONS:
                raise ValueError(f"unknown corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
        return value


@final
class Teco(InputScorer):
    """TeCo (Liu, Li, Wang, Hu, Ye, Jin, Wu, Xiao, "Detecting Backdoors During the Inference Stage
    Based on Corruption Robustness Consistency", CVPR 2023).

    In words: corrupt the input in every way there is, in five severities, and note for each the
    first severity at which the prediction changes (6 if none does); clean inputs give way to all
    at about the same, triggered ones early to some and late to others: the score is the deviation
    over the corruptions.

    Needs nothing but the model's labels. The paper names no threshold.

    Deviations: 14 of the 15 corruptions (frost needs photographs), with the severities for small
    images, see ``corruptions.py``. The official code corrupts an image again and again, every
    severity on top of all before it; here each begins with the input, as the paper says.
    """

    name = "teco"
    Options = TecoOptions
    needs = "nothing but the model's labels"
    quick: ClassVar[Mapping[str, Any]] = {
        "corruptions": (
            "gaussian-noise",
            "impulse-noise",
            "defocus-blur",
            "fog",
            "brightness",
            "contrast",
            "pixelate",
        )
    }

    def __init__(self, options: TecoOptions) -> None:
        self.options: TecoOptions = options

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        predicted = view.logits(images).argmax(dim=1)
        clipped = images.clamp(0, 1)
        onsets = []
        for name in self.options.corruptions:
            answers = []
            for severity in range(1, SEVERITIES + 1):
                generator = view.generator(self.name, name, severity)
                corrupted = CORRUPTIONS[name](clipped, severity, generator)
                answers.append(in_pieces(view.victim, corrupted).argmax(dim=1))
            onsets.append(onset(predicted, answers))
        return torch.stack(onsets).double().std(dim=0, correction=0)

    def threshold(self, view: DefenderView) -> None:
        return None


def onset(predicted: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """The first severity, counted from 1, whose answer differs from ``predicted`` (N,): ``(N,)``;
    one more than there are where none does."""
    changed = torch.stack([answer != predicted for answer in answers])
    never = torch.ones_like(changed[:1])
    return torch.cat([changed, never]).int().argmax(dim=0) + 1
