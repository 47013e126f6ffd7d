"""The defense ``abs``."""

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
from ..common.held_out import known_images, known_images_caution
from ..common.maps import blocks
from ..common.sgd import backward_step
from ..common.trigger_inversion import bounded, stamped

_IN_PATCH = 0.01  # a pixel with a larger mask is part of the patch
_START = 2.0  # absolute value of the mask before its tanh, at the start
_PER_BLOCK = 3  # largest number from one block in the first half of the candidates


@final
class AbsOptions(DefenseOptions):
    """The official code's (``config.json`` and ``abs.py``); the alarm is its TrojAI version's."""

    per_class: int = Field(5, ge=1, description="seed images of each class")
    levels: int = Field(5, ge=2, description="values that a neuron is set to, the first is 0")
    reach: float = Field(
        8.0, gt=0, description="end of their range (not included) / the layer's largest value"
    )
    missing: int = Field(2, ge=0, description="seed images that may get another class")
    candidates: int = Field(21, ge=2, description="neurons for which a patch is searched")
    searched: float = Field(1 / 3, gt=0, le=1, description="share of the seed images for searching")
    size: float = Field(
        0.0625, gt=0, lt=1, description="largest patch, share of the image (64 of 1,024 pixels)"
    )
    steps: int = Field(1000, ge=1, description="steps of the search for a patch")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate, in normalised pixels")
    others: float = Field(1e-4, ge=0, description="weight of the other neurons' values")
    weight: float = Field(500.0, ge=0, description="weight of a mask that is too large")
    shortlist: float = Field(
        0.6, ge=0, le=1, description="success in the search from which a patch is measured"
    )
    threshold: float = Field(0.88, gt=0, le=1, description="success that is an alarm")


@final
@dataclass(frozen=True)
class CandidateNeuron:
    """A neuron (``block``, ``channel``) whose high values lead to the class ``label``; its logit
    gains more than the next one by ``lead``."""

    block: int
    channel: int
    label: int
    lead: float


@final
class Abs(Inspector):
    """ABS: a single neuron whose high activation changes all predictions to one class (Liu, Lee,
    Tao, Ma, Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by Artificial Brain
    Stimulation", CCS 2019).

    In words: set one channel after the other to values far above its usual ones, and check whether
    all images are then classified as one class. For the neurons with the largest effect, search a
    small patch that raises their value and changes the others little. A class's anomaly is the
    share of the seed images that its best patch changes to it (REASR); 0.88 is an alarm.

    Needs five held-out images of each class; without any it uses the received rows. Needs
    convolutions.

    As in the official code, the seed images of the class itself count in the REASR: with two
    classes it is at least a half.

    Deviations: neurons are the channels of each block's output, also in residual networks (the
    official code includes hidden linear layers). The search for triggers that transform the whole
    image (the paper's second kind) is left out. Pixels are not rounded to 256 values before the
    REASR is measured.
    """

    name = "abs"
    Options = AbsOptions
    options: AbsOptions
    needs = "5 held-out images of each class (without any: the received rows), convolutions"
    in_reference_code = True
    quick: ClassVar[Mapping[str, Any]] = {"steps": 300}

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return None if blocks(view.victim) else "needs a network with feature maps"

    def caution(self, view: DefenderView) -> str | None:
        return known_images_caution(view, self.options.per_class * view.classes)

    def inspect(self, view: DefenderView) -> Inspection:
        options, network = self.options, view.trainable_victim().requires_grad_(False)
        parts, normalise = blocks(network), network.normalise
        assert parts is not None and isinstance(normalise, Normalise)
        seeds = in_turn(known_images(view), options.per_class)
        few = seeds.images[: max(1, round(options.searched * len(seeds)))]
        neurons = strongest(stimulate(parts, normalise, seeds, options), options.candidates)
        success = torch.zeros(view.classes)
        for number in sorted({neuron.block for neuron in neurons}):
            own = [neuron for neuron in neurons if neuron.block == number]
            generator = view.generator(self.name, number)
            masks, patterns = excite(parts[: number + 1], normalise, few, own, options, generator)
            for neuron, mask, pattern in zip(own, masks, patterns, strict=True):
                if reasr(network, few, neuron.label, mask, pattern) >= options.shortlist:
                    rate = reasr(network, seeds.images, neuron.label, mask, pattern)
                    success[neuron.label] = max(float(success[neuron.label]), rate)
        highest = float(success.max())
        return Inspection(statistic=highest, alarm=highest >= options.threshold, anomaly=success)


def in_turn(known: Batch, count: int) -> Batch:
    """The first ``count`` images of each class: one of each, then the next of each, and so on."""
    rows = [torch.nonzero(known.labels == label)[:count, 0] for label in known.labels.unique()]
    turns = [row[turn : turn + 1] for turn in range(count) for row in rows]
    return known.rows(torch.cat(turns))


def stimulate(
    parts: Sequence[nn.Sequential], normalise: nn.Module, seeds: Batch, options: AbsOptions
) -> list[CandidateNeuron]:
    """The neurons whose high values lead all seed images but ``options.missing`` to one class."""
    found: list[CandidateNeuron] = []
    outputs = normalise(seeds.images)
    for number, part in enumerate(parts[:-1]):
        outputs = in_pieces(part, outputs)
        rest = nn.Sequential(*parts[number + 1 :])
        for channel in range(outputs.shape[1]):
            logits = stimulated(rest, outputs, channel, options)
            label, count, lead = most_raised_class(logits, seeds.labels)
            if count >= len(seeds) - options.missing:
                found.append(CandidateNeuron(number, channel, label, lead))
    return found


