"""ABS: a neuron that, raised alone, sends every image to one class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.networks.layers import Normalise
from ...distill.training import in_pieces, predict
from ...distill.types import Batch
from ..base import DefenderView, DefenseOptions, Inspection, Inspector
from ..common.held_out import known_images, rows_in_their_place
from ..common.maps import blocks
from ..common.trigger_inversion import bounded, stamped
from ..common.tuning import follow

_COUNTS = 0.01  # a pixel whose mask is above this is part of the patch
_START = 2.0  # the mask begins at ± this before its tanh
_PER_BLOCK = 3  # of the leading half of the candidates, from one block


@final
class AbsOptions(DefenseOptions):
    """The official code's (``config.json`` and ``abs.py``; the alarm of its TrojAI version)."""

    per_class: int = Field(5, ge=1, description="seed images of each class")
    levels: int = Field(5, ge=2, description="values that a neuron is set to, the first is 0")
    reach: float = Field(
        8.0, gt=0, description="their range, times the layer's largest value (its end left out)"
    )
    missing: int = Field(2, ge=0, description="seed images that may go to another class")
    candidates: int = Field(21, ge=2, description="neurons that a patch is searched for")
    searched: float = Field(1 / 3, gt=0, le=1, description="share of the seed images for searching")
    size: float = Field(
        0.0625, gt=0, lt=1, description="largest patch, share of the image (64 of 1,024 pixels)"
    )
    steps: int = Field(1000, ge=1, description="steps of the patch's search")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate, in normalised pixels")
    others: float = Field(1e-4, ge=0, description="weight of the other neurons' values")
    weight: float = Field(500.0, ge=0, description="weight of a mask that is too large")
    shortlist: float = Field(0.6, ge=0, le=1, description="success while searching that counts")
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

    In words: set one channel after the other to values far above what it ever is, and see whether
    all images go to one class. For the neurons that lead furthest search a small patch that raises
    them and little else; a class's anomaly is the share of the seed images that its best patch
    sends there (REASR), and 0.88 is an alarm.

    Needs five held-out images of each class; with none it works on the received rows. Needs
    convolutions.

    As in the official code, the seed images of the class itself count in the REASR: with two
    classes half of them are there without any patch.

    Deviations: neurons are the channels of each block's output (the official code also looks at
    hidden linear layers); in a residual network each block's; the search for triggers that are
    transformations of the whole image (the paper's second kind) is left out; pixels are not
    rounded to 256 values before the REASR is measured.
    """

    name = "abs"
    Options = AbsOptions
    needs = "5 held-out images of each class, or else the received rows; convolutions"
    quick: ClassVar[Mapping[str, Any]] = {"steps": 300}

    def __init__(self, options: AbsOptions) -> None:
        self.options: AbsOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return None if blocks(view.victim) else "needs a network with feature maps"

    def caution(self, view: DefenderView) -> str | None:
        return rows_in_their_place(view, self.options.per_class * view.classes)

    def inspect(self, view: DefenderView) -> Inspection:
        options, network = self.options, view.trainable_victim().requires_grad_(False)
        pieces, normalise = blocks(network), network.normalise
        assert pieces is not None and isinstance(normalise, Normalise)
        seeds = in_turn(known_images(view), options.per_class)
        few = seeds.images[: max(1, round(options.searched * len(seeds)))]
        suspects = leading(stimulate(pieces, normalise, seeds, options), options.candidates)
        success = torch.zeros(view.classes)
        for number in sorted({suspect.block for suspect in suspects}):
            mine = [suspect for suspect in suspects if suspect.block == number]
            generator = view.generator(self.name, number)
            masks, patterns = excite(pieces[: number + 1], normalise, few, mine, options, generator)
            for suspect, mask, pattern in zip(mine, masks, patterns, strict=True):
                if reached(network, few, suspect.label, mask, pattern) >= options.shortlist:
                    rate = reached(network, seeds.images, suspect.label, mask, pattern)
                    success[suspect.label] = max(float(success[suspect.label]), rate)
        highest = float(success.max())
        return Inspection(statistic=highest, alarm=highest >= options.threshold, anomaly=success)


def in_turn(known: Batch, count: int) -> Batch:
    """The first ``count`` images of each class: one of each, then the next of each, and so on."""
    rows = [torch.nonzero(known.labels == label)[:count, 0] for label in known.labels.unique()]
    turns = [row[turn : turn + 1] for turn in range(count) for row in rows]
    return known.rows(torch.cat(turns))


def stimulate(
    pieces: Sequence[nn.Sequential], normalise: nn.Module, seeds: Batch, options: AbsOptions
) -> list[Suspect]:
    """The neurons that, raised, send all seed images but ``options.missing`` to one class."""
    found: list[Suspect] = []
    outputs = normalise(seeds.images)
    for number, piece in enumerate(pieces[:-1]):
        outputs = in_pieces(piece, outputs)
        rest = nn.Sequential(*pieces[number + 1 :])
        for channel in range(outputs.shape[1]):
            label, votes, lead = judged(raised(rest, outputs, channel, options), seeds.labels)
            if votes >= len(seeds) - options.missing:
                found.append(Suspect(number, channel, label, lead))
    return found


def judged(logits: Tensor, labels: Tensor) -> tuple[int, int, float]:
    """The class that most images gain most for, how many do, and its least lead.

    logits: ``(levels, N, classes)``, the first with the neuron at 0. An image's gain is the
    largest logit at the other levels minus that at 0; the lead is over the class that gains
    second most, and only images of other ``labels`` (N,) count in it.
    """
    gain = logits[1:].amax(dim=0) - logits[0]
    top = gain.topk(2, dim=1)
    label = int(top.indices[:, 0].mode().values)
    mine = top.indices[:, 0] == label
    leads = (top.values[:, 0] - top.values[:, 1])[mine & (labels != label)]
    if not len(leads):
        return label, 0, 0.0
    return label, int(mine.sum()), float(leads.min())


def raised(rest: nn.Module, outputs: Tensor, channel: int, options: AbsOptions) -> Tensor:
    """Logits ``(levels, N, classes)`` with one channel at 0 and further values in equal steps, up
    to ``options.reach`` times the largest that ``outputs`` (N, C, H, W) hold."""
    step = options.reach * float(outputs.max()) / options.levels
    found = []
    for level in range(options.levels):
        changed = outputs.clone()
        changed[:, channel] = level * step
        found.append(in_pieces(rest, changed))
    return torch.stack(found)


def leading(suspects: Sequence[Suspect], candidates: int) -> list[Suspect]:
    """The ``candidates`` that lead furthest; of the first half at most three from a block."""
    ranked = sorted(suspects, key=lambda suspect: -suspect.lead)
    chosen: list[Suspect] = []
    seen: Counter[int] = Counter()
    for suspect in ranked:
        seen[suspect.block] += 1
        if seen[suspect.block] <= _PER_BLOCK and len(chosen) <= candidates // 2:
            chosen.append(suspect)
    rest = [suspect for suspect in ranked if suspect not in chosen]
    return [*chosen, *rest[: candidates - len(chosen)]]


def excite(
    pieces: Sequence[nn.Sequential],
    normalise: Normalise,
    images: Tensor,
    suspects: Sequence[Suspect],
    options: AbsOptions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A mask ``(S, 1, H, W)`` and a pattern ``(S, C, H, W)`` for each suspect of one block.

    They raise its channel and no other, before and behind the block's activation; the mask is to
    have ``options.size`` of the image's pixels at most. It begins as a square in the corner, the
    pattern as noise in normalised space, where it is searched. The suspects don't influence each
    other.
    """
    front, count = nn.Sequential(normalise, *pieces), len(suspects)
    mean, std = normalise.mean, normalise.std
    noise = torch.randn(count, *images.shape[1:], generator=generator).to(images.device)
    patterns = noise.requires_grad_()
    masks = corner(images.shape[-2:], options.size).to(images.device).repeat(count, 1, 1, 1)
    masks = masks.requires_grad_()
    optimiser = torch.optim.Adam([masks, patterns], lr=options.lr)
    picked = torch.tensor([suspect.channel for suspect in suspects], device=images.device)
    with inputs_of(last_activation(pieces[-1])) as entered:
        for _ in range(options.steps):
            mask = bounded(masks)
            shown = stamped(images, mask[:, None], (patterns * std + mean)[:, None])
            left = front(shown.flatten(0, 1))
            loss = excess(mask, options.size, options.weight)
            for values in (entered.pop(), left):
                sums = values.flatten(2).sum(dim=2).view(count, len(images), -1).sum(dim=1)
                own = sums.gather(1, picked[:, None])[:, 0]
                loss = loss - own + options.others * (sums.sum(dim=1) - own)
            follow(optimiser, loss.sum())
            with torch.no_grad():
                patterns.copy_(patterns.clamp(-mean / std, (1 - mean) / std))
    return bounded(masks).detach(), (patterns * std + mean).detach()


def corner(shape: tuple[int, int] | torch.Size, size: float) -> Tensor:
    """The mask's start ``(1, 1, H, W)``, before its tanh: a square in the upper left corner."""
    side = int((size * shape[0] * shape[1]) ** 0.5)
    start = torch.full((1, 1, *shape), -_START)
    start[..., :side, :side] = _START
    return start


def excess(masks: Tensor, size: float, weight: float) -> Tensor:
    """What masks ``(S, 1, H, W)`` cost, ``(S,)``: ``weight`` times their sum where more pixels
    than ``size`` of the image are part of them, twice that where a square of those pixels with a
    pixel more on each side is exceeded, else nothing."""
    flat = masks.flatten(1)
    most = size * flat.shape[1]
    pixels = (flat > _COUNTS).sum(dim=1)
    times = (pixels > most).float() + (pixels > int((most**0.5 + 2) ** 2)).float()
    return weight * times * flat.sum(dim=1)


def last_activation(piece: nn.Module) -> nn.Module:
    """The module at whose end a block's activation is: the last that is no container."""
    leaves = [
        part
        for part in piece.modules()
        if not list(part.children()) and not isinstance(part, nn.Identity | nn.Sequential)
    ]
    return leaves[-1]


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each call of ``module`` appends what enters it."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def reached(network: nn.Module, images: Tensor, label: int, mask: Tensor, pattern: Tensor) -> float:
    """Share of ``images`` that the patch sends to ``label``."""
    sent = predict(network, stamped(images, mask, pattern)) == label
    return float(sent.double().mean())
