"""NAD: a fine-tuned copy teaches the victim where to look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.networks import Network
from .base import DefenderView, Repairer
from .held_out import images_needed, images_wanted
from .maps import blocks
from .tuning import QUICK_TUNING, TuningOptions, follow, tune

_NOTHING = 1e-6


@final
class NadOptions(TuningOptions):
    """The official code's, its epochs in steps, its weights in another unit; see the deviations."""

    steps: int = Field(800, ge=1, description="mini-batches of held-out images")
    batch: int = Field(64, ge=2, description="images in a mini-batch")
    teacher_steps: int = Field(400, ge=1, description="steps that the teacher is fine-tuned")
    weights: tuple[float, ...] = Field(
        (0.5, 4.0, 16.0), min_length=1, description="weights of the last blocks' attention"
    )
    power: float = Field(2.0, gt=0, description="power of activations in an attention map")


@final
class Nad(Repairer):
    """NAD, neural attention distillation (Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention
    Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021).

    In words: fine-tune a copy of the victim for a while; then fine-tune the victim so that its
    attention maps (the sum of squared activations over channels, normalised) become the copy's.

    Needs held-out images and convolutions.

    Deviations: tuning is counted in steps, at the set's own learning rate (the code tunes at the
    0.1 that its victims were trained with); attention is taken at the ends of the last three
    blocks, whatever the architecture (the paper's are those of a wide residual network); shallower
    networks use what they have. The code weighs mean squared differences of maps by 500, 1000 and
    1000, which depends on their size; here squared distances are weighed, by what that is for
    CIFAR-10's maps of 32, 16 and 8 pixels.
    """

    name = "nad"
    Options = NadOptions
    needs = "held-out images, convolutions"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING

    def __init__(self, options: NadOptions) -> None:
        self.options: NadOptions = options

    def objection(self, view: DefenderView) -> str | None:
        if blocks(view.victim) is None:
            return "needs a network with feature maps"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, recipe = self.options, view.distilled.recipe
        lessons = TuningOptions(
            steps=options.teacher_steps,
            **options.model_dump(include={"lr", "batch", "momentum", "weight_decay"}),
        )
        teacher = tune(
            view.trainable_victim(),
            view.holdout,
            recipe,
            lessons,
            view.generator(self.name, "teacher"),
        )

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            maps, logits = attend(network, images, options.power)
            with torch.no_grad():
                taught, _ = attend(teacher, images, options.power)
            count = min(len(maps), len(options.weights))
            loss = functional.cross_entropy(logits, labels)
            for mine, theirs, weight in zip(
                maps[-count:], taught[-count:], options.weights[-count:], strict=True
            ):
                apart = (mine - theirs).square().flatten(1).sum(dim=1).mean()
                loss = loss + weight * apart
            follow(optimiser, loss)

        generator = view.generator(self.name, "student")
        return tune(view.trainable_victim(), view.holdout, recipe, options, generator, step)


def attend(network: nn.Module, images: Tensor, power: float) -> tuple[Sequence[Tensor], Tensor]:
    """The attention map of each block, ``(N, 1, H, W)``, and the logits."""
    pieces = blocks(network)
    assert pieces is not None and isinstance(network, Network)
    outputs, maps = network.normalise(images), []
    for piece in pieces[:-1]:
        outputs = piece(outputs)
        maps.append(attention(outputs, power))
    return maps, pieces[-1](outputs)


def attention(maps: Tensor, power: float) -> Tensor:
    """Sum of activations to ``power`` over channels, of unit L2 norm: ``(N, 1, H, W)``."""
    summed: Tensor = maps.abs().pow(power).sum(dim=1, keepdim=True)
    norms: Tensor = summed.flatten(1).norm(dim=1)
    return summed / (norms.view(-1, 1, 1, 1) + _NOTHING)