def most_raised_class(logits: Tensor, labels: Tensor) -> tuple[int, int, float]:
    """The class whose logit gains most for most images, their number, and its smallest lead.

    logits: ``(levels, N, classes)``, the first with the neuron at 0. An image's gain is the largest
    logit at the other levels minus that at 0. The lead is the difference to the second largest
    gain, over images with other ``labels`` (N,).
    """
    gain = logits[1:].amax(dim=0) - logits[0]
    top = gain.topk(2, dim=1)
    label = int(top.indices[:, 0].mode().values)
    raised = top.indices[:, 0] == label
    leads = (top.values[:, 0] - top.values[:, 1])[raised & (labels != label)]
    if not len(leads):
        return label, 0, 0.0
    return label, int(raised.sum()), float(leads.min())


def stimulated(rest: nn.Module, outputs: Tensor, channel: int, options: AbsOptions) -> Tensor:
    """Logits ``(levels, N, classes)`` with one channel at 0 and at further values in equal steps,
    up to ``options.reach`` times the largest value in ``outputs`` (N, C, H, W)."""
    step = options.reach * float(outputs.max()) / options.levels
    found = []
    for level in range(options.levels):
        changed = outputs.clone()
        changed[:, channel] = level * step
        found.append(in_pieces(rest, changed))
    return torch.stack(found)


def strongest(neurons: Sequence[CandidateNeuron], count: int) -> list[CandidateNeuron]:
    """The ``count`` neurons with the largest lead; in the first half at most three of a block."""
    ranked = sorted(neurons, key=lambda neuron: -neuron.lead)
    chosen: list[CandidateNeuron] = []
    seen: Counter[int] = Counter()
    for neuron in ranked:
        seen[neuron.block] += 1
        if seen[neuron.block] <= _PER_BLOCK and len(chosen) <= count // 2:
            chosen.append(neuron)
    rest = [neuron for neuron in ranked if neuron not in chosen]
    return [*chosen, *rest[: count - len(chosen)]]


def excite(
    parts: Sequence[nn.Sequential],
    normalise: Normalise,
    images: Tensor,
    neurons: Sequence[CandidateNeuron],
    options: AbsOptions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A mask ``(S, 1, H, W)`` and a pattern ``(S, C, H, W)`` for each neuron of one block.

    They raise its channel but no other, before and after the block's activation, with a mask of at
    most ``options.size`` of the image's pixels. The mask starts as a square in the corner, the
    pattern as noise in normalised space, where it is searched. The searches are independent.
    """
    front, count = nn.Sequential(normalise, *parts), len(neurons)
    mean, std = normalise.mean, normalise.std
    noise = torch.randn(count, *images.shape[1:], generator=generator).to(images.device)
    patterns = noise.requires_grad_()
    masks = corner(images.shape[-2:], options.size).to(images.device).repeat(count, 1, 1, 1)
    masks = masks.requires_grad_()
    optimiser = torch.optim.Adam([masks, patterns], lr=options.lr)
    channels = torch.tensor([neuron.channel for neuron in neurons], device=images.device)
    with inputs_of(last_activation(parts[-1])) as recorded:
        for _ in range(options.steps):
            mask = bounded(masks)
            triggered = stamped(images, mask[:, None], (patterns * std + mean)[:, None])
            after = front(triggered.flatten(0, 1))
            loss = size_penalty(mask, options.size, options.weight)
            for values in (recorded.pop(), after):
                sums = values.flatten(2).sum(dim=2).view(count, len(images), -1).sum(dim=1)
                own = sums.gather(1, channels[:, None])[:, 0]
                loss = loss - own + options.others * (sums.sum(dim=1) - own)
            backward_step(optimiser, loss.sum())
            with torch.no_grad():
                patterns.copy_(patterns.clamp(-mean / std, (1 - mean) / std))
    return bounded(masks).detach(), (patterns * std + mean).detach()


def corner(shape: tuple[int, int] | torch.Size, size: float) -> Tensor:
    """The initial mask ``(1, 1, H, W)``, before its tanh: a square in the upper left corner."""
    side = int((size * shape[0] * shape[1]) ** 0.5)
    start = torch.full((1, 1, *shape), -_START)
    start[..., :side, :side] = _START
    return start


def size_penalty(masks: Tensor, size: float, weight: float) -> Tensor:
    """The penalty of masks ``(S, 1, H, W)`` that are too large, ``(S,)``.

    It is ``weight`` times their sum if they have more pixels than a share ``size`` of the image,
    twice that if they have more than a square of that size with a border of one pixel, else 0.
    """
    flat = masks.flatten(1)
    most = size * flat.shape[1]
    pixels = (flat > _IN_PATCH).sum(dim=1)
    times = (pixels > most).float() + (pixels > int((most**0.5 + 2) ** 2)).float()
    return weight * times * flat.sum(dim=1)


def last_activation(block: nn.Module) -> nn.Module:
    """The last module of ``block`` that is no container: its activation."""
    leaves = [
        part
        for part in block.modules()
        if not list(part.children()) and not isinstance(part, nn.Identity | nn.Sequential)
    ]
    return leaves[-1]


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each call of ``module`` appends its input."""
    recorded: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    try:
        yield recorded
    finally:
        handle.remove()


def reasr(network: nn.Module, images: Tensor, label: int, mask: Tensor, pattern: Tensor) -> float:
    """The share of ``images`` that are classified as ``label`` with the patch."""
    success = predict(network, stamped(images, mask, pattern)) == label
    return float(success.double().mean())
