"""The defense ``teco``."""

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
        tuple(CORRUPTIONS), min_length=2, description=f"some of: {', '.join(CORRUPTIONS)}"
    )
    cumulative: bool = Field(
        True, description="apply each corruption on top of those before, as the official code does"
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
    """TeCo: some corruptions change the prediction for a triggered input early, others late (Liu,
    Li, Wang, Hu, Ye, Jin, Wu, Xiao, "Detecting Backdoors During the Inference Stage Based on
    Corruption Robustness Consistency", CVPR 2023).

    In words: apply common corruptions to the input in five severities, and record for each the
    first severity at which the prediction changes (6 if none does). For clean inputs these are
    similar, for triggered ones some are early and others late. The score is the standard deviation
    over the corruptions.

    Needs only the model's labels. The paper names no threshold.

    As in the authors' code (CGCL-codes/TeCo, ``teco.py``; BackdoorBench's is the same), each
    severity of each corruption is applied on top of all before it, and rounded down to 8 bits in
    between. ``cumulative=False`` starts from the input each time, as the paper describes it.

    Deviations: 14 of the 15 corruptions, since frost needs photographs (of the package
    imagecorruptions); for the others see ``corruptions.py``. Images share their random numbers in
    groups; the group of an image depends on its pixels alone.
    """

    name = "teco"
    Options = TecoOptions
    options: TecoOptions
    needs = "only the model's labels"
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
        """``images`` corrupted; those in the same ``group`` (N,) share random numbers."""
        found = torch.empty_like(images)
        for number in group.unique().tolist():
            generator = view.generator(self.name, name, severity, number)
            rows = torch.nonzero(group == number)[:, 0].to(images.device)
            found[rows] = CORRUPTIONS[name](images[rows], severity, generator)
        return in_bytes(found)

    def threshold(self, view: DefenderView) -> None:
        return None


def in_bytes(images: Tensor) -> Tensor:
    """``images`` in [0, 1] rounded down to 8 bits; values of 8 bits stay unchanged."""
    return (images * 255 + 1e-3).floor() / 255


def onset(predicted: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """The first severity, counted from 1, whose answer differs from ``predicted`` (N,): ``(N,)``;
    one more than the number of severities if none does."""
    changed = torch.stack([answer != predicted for answer in answers])
    never = torch.ones_like(changed[:1])
    return torch.cat([changed, never]).int().argmax(dim=0) + 1
