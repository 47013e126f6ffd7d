"""NAD: a fine-tuned copy teaches the victim where to look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.networks.registry import Network
from ...distill.types import Recipe
from ..base import DefenderView, Repairer
from ..common.held_out import images_needed, images_wanted
from ..common.maps import blocks
from ..common.tuning import QUICK_TUNING, SgdOptions, follow, tune

_NOTHING = 1e-6


@final
class NadOptions(SgdOptions):
    """The authors' code for CIFAR-10 (config.py, main.py and utils/util.py).

    Its 20 epochs of 2,500 images (5 % of the training set) in mini-batches of 64 are 40
    mini-batches each: two epochs at 0.1 are 80 steps, 18 more at 0.01 are 720. The teacher takes
    10 epochs (the README says 5 to 10) by the same code without attention. Its weights, 500, 1000
    and 1000, are for mean squared differences of maps of 32x32, 16x16 and 8x8 pixels. Maps have
    unit norm, so that such a mean is smaller the more pixels there are: here the weights are for
    squared distances, which is the same on those maps and as strong on any others.
    """

    steps: int = Field(800, ge=1, description="mini-batches of held-out images")
    lr: float | None = Field(
        0.1, gt=0, description="SGD's first learning rate; none: the set's recipe's"
    )
    early: int = Field(80, ge=0, description="steps at the first learning rate")
    late: float = Field(0.1, gt=0, description="the later learning rate / the first")
    batch: int = Field(64, ge=2, description="images in a mini-batch")
    nesterov: bool = Field(True, description="whether the momentum is Nesterov's")
    weight_decay: float = Field(1e-4, ge=0, description="SGD's weight decay")
    teacher_steps: int = Field(400, ge=1, description="steps that the teacher is fine-tuned")
    weights: tuple[float, ...] = Field(
        (500 / 1024, 1000 / 256, 1000 / 64),
        min_length=1,
        description="weights of squared distances of attention maps, of the last groups",
    )
    power: float = Field(2.0, gt=0, description="power of activations in an attention map")

    def rates(self, recipe: Recipe) -> list[float]:
        first = self.lr or recipe.lr
        return [first * (1 if number < self.early else self.late) for number in range(self.steps)]


@final
class Nad(Repairer):
    """NAD, neural attention distillation (Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention
    Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021).

    In words: fine-tune a copy of the victim for a while; then fine-tune the victim so that its
    attention maps (the sum of squared activations over channels, normalised) become the copy's.

    Needs held-out images and convolutions.

    Deviations: epochs are counted in steps, so that fewer held-out images are seen more often;
    attention is taken where the maps' size is about to change, at the last three such places (the
    ends of the three groups of the authors' wide residual network, before any activation; here
    behind it); shallower networks use what they have, with the last weights. Crops shift by an
    eighth of the image whatever its size (4 pixels of 32 in the code). The code also blacks out 2x2
    pixels, which its README's results do without. The paper's main results are those of 10 epochs,
    the code runs 20. BackdoorBench differs (10 epochs at 0.01, weight decay 5e-4, mini-batches of
    256).
    """

    name = "nad"
    Options = NadOptions
    needs = "held-out images, convolutions"
    quick: ClassVar[Mapping[str, Any]] = QUICK_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.01},
        {"lr": 0.03},
        {"lr": 0.05, "late": 1.0},
        {},
        {"weights": (2500 / 1024, 5000 / 256, 5000 / 64)},
        {"lr": 0.1, "late": 1.0},
    )

    def __init__(self, options: NadOptions) -> None:
        self.options: NadOptions = options

    def objection(self, view: DefenderView) -> str | None:
        if blocks(view.victim) is None:
            return "needs a network with feature maps"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, recipe, holdout = self.options, view.distilled.recipe, view.holdout
        lessons = options.model_copy(update={"steps": options.teacher_steps})
        taught = view.generator(self.name, "teacher")
        teacher = tune(view.trainable_victim(), holdout, recipe, lessons, taught)

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            maps, logits = attend(network, images, options.power)
            with torch.no_grad():
                wanted, _ = attend(teacher, images, options.power)
            apart = apart_in_attention(groups(maps), groups(wanted), options.weights)
            follow(optimiser, functional.cross_entropy(logits, labels) + apart)

        generator = view.generator(self.name, "student")
        return tune(view.trainable_victim(), holdout, recipe, options, generator, step)


def apart_in_attention(
    mine: Sequence[Tensor], theirs: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Squared distances of attention maps ``(N, 1, H, W)``, mean over images, the last ones by
    ``weights``."""
    count = min(len(mine), len(weights))
    terms = zip(mine[-count:], theirs[-count:], weights[-count:], strict=True)
    return torch.stack([w * (a - b).square().sum() / len(a) for a, b, w in terms]).sum()


def groups(maps: Sequence[Tensor]) -> list[Tensor]:
    """Of consecutive maps of one size the last."""
    following = [*(tuple(found.shape) for found in maps[1:]), None]
    return [found for found, after in zip(maps, following, strict=True) if found.shape != after]


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
