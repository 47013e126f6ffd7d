"""Neural Cleanse: the class that is too easy to reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from pydantic import Field

from .base import DefenderView, Inspection, Inspector
from .by_class import anomaly_index
from .held_out import known_images, rows_in_their_place
from .trigger_inversion import InversionOptions, Patches, invert_triggers


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
    norm of its mask lies below the median, and 2 is an alarm.

    Needs a hundred held-out images; with none it searches on the received rows. With ten classes
    the median absolute deviation rests on few numbers, and alarms on clean models are common.

    Deviations: all classes are searched at once, on whole passes over the images (the code draws
    1,000 at random for each); classes without any patch count with the mask they ended with.
    """

    name = "neural-cleanse"
    Options = NeuralCleanseOptions
    needs = "held-out images (100), or else the received rows"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 60, "images": 100, "batch": 50}

    def __init__(self, options: NeuralCleanseOptions) -> None:
        self.options: NeuralCleanseOptions = options

    def caution(self, view: DefenderView) -> str | None:
        return rows_in_their_place(view)

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
