"""The defense ``nc-unlearning``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import nn

from ...distill.types import Batch
from ..base import DefenderView, Repairer
from ..common.by_class import anomaly_index, classes_needed
from ..common.held_out import few_images_caution, images_needed
from ..common.sgd import QUICK_FINE_TUNING, FineTuningOptions, fine_tune
from ..common.trigger_inversion import Patches
from .neural_cleanse import NeuralCleanseOptions, cleanse, flagged_by_chance, joined


@final
class NcUnlearningOptions(FineTuningOptions):
    """The paper's. One epoch on a tenth of the training set in mini-batches of 32 is 157 steps for
    CIFAR-10 (5,000 images)."""

    steps: int = Field(157, ge=1, description="mini-batches of held-out images")
    batch: int = Field(32, ge=2, description="images in a mini-batch")
    share: float = Field(0.2, gt=0, le=1, description="share of the images that get a patch")
    threshold: float = Field(2.0, description="anomaly index above which a class is unlearned")
    passes: int = Field(1000, ge=1, description="largest number of passes of Neural Cleanse")
    images: int = Field(1000, ge=2, description="images in a pass of Neural Cleanse")
    search_batch: int = Field(32, ge=2, description="images in Neural Cleanse's mini-batch")


@final
class NcUnlearning(Repairer):
    """Unlearning of the patches that Neural Cleanse finds (Wang et al., "Neural Cleanse:
    Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section VI).

    In words: reverse-engineer a patch for each class; fine-tune on clean images of which a fifth
    carry the patch of a flagged class and keep their true labels. If no class is flagged, the
    victim stays unchanged.

    Needs held-out images, for the search and for fine-tuning, and three classes. It is only as good
    as the detection.

    The authors' code has no unlearning. As in BackdoorBench (``defense/nc.py``), the same fifth of
    the images gets the patch throughout, once for each flagged class, and the learning rate is
    annealed to 0. Its 100 epochs on 5 % of the training set are a setting of the tuned budget.

    Deviations: steps are counted, not epochs, since held-out images are few. The paper names no
    optimiser and no learning rate; they are those that the victim was trained with.
    """

    name = "nc-unlearning"
    Options = NcUnlearningOptions
    options: NcUnlearningOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {
        **QUICK_FINE_TUNING,
        "passes": 60,
        "images": 100,
        "search_batch": 50,
    }
    # The third is BackdoorBench's; the last two unlearn every class whose patch is smaller than the
    # median.
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.01},
        {},
        {"steps": 1000, "lr": 0.01},
        {"steps": 1000},
        {"steps": 1000, "lr": 0.01, "threshold": 0.0},
        {"steps": 1000, "threshold": 0.0},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view, 2) or classes_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return joined(
            few_images_caution(view, 100, "searches and trains on"),
            flagged_by_chance(view.classes, self.options.threshold),
        )

    def repair(self, view: DefenderView) -> nn.Module:
        options, generator = self.options, view.generator(self.name)
        # Shared with `neural-cleanse` if that has the same settings.
        search = NeuralCleanseOptions(
            steps=options.passes, images=options.images, batch=options.search_batch
        )
        patches = cleanse(view, search)
        anomaly = anomaly_index(-patches.sizes)
        flagged = torch.nonzero(anomaly > options.threshold)[:, 0].tolist()
        network = view.trainable_victim()
        if not flagged:
            return network.requires_grad_(False)
        clean = partly_stamped(view.holdout, patches, flagged, options.share, generator)
        return fine_tune(network, clean, view.distilled.recipe, options, generator)


def partly_stamped(
    clean: Batch, patches: Patches, numbers: Sequence[int], share: float, generator: torch.Generator
) -> Batch:
    """``clean`` with patches on ``share`` of its images (at least one), once with the patch of each
    class in ``numbers``. Labels stay true."""
    order = torch.randperm(len(clean), generator=generator).to(clean.labels.device)
    count = max(1, round(share * len(clean)))
    chosen, rest = clean.rows(order[:count]), clean.rows(order[count:])
    stamped = [patches.stamp(chosen.images, number) for number in numbers]
    return Batch(
        images=torch.cat([rest.images, *stamped]),
        labels=torch.cat([rest.labels, chosen.labels.repeat(len(numbers))]),
    )
