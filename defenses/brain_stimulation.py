"""ABS: a neuron that, raised alone, sends every image to one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.training import in_pieces, predict
from ..distill.types import Batch
from .base import DefenderView, DefenseOptions, Inspection, Inspector
from .held_out import known_images, rows_in_their_place
from .maps import blocks
from .trigger_inversion import bounded, stamped, unbounded
from .tuning import follow


@final
class AbsOptions(DefenseOptions):
    """The paper's where it names any, else its code's."""

    per_class: int = Field(5, ge=1, description="seed images of each class")
    levels: int = Field(4, ge=1, description="raised values: the layer's largest times 1, 2, 4 …")
    agreement: float = Field(0.75, gt=0, le=1, description="share of images that must agree")
    neurons: int = Field(2, ge=1, description="neurons of a block tried for a class")
    size: float = Field(0.06, gt=0, lt=1, description="largest patch, share of the image")
    steps: int = Field(1000, ge=1, description="steps of the patch's search")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate")
    others: float = Field(1e-4, ge=0, description="weight of the other channels' excitement")
    weight: float = Field(10.0, ge=0, description="weight of a mask that is too large")
    threshold: float = Field(0.88, gt=0, le=1, description="success that is an alarm")


@final
@dataclass(frozen=True)
class Suspect:
    """A neuron that sends images to a class: which block's output, which channel, by how much."""

    block: int
    channel: int
    label: int
    lead: float


@final
class Abs(Inspector):
    """ABS (Liu, Lee, Tao, Ma, Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by
    Artificial Brain Stimulation", CCS 2019).

    In words: raise one channel after the other, far above what it ever is, and see whether all
    images go to one class. For the neurons that lead furthest search a small patch that excites
    them and little else; a class's anomaly is the share of other classes' images that its best
    patch sends there (REASR), and 0.88 is an alarm.

    Needs five held-out images of each class; with none it works on the received rows. Needs
    convolutions.

    Deviations: neurons are the channels of each block's activated output; the paper's second kind
    of search (for triggers that are transformations of the whole image) is left out; excitement is
    relative to the layer's largest, and a mask costs by what its L1 norm is above the bound (the
    code counts pixels and switches between three weights); the success is measured on all known
    images, not on the seed images alone.
    """

    name = "abs"
    Options = AbsOptions
    needs = "5 held-out images of each class, or else the received rows; convolutions"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 100, "neurons": 1}

    def __init__(self, options: AbsOptions) -> None:
        self.options: AbsOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return None if blocks(view.victim) else "needs a network with feature maps"

    def caution(self, view: DefenderView) -> str | None:
        return rows_in_their_place(view, self.options.per_class * view.classes)

    def inspect(self, view: DefenderView) -> Inspection:
        known, options = known_images(view), self.options
        pieces, normalise = blocks(view.victim), view.victim.normalise
        assert pieces is not None and isinstance(normalise, nn.Module)
        seeds = first_of_each(known, options.per_class)
        suspects = stimulate(pieces, normalise, seeds, options)
        success = torch.zeros(view.classes)
        for number in sorted({suspect.block for suspect in suspects}):
            mine = [suspect for suspect in suspects if suspect.block == number]
            front = nn.Sequential(normalise, *pieces[: number + 1])
            generator = view.generator(self.name, number)
            masks, patterns = excite(front, seeds.images, mine, options, generator)
            for suspect, mask, pattern in zip(mine, masks, patterns, strict=True):
                rate = reached(view.victim, known, suspect.label, mask, pattern)
                success[suspect.label] = max(float(success[suspect.label]), rate)
        highest = float(success.max())
        return Inspection(statistic=highest, alarm=highest >= options.threshold, anomaly=success)


def first_of_each(known: Batch, count: int) -> Batch:
    """The first ``count`` images of each class."""
    rows = [torch.nonzero(known.labels == label)[:count, 0] for label in known.labels.unique()]
    return known.rows(torch.cat(rows))


def stimulate(
    pieces: Sequence[nn.Sequential], normalise: nn.Module, seeds: Batch, options: AbsOptions
) -> list[Suspect]:
    """The neurons that, raised, send most images to one class; for each block and class the
    furthest."""
    found: list[Suspect] = []
    outputs = normalise(seeds.images)
    for number, piece in enumerate(pieces[:-1]):
        outputs = in_pieces(piece, outputs)
        rest = nn.Sequential(*pieces[number + 1 :])
        for channel in range(outputs.shape[1]):
            logits = raised(rest, outputs, channel, options.levels)
            gain = logits[1:].amax(dim=0) - logits[0]
            top = gain.topk(2, dim=1)
            label = int(top.indices[:, 0].mode().values)
            mine = (top.indices[:, 0] == label) & (seeds.labels != label)
            others = int((seeds.labels != label).sum())
            if others and int(mine.sum()) >= options.agreement * others:
                lead = (top.values[:, 0] - top.values[:, 1])[mine].min()
                found.append(Suspect(number, channel, label, float(lead)))
    kept = []
    for place in sorted({(suspect.block, suspect.label) for suspect in found}):
        own = [suspect for suspect in found if (suspect.block, suspect.label) == place]
        kept += sorted(own, key=lambda suspect: -suspect.lead)[: options.neurons]
    return kept


def raised(rest: nn.Module, outputs: Tensor, channel: int, levels: int) -> Tensor:
    """Logits ``(1 + levels, N, classes)`` with one channel at 0, then at 1, 2, 4 … times the
    largest that ``outputs`` (N, C, H, W) hold."""
    values = [0.0] + [float(outputs.max()) * 2**level for level in range(levels)]
    found = []
    for value in values:
        changed = outputs.clone()
        changed[:, channel] = value
        found.append(in_pieces(rest, changed))
    return torch.stack(found)


def excite(
    front: nn.Module,
    images: Tensor,
    suspects: Sequence[Suspect],
    options: AbsOptions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A mask ``(S, 1, H, W)`` and a pattern ``(S, C, H, W)`` for each suspect of one block.

    They raise its channel and no other, the mask growing no larger than ``options.size``.
    """
    shape, count, device = images.shape[1:], len(suspects), images.device
    most = options.size * shape[-1] * shape[-2]
    opacity = torch.rand(count, 1, *shape[1:], generator=generator) * min(1.0, 2 * options.size)
    masks = unbounded(opacity, device)
    patterns = unbounded(torch.rand(count, *shape, generator=generator), device)
    optimiser = torch.optim.Adam([masks, patterns], lr=options.lr)
    picked = torch.tensor([suspect.channel for suspect in suspects], device=device)
    with torch.no_grad():
        scale = front(images).amax()
    for _ in range(options.steps):
        mask, pattern = bounded(masks), bounded(patterns)
        outputs = front(stamped(images, mask[:, None], pattern[:, None]).flatten(0, 1))
        each = outputs.flatten(2).mean(dim=2).view(count, len(images), -1).mean(dim=1) / scale
        own = each.gather(1, picked[:, None])[:, 0]
        beyond = (mask.flatten(1).sum(dim=1) / most - 1).relu()
        loss = options.others * (each.sum(dim=1) - own) - own + options.weight * beyond
        follow(optimiser, loss.sum())
    return bounded(masks).detach(), bounded(patterns).detach()


def reached(network: nn.Module, known: Batch, label: int, mask: Tensor, pattern: Tensor) -> float:
    """Share of the images of other classes that the patch sends to ``label``."""
    others = known.images[known.labels != label]
    sent = predict(network, stamped(others, mask, pattern)) == label
    return float(sent.double().mean()) if len(others) else 0.0
