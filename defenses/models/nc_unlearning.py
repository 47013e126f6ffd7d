"""Unlearning of the trigger that Neural Cleanse has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import nn

from ...distill.types import Batch
from ..base import DefenderView, Repairer
from ..common.by_class import anomaly_index, classes_needed
from ..common.held_out import images_needed, images_wanted
from ..common.trigger_inversion import Patches
from ..common.tuning import QUICK_TUNING, TuningOptions, tune
from .neural_cleanse import NeuralCleanseOptions, cautions, cleanse, flagged_by_chance


@final
class NcUnlearningOptions(TuningOptions):
    """The paper's. Its one epoch on a tenth of the training set, in mini-batches of 32, is 157
    steps for CIFAR-10 (5,000 images)."""

    steps: int = Field(157, ge=1, description="mini-batches of held-out images")
    batch: int = Field(32, ge=2, description="images in a mini-batch")
    share: float = Field(0.2, gt=0, le=1, description="share of the images that are stamped")
    threshold: float = Field(2.0, description="anomaly index from which a class is unlearned")
    passes: int = Field(1000, ge=1, description="Neural Cleanse's passes at most")
    images: int = Field(1000, ge=2, description="images in a pass of Neural Cleanse")
    search_batch: int = Field(32, ge=2, description="images in Neural Cleanse's mini-batch")


@final
class NcUnlearning(Repairer):
    """Unlearning with Neural Cleanse's trigger (Wang et al., "Neural Cleanse: Identifying and
    Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section VI).

    In words: reverse-engineer a patch for each class; fine-tune on clean images of which a fifth
    carry the patch of a flagged class and keep their true labels. Without a flagged class the
    victim stays as it is.

    Needs held-out images, for the search and for tuning, and three classes. It can't do better
    than the detection.

    The authors' code has no unlearning. As in BackdoorBench's (``defense/nc.py``) the same fifth is
    stamped throughout, once for each class that is flagged, and the rate is annealed to 0; its 100
    epochs on 5 % of the training set are among the choices of the tuned budget.

    Deviations: steps are counted, not epochs, since held-out images are few. The paper names no
    optimiser and no rate; they are those that the victim was trained with.
    """

    name = "nc-unlearning"
    Options = NcUnlearningOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {
        **QUICK_TUNING,
        "passes": 60,
        "images": 100,
        "search_batch": 50,
    }
    # The third is BackdoorBench's; the last two unlearn every class whose patch is smaller than the
    # median, flagged or not.
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.01},
        {},
        {"steps": 1000, "lr": 0.01},
        {"steps": 1000},
        {"steps": 1000, "lr": 0.01, "threshold": 0.0},
        {"steps": 1000, "threshold": 0.0},
    )

    def __init__(self, options: NcUnlearningOptions) -> None:
        self.options: NcUnlearningOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2) or classes_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return cautions(
            images_wanted(view, 100, "searched and trained on"),
            flagged_by_chance(view.classes, self.options.threshold),
        )

    def repair(self, view: DefenderView) -> nn.Module:
        options, generator = self.options, view.generator(self.name)
        # The very search of `neural-cleanse` where that is run with the same settings.
        search = NeuralCleanseOptions(
            steps=options.passes, images=options.images, batch=options.search_batch
        )
        patches = cleanse(view, search)
        anomaly = anomaly_index(-patches.sizes)
        flagged = torch.nonzero(anomaly > options.threshold)[:, 0].tolist()
        network = view.trainable_victim()
        if not flagged:
            return network.requires_grad_(False)
        lessons = partly_stamped(view.holdout, patches, flagged, options.share, generator)
        return tune(network, lessons, view.distilled.recipe, options, generator)


def partly_stamped(
    clean: Batch, patches: Patches, numbers: Sequence[int], share: float, generator: torch.Generator
) -> Batch:
    """``clean`` with ``share`` of its images stamped, once with each patch of ``numbers``.

    At least one image is stamped; labels stay true.
    """
    order = torch.randperm(len(clean), generator=generator).to(clean.labels.device)
    count = max(1, round(share * len(clean)))
    chosen, rest = clean.rows(order[:count]), clean.rows(order[count:])
    stamped = [patches.stamp(chosen.images, number) for number in numbers]
    return Batch(
        images=torch.cat([rest.images, *stamped]),
        labels=torch.cat([rest.labels, chosen.labels.repeat(len(numbers))]),
    )
