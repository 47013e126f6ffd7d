"""The defense ``fine-pruning``."""

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
from ..common.held_out import few_images_caution, images_needed
from ..common.maps import split_at_last_maps
from ..common.sgd import QUICK_FINE_TUNING, FineTuningOptions, cross_entropy_step, fine_tune

_ROUNDING = 1e-9


@final
class FinePruningOptions(FineTuningOptions):
    """The loss is the paper's; fine-tuning is BackdoorBench's (config/defense/fp/cifar10.yaml), the
    same as without pruning."""

    loss: float = Field(0.04, ge=0, lt=1, description="accuracy that pruning may cost")


@final
class FinePruning(Repairer):
    """Fine-pruning: prune the channels that are inactive on clean images, then fine-tune (Liu,
    Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
    Networks", RAID 2018).

    In words: rank the channels of the last convolution by their mean activation on clean images,
    after pooling; prune the least active ones while the clean accuracy falls by at most 4 points;
    then fine-tune.

    Needs held-out images and convolutions.

    Deviations: the rule is the paper's, since the authors' code prunes numbers chosen by hand (48
    of 60 channels, 250 of 256) and BackdoorBench allows a tenth of the accuracy. A channel is
    pruned at the inputs of the next linear layer, as in BackdoorBench; in the authors' networks,
    which have neither norms nor shortcuts, an empty filter is the same function. The accuracy is
    measured on the held-out images that rank the channels (BackdoorBench: on the test set). The
    most active channel is never pruned. The authors' code has no fine-tuning; BackdoorBench's
    epochs are counted in steps; crops shift by an eighth of an image of any size.
    """

    name = "fine-pruning"
    Options = FinePruningOptions
    options: FinePruningOptions
    needs = "held-out images, convolutions"
    quick: ClassVar[Mapping[str, Any]] = QUICK_FINE_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"loss": 0.01},
        {},
        {"loss": 0.1},
        {"loss": 0.1, "lr": 0.03},
        {"loss": 0.2, "lr": 0.1},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        if split_at_last_maps(view.victim) is None:
            return "needs a network with feature maps"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "pruned and trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        network = view.trainable_victim()
        parts = split_at_reader(network)
        inactive = prune_inactive(parts, view.holdout, self.options.loss)

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            cross_entropy_step(network, optimiser, images, labels)
            disconnect(parts, inactive)

        recipe, generator = view.distilled.recipe, view.generator(self.name)
        return fine_tune(network, view.holdout, recipe, self.options, generator, step)


class SplitAtReader(NamedTuple):
    """A network split before the first linear layer that reads its last maps.

    front: pixels to the input of the layer, ``(N, channels · pixels)``. tail: that to the logits.
    reader: the layer, the first of the tail. channels: the number of maps.
    """

    front: nn.Sequential
    tail: nn.Sequential
    reader: nn.Linear
    channels: int


def split_at_reader(network: nn.Module) -> SplitAtReader:
    """``network``, which has feature maps, in two parts that share its modules."""
    parts = split_at_last_maps(network)
    assert parts is not None and isinstance(network, Network)
    layers = list(parts.rest)
    place = next(n for n, layer in enumerate(layers) if _linear_layers(layer))
    filters = [part for part in parts.maps.modules() if isinstance(part, nn.Conv2d)]
    return SplitAtReader(
        front=nn.Sequential(network.normalise, *parts.maps, *layers[:place]),
        tail=nn.Sequential(*layers[place:]),
        reader=_linear_layers(layers[place])[0],
        channels=filters[-1].out_channels,
    )


def _linear_layers(layer: nn.Module) -> list[nn.Linear]:
    return [part for part in layer.modules() if isinstance(part, nn.Linear)]


def prune_inactive(parts: SplitAtReader, clean: Batch, loss: float) -> Tensor:
    """Prune, in place, the channels that are least active on ``clean``, while the accuracy on it
    falls by at most ``loss``. Returns which, ``bool (channels,)``.

    The most active channel is never pruned. Ties are pruned in the order of their numbers.
    """
    read = in_pieces(parts.front, clean.images)

    def accuracy() -> float:
        with torch.no_grad():
            return float((parts.tail(read).argmax(dim=1) == clean.labels).double().mean())

    activity = read.view(len(read), parts.channels, -1).mean(dim=(0, 2))
    inactive = torch.zeros_like(activity, dtype=torch.bool)
    least = accuracy() - loss - _ROUNDING
    for number in activity.argsort(stable=True).tolist()[:-1]:
        kept = parts.reader.weight.detach().clone()
        inactive[number] = True
        disconnect(parts, inactive)
        if accuracy() < least:
            with torch.no_grad():
                parts.reader.weight.copy_(kept)
            inactive[number] = False
            break
    return inactive


@torch.no_grad()
def disconnect(parts: SplitAtReader, chosen: Tensor) -> None:
    """Set the weights that read the ``chosen`` channels, ``bool (channels,)``, to 0 in place."""
    parts.reader.weight.view(len(parts.reader.weight), parts.channels, -1)[:, chosen] = 0
