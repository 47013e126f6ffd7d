"""The test case: the images on which an attack is measured, for a run and for a trigger file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from .goals import Goal
from .triggers import Trigger


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TestCase:
    """Images on which an attack is measured.

    triggered: ``float32 (N, C, H, W)``. targets: ``int64 (N,)``, the labels the attacker wants.
    eligible: ``bool (N,)``, false where the goal is not about the image (it belongs to its target
    class anyway, or to no source class). published: the images on which the attack's paper measures
    its success rate, where these are others.
    """

    __test__ = False  # not a pytest class

    triggered: Tensor
    targets: Tensor
    eligible: Tensor
    published: TestCase | None = None

    def rows(self, index: Tensor) -> TestCase:
        """The images at positions ``index`` (int64 or bool mask), as a new test case."""
        return TestCase(
            triggered=self.triggered[index],
            targets=self.targets[index],
            eligible=self.eligible[index],
        )

    @property
    def target(self) -> int | None:
        """The one class that all images are sent to; ``None`` where there are several or none."""
        found = self.targets.unique()
        return int(found) if len(found) == 1 else None


def make_test_case(trigger: Trigger, goal: Goal, images: Tensor, labels: Tensor) -> TestCase:
    """The test of ``trigger`` and ``goal`` on ``images`` (pixel space) with true ``labels``."""
    return TestCase(
        triggered=trigger.stamp(images),
        targets=goal.targets(labels),
        eligible=goal.eligible(labels),
    )
