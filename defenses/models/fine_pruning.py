"""Fine-pruning: take out the channels that clean images leave idle, then fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.networks.registry import Network
from ...distill.training import in_pieces
from ...distill.types import Batch
from ..base import DefenderView, Repairer
from ..common.held_out import images_needed, images_wanted
from ..common.maps import at_the_last_maps
from ..common.tuning import QUICK_TUNING, TuningOptions, descend, tune

_NOTHING = 1e-9


@final
class FinePruningOptions(TuningOptions):
    """The loss is the paper's; tuning is BackdoorBench's (config/defense/fp/cifar10.yaml), the same
    as for plain fine-tuning."""

    loss: float = Field(0.04, ge=0, lt=1, description="accuracy that pruning may cost")


@final
class FinePruning(Repairer):
    """Fine-pruning (Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks
    on Deep Neural Networks", RAID 2018).

    In words: rank the channels of the last convolution by their mean activation on clean images,
    behind the pooling, take out the idlest ones for as long as clean accuracy stays within 4
    points, then fine-tune.

    Needs held-out images and convolutions.

    Deviations: the authors' code prunes numbers that were chosen by hand (48 of 60 channels, 250 of
    256), so that the rule is the paper's, and BackdoorBench allows a tenth of the accuracy; a
    channel is cut off where the next linear layer reads it, as BackdoorBench does, which is the
    same function as an empty filter in the authors' networks without norms or shortcuts. Accuracy
    is measured on the held-out images that rank the channels (BackdoorBench: on the test set). The
    most active channel stays. The authors' code has no fine-tuning for it; BackdoorBench's epochs
    are counted in steps; crops shift by an eighth of an image of any size.
    """

    name = "fine-pruning"
    Options = FinePruningOptions
    needs = "held-out images, convolutions"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"loss": 0.01},
        {},
        {"loss": 0.1},
        {"loss": 0.1, "lr": 0.03},
        {"loss": 0.2, "lr": 0.1},
    )

    def __init__(self, options: FinePruningOptions) -> None:
        self.options: FinePruningOptions = options

    def objection(self, view: DefenderView) -> str | None:
        if at_the_last_maps(view.victim) is None:
            return "needs a network with feature maps"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "pruned and trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        network = view.trainable_victim()
        cut = cut_behind_the_maps(network)
        idle = prune_idle(cut, view.holdout, self.options.loss)

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            descend(network, optimiser, images, labels)
            silence(cut, idle)

        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return tune(network, view.holdout, recipe, self.options, generator, step)


class Cut(NamedTuple):
    """A network cut where a linear layer first reads its last maps.

    front: pixels to what the layer reads, ``(N, channels · pixels)``. tail: that to the logits.
    reader: the layer, the tail's first. channels: how many maps there are.
    """

    front: nn.Sequential
    tail: nn.Sequential
    reader: nn.Linear
    channels: int


def cut_behind_the_maps(network: nn.Module) -> Cut:
    """``network``, which has feature maps, in two parts that share its modules."""
    halves = at_the_last_maps(network)
    assert halves is not None and isinstance(network, Network)
    layers = list(halves.rest)
    place = next(n for n, layer in enumerate(layers) if _readers(layer))
    filters = [part for part in halves.maps.modules() if isinstance(part, nn.Conv2d)]
    return Cut(
        front=nn.Sequential(network.normalise, *halves.maps, *layers[:place]),
        tail=nn.Sequential(*layers[place:]),
        reader=_readers(layers[place])[0],
        channels=filters[-1].out_channels,
    )


def _readers(layer: nn.Module) -> list[nn.Linear]:
    return [part for part in layer.modules() if isinstance(part, nn.Linear)]


def prune_idle(cut: Cut, clean: Batch, loss: float) -> Tensor:
    """Silence, in place, the channels that ``clean`` excites least and that ``loss`` points of
    accuracy on it can spare; the most excited one stays. Which ones, ``bool (channels,)``.

    Channels that are equally excited go in the order of their numbers.
    """
    read = in_pieces(cut.front, clean.images)

    def accuracy() -> float:
        with torch.no_grad():
            return float((cut.tail(read).argmax(dim=1) == clean.labels).double().mean())

    excited = read.view(len(read), cut.channels, -1).mean(dim=(0, 2))
    idle = torch.zeros_like(excited, dtype=torch.bool)
    least = accuracy() - loss - _NOTHING
    for number in excited.argsort(stable=True).tolist()[:-1]:
        kept = cut.reader.weight.detach().clone()
        idle[number] = True
        silence(cut, idle)
        if accuracy() < least:
            with torch.no_grad():
                cut.reader.weight.copy_(kept)
            idle[number] = False
            break
    return idle


@torch.no_grad()
def silence(cut: Cut, idle: Tensor) -> None:
    """Cut the ``idle`` channels, ``bool (channels,)``, off from the layer that reads them."""
    cut.reader.weight.view(len(cut.reader.weight), cut.channels, -1)[:, idle] = 0
