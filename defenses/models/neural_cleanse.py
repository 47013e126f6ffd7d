"""Neural Cleanse: the class that is too easy to reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
from pydantic import Field

from ..base import DefenderView, Inspection, Inspector
from ..common.by_class import anomaly_index, classes_needed
from ..common.held_out import known_images, rows_in_their_place
from ..common.trigger_inversion import InversionOptions, Patches, invert_triggers

# Classes, and the share of clean models with a class beyond 2 if the norms are Gaussian.
_CHANCE = {
    3: 0.234,
    4: 0.209,
    5: 0.278,
    6: 0.270,
    7: 0.303,
    8: 0.304,
    9: 0.327,
    10: 0.333,
    12: 0.359,
    15: 0.396,
    20: 0.446,
    30: 0.542,
    43: 0.637,
    50: 0.681,
    100: 0.878,
    200: 0.982,
    1000: 1.0,
}


@final
class NeuralCleanseOptions(InversionOptions):
    """The published ones."""

    threshold: float = Field(2.0, gt=0, description="anomaly index from which a class is flagged")


@final
class NeuralCleanse(Inspector):
    """Neural Cleanse (Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
    Neural Networks", IEEE S&P 2019).

    In words: for each class find the smallest patch that sends every image there; a target class
    has a far smaller one than the others. A class's anomaly is how many deviations (MAD) the L1
    norm of its mask lies below the median, and above 2 is an alarm.

    Needs a hundred held-out images; with none it searches on the received rows. Needs three
    classes: of two, the index is always 0.67. With ten classes a third of clean models are flagged
    by chance if their norms are Gaussian.

    The options are those of the published experiment (``gtsrb_visualize_example.py``), which
    differ from the defaults of its ``visualizer.py`` in ``patience``, ``factor`` and the early
    stop. Classes without any patch count with the mask that they ended with, as in the code.

    Deviations: all classes are searched at once, on the same mini-batches; few held-out images
    come several times in a pass. The code stores masks as 8-bit images and takes the norms of
    those, here they are as found. Where the MAD is 0, the mean absolute deviation stands in.
    """

    name = "neural-cleanse"
    Options = NeuralCleanseOptions
    needs = "held-out images (100), or else the received rows"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 60, "images": 100, "batch": 50}

    def __init__(self, options: NeuralCleanseOptions) -> None:
        self.options: NeuralCleanseOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return classes_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return cautions(
            rows_in_their_place(view), flagged_by_chance(view.classes, self.options.threshold)
        )

    def inspect(self, view: DefenderView) -> Inspection:
        anomaly = anomaly_index(-cleanse(view, self.options).sizes)
        highest = float(anomaly.max())
        return Inspection(
            statistic=highest, alarm=highest > self.options.threshold, anomaly=anomaly
        )


def cleanse(view: DefenderView, options: InversionOptions) -> Patches:
    """Neural Cleanse's patches of the victim, found once for a view and options."""
    return view.once(
        ("neural-cleanse", options),
        lambda: invert_triggers(
            view.victim, known_images(view), view.classes, options, view.generator("neural-cleanse")
        ),
    )


def chance_of_alarm(classes: int) -> float:
    """The share of clean models of which a class lies beyond 2, if their norms are Gaussian."""
    return float(np.interp(classes, list(_CHANCE), list(_CHANCE.values())))


def flagged_by_chance(classes: int, threshold: float) -> str | None:
    """The caution of a defense that flags the outliers among ``classes`` by their MAD index.

    Only at the published threshold of 2, where the share is known.
    """
    if threshold != 2:
        return None
    return f"with {classes} classes {chance_of_alarm(classes):.0%} of clean models pass 2 by chance"


def cautions(*found: str | None) -> str | None:
    """Several cautions as one."""
    return "; ".join(part for part in found if part) or None
