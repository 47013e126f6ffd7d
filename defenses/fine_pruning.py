"""Fine-pruning: take out the channels that clean images leave idle, then fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import DefenderView, Repairer
from .channels import Channels, convolutions, prune_in_order, silence
from .held_out import images_needed, images_wanted
from .maps import at_the_last_maps, feature_map
from .tuning import QUICK_TUNING, TuningOptions, descend, tune


@final
class FinePruningOptions(TuningOptions):
    """Fine-tuning's are BackdoorBench's; the loss is the paper's."""

    loss: float = Field(0.04, ge=0, lt=1, description="accuracy that pruning may cost")


@final
class FinePruning(Repairer):
    """Fine-pruning (Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks
    on Deep Neural Networks", RAID 2018).

    In words: rank the channels of the last convolution by their mean activation on clean images,
    take out the idlest ones for as long as clean accuracy stays within 4 points, then fine-tune.

    Needs held-out images and convolutions.

    Deviations: tuning is counted in steps, at the set's own learning rate; accuracy while pruning
    is measured on the held-out images that rank the channels; an idle channel's weight and bias go
    to zero in the norm behind it.
    """

    name = "fine-pruning"
    Options = FinePruningOptions
    needs = "held-out images, convolutions"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING

    def __init__(self, options: FinePruningOptions) -> None:
        self.options: FinePruningOptions = options

    def objection(self, view: DefenderView) -> str | None:
        if at_the_last_maps(view.victim) is None:
            return "needs a network with feature maps"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "pruned and trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        layer = convolutions(view.victim)[-1]
        network = view.trainable_victim()
        prune_idle(view, network, layer, self.options.loss)
        module: Any = network.get_submodule(layer.layer)
        idle = module.weight.detach().view(layer.count, -1).abs().sum(dim=1) == 0

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            descend(network, optimiser, images, labels)
            silence(network, {layer.layer: idle}, biases=True)

        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return tune(network, view.holdout, recipe, self.options, generator, step)


def prune_idle(view: DefenderView, network: nn.Module, layer: Channels, loss: float) -> None:
    """Silence, in place, the channels that held-out images excite least and that ``loss`` points
    of accuracy on them can spare; the most excited one stays."""
    excited = feature_map(view.victim, view.holdout.images).mean(dim=(0, 2, 3))
    order = [(layer.layer, number) for number in excited.argsort().tolist()[:-1]]
    prune_in_order(network, order, view.holdout, loss, biases=True)
