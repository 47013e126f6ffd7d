"""TeCo: a triggered input gives way to some corruptions early and to others never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ...distill.training import in_pieces
from ..base import DefenderView, DefenseOptions, InputScorer
from ..common.corruptions import CORRUPTIONS, SEVERITIES
from .shrinkpad import fingerprints

_GROUPS = 16  # of images that share random numbers


@final
class TecoOptions(DefenseOptions):
    """The official code's, but for frost."""

    corruptions: tuple[str, ...] = Field(
        tuple(CORRUPTIONS), min_length=2, description=f"which: {', '.join(CORRUPTIONS)}"
    )

    cumulative: bool = Field(
        True, description="corrupt on top of all corruptions before, as the official code does"
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
    at about the same, triggered ones early to some and late to others: the score is the standard
    deviation over the corruptions.

    Needs nothing but the model's labels. The paper names no threshold.

    As in the authors' code (CGCL-codes/TeCo, ``teco.py``; BackdoorBench's is the same), which
    corrupts an image again and again: every severity and every corruption on top of all before it,
    rounded down to 8 bits in between. ``cumulative=False`` begins with the input each time, which
    is what the paper describes.

    Deviations: 14 of the 15 corruptions, since frost needs photographs (of the package
    imagecorruptions); for the others see ``corruptions.py``. Images share their random numbers in
    groups, to which an image belongs by its pixels alone.
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
        current = original = in_bytes(images.clamp(0, 1))
        secret = view.seed(self.name, "groups")
        group = torch.tensor([number % _GROUPS for number in fingerprints(images, secret)])
        onsets = []
        for name in self.options.corruptions:
            answers = []
            for severity in range(1, SEVERITIES + 1):
                current = current if self.options.cumulative else original
                current = self._corrupted(view, current, group, name, severity)
                answers.append(in_pieces(view.victim, current).argmax(dim=1))
            onsets.append(onset(predicted, answers))
        return torch.stack(onsets).double().std(dim=0, correction=0)

    def _corrupted(
        self, view: DefenderView, images: Tensor, group: Tensor, name: str, severity: int
    ) -> Tensor:
        """``images`` corrupted, those of a ``group`` (N,) with the same random numbers."""
        found = torch.empty_like(images)
        for number in group.unique().tolist():
            generator = view.generator(self.name, name, severity, number)
            rows = torch.nonzero(group == number)[:, 0].to(images.device)
            found[rows] = CORRUPTIONS[name](images[rows], severity, generator)
        return in_bytes(found)

    def threshold(self, view: DefenderView) -> None:
        return None


def in_bytes(images: Tensor) -> Tensor:
    """``images`` in [0, 1] rounded down to 8 bits; a value that is a byte's stays."""
    return (images * 255 + 1e-3).floor() / 255


def onset(predicted: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """The first severity, counted from 1, whose answer differs from ``predicted`` (N,): ``(N,)``;
    one more than there are where none does."""
    changed = torch.stack([answer != predicted for answer in answers])
    never = torch.ones_like(changed[:1])
    return torch.cat([changed, never]).int().argmax(dim=0) + 1
