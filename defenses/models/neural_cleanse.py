"""The defense ``neural-cleanse``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
from pydantic import Field

from ..base import DefenderView, Inspection, Inspector
from ..common.by_class import anomaly_index, classes_needed
from ..common.held_out import known_images, known_images_caution
from ..common.trigger_inversion import InversionOptions, Patches, invert_triggers

# Number of classes: share of clean models with an index above 2 if the norms are Gaussian.
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
    """The published settings."""

    threshold: float = Field(2.0, gt=0, description="anomaly index above which a class is flagged")


@final
class NeuralCleanse(Inspector):
    """Neural Cleanse: a target class needs a far smaller patch than the others (Wang et al.,
    "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P
    2019).

    In words: for each class find the smallest patch with which all images are classified as it; a
    target class has a far smaller one than the others. A class's anomaly is how many deviations
    (MAD) the L1 norm of its mask is below the median; above 2 is an alarm.

    Needs a hundred held-out images; without any it uses the received rows. Needs three classes: for
    two the index is always 0.67. With ten classes, a third of clean models are flagged by chance if
    their norms are Gaussian.

    The options are those of the published experiment (``gtsrb_visualize_example.py``), which differ
    from the defaults of its ``visualizer.py`` in ``patience``, ``factor`` and the early stop. A
    class without a successful patch counts with its last mask, as in the code.

    Deviations: all classes are searched at once, on the same mini-batches; few held-out images are
    used several times in a pass. The code stores masks as 8-bit images and takes the norms of
    those; here masks are not rounded. If the MAD is 0, the mean absolute deviation is used.
    """

    name = "neural-cleanse"
    Options = NeuralCleanseOptions
    options: NeuralCleanseOptions
    needs = "100 held-out images (without any: the received rows)"
    in_reference_code = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 60, "images": 100, "batch": 50}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return classes_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return joined(
            known_images_caution(view), flagged_by_chance(view.classes, self.options.threshold)
        )

    def inspect(self, view: DefenderView) -> Inspection:
        anomaly = anomaly_index(-cleanse(view, self.options).sizes)
        highest = float(anomaly.max())
        return Inspection(
            statistic=highest, alarm=highest > self.options.threshold, anomaly=anomaly
        )


def cleanse(view: DefenderView, options: InversionOptions) -> Patches:
    """Neural Cleanse's patches of the victim, searched once for a view and options."""
    return view.once(
        ("neural-cleanse", options),
        lambda: invert_triggers(
            view.victim, known_images(view), view.classes, options, view.generator("neural-cleanse")
        ),
    )


def chance_of_alarm(classes: int) -> float:
    """The share of clean models with an index above 2, if their norms are Gaussian."""
    return float(np.interp(classes, list(_CHANCE), list(_CHANCE.values())))


def flagged_by_chance(classes: int, threshold: float) -> str | None:
    """The caution of a defense that flags outliers among ``classes`` by their MAD index."""
    if threshold != 2:  # the share is known for the published threshold alone
        return None
    share = chance_of_alarm(classes)
    return f"with {classes} classes {share:.0%} of clean models exceed 2 by chance"


def joined(*cautions: str | None) -> str | None:
    """Several cautions as one."""
    return "; ".join(caution for caution in cautions if caution) or None
