"""Unlearning of the trigger that Neural Cleanse has found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import DefenderView, Repairer
from .by_class import anomaly_index
from .held_out import images_needed, images_wanted
from .neural_cleanse import NeuralCleanseOptions, cleanse
from .tuning import QUICK_TUNING, TuningOptions, descend, tune


@final
class NcUnlearningOptions(TuningOptions):
    """The paper's share of stamped images; tuning as BackdoorBench's."""

    share: float = Field(0.2, gt=0, le=1, description="share of the images that are stamped")
    threshold: float = Field(2.0, description="anomaly index from which a class is unlearned")
    passes: int = Field(1000, ge=1, description="Neural Cleanse's passes at most")
    images: int = Field(1000, ge=2, description="images that Neural Cleanse uses at most")
    search_batch: int = Field(32, ge=2, description="images in Neural Cleanse's mini-batch")


@final
class NcUnlearning(Repairer):
    """Unlearning with Neural Cleanse's trigger (Wang et al., "Neural Cleanse: Identifying and
    Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section VI).

    In words: reverse-engineer a patch for each class; fine-tune on clean images of which a fifth
    carry the patch of a flagged class and keep their true labels. Without a flagged class the
    victim stays as it is.

    Needs held-out images, for the search and for tuning. It can't do better than the detection.

    Deviations: the paper tunes for one epoch on a tenth of the training set; here it is as many
    steps on the held-out images as other tuning defenses take.
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

    def __init__(self, options: NcUnlearningOptions) -> None:
        self.options: NcUnlearningOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "searched and trained on")

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

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            stamped = images.clone()
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for number, rows in zip(
                flagged,
                order[: max(1, round(options.share * len(images)))].tensor_split(len(flagged)),
                strict=True,
            ):
                stamped[rows] = patches.stamp(images[rows], number)
            descend(network, optimiser, stamped, labels)

        return tune(network, view.holdout, view.distilled.recipe, options, generator, step)
