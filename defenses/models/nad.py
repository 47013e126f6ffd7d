"""The defense ``nad``."""

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
from ..common.held_out import few_images_caution, images_needed
from ..common.maps import blocks
from ..common.sgd import QUICK_FINE_TUNING, SgdOptions, backward_step, fine_tune

_EPSILON = 1e-6


@final
class NadOptions(SgdOptions):
    """The authors' code for CIFAR-10 (config.py, main.py and utils/util.py).

    20 epochs of 2,500 images (5 % of the training set) in mini-batches of 64 have 40 mini-batches
    each: two epochs at 0.1 are 80 steps, 18 more at 0.01 are 720. The teacher is fine-tuned for 10
    epochs (5 to 10 in the README) by the same code without attention. The code's weights, 500, 1000
    and 1000, are for mean squared differences of maps of 32×32, 16×16 and 8×8 pixels. Maps have
    unit norm, so such a mean depends on the number of pixels; here the weights are for squared
    distances, which is the same for those maps and has the same strength for others.
    """

    steps: int = Field(800, ge=1, description="mini-batches of held-out images")
    lr: float | None = Field(
        0.1, gt=0, description="SGD's first learning rate; none: that of the set's recipe"
    )
    early: int = Field(80, ge=0, description="steps at the first learning rate")
    late: float = Field(0.1, gt=0, description="the later learning rate / the first")
    batch: int = Field(64, ge=2, description="images in a mini-batch")
    nesterov: bool = Field(True, description="whether SGD uses Nesterov momentum")
    weight_decay: float = Field(1e-4, ge=0, description="SGD's weight decay")
    teacher_steps: int = Field(400, ge=1, description="fine-tuning steps of the teacher")
    weights: tuple[float, ...] = Field(
        (500 / 1024, 1000 / 256, 1000 / 64),
        min_length=1,
        description="weights of the squared distances of the last attention maps",
    )
    power: float = Field(2.0, gt=0, description="power of activations in an attention map")

    def rates(self, recipe: Recipe) -> list[float]:
        first = self.lr or recipe.lr
        return [first * (1 if number < self.early else self.late) for number in range(self.steps)]


@final
class Nad(Repairer):
    """NAD, neural attention distillation: the victim learns the attention maps of a fine-tuned copy
    (Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from
    Deep Neural Networks", ICLR 2021).

    In words: fine-tune a copy of the victim, the teacher. Then fine-tune the victim so that its
    attention maps (the sum of squared activations over channels, normalised) become the teacher's.

    Needs held-out images and convolutions.

    Deviations: epochs are counted in steps, so that fewer held-out images are used more often.
    Attention maps are taken at the last three places before the size of the maps changes (the ends
    of the three groups of the authors' wide residual network, before any activation; here after
    it); shallower networks have fewer, with the last weights. Crops shift by an eighth of the image
    whatever its size (4 pixels of 32 in the code). The code also blacks out 2×2 pixels, but not for
    the results in its README. The paper's main results are those of 10 epochs, the code runs 20.
    BackdoorBench differs (10 epochs at 0.01, weight decay 5e-4, mini-batches of 256).
    """

    name = "nad"
    Options = NadOptions
    options: NadOptions
    needs = "held-out images, convolutions"
    quick: ClassVar[Mapping[str, Any]] = QUICK_FINE_TUNING
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"lr": 0.01},
        {"lr": 0.03},
        {"lr": 0.05, "late": 1.0},
        {},
        {"weights": (2500 / 1024, 5000 / 256, 5000 / 64)},
        {"lr": 0.1, "late": 1.0},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        if blocks(view.victim) is None:
            return "needs a network with feature maps"
        return images_needed(view)

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "trained on")

    def repair(self, view: DefenderView) -> nn.Module:
        options, recipe, holdout = self.options, view.distilled.recipe, view.holdout
        fewer = options.model_copy(update={"steps": options.teacher_steps})
        generator = view.generator(self.name, "teacher")
        teacher = fine_tune(view.trainable_victim(), holdout, recipe, fewer, generator)

        def step(
            network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor
        ) -> None:
            maps, logits = attention_maps(network, images, options.power)
            with torch.no_grad():
                targets, _ = attention_maps(teacher, images, options.power)
            distance = attention_distance(groups(maps), groups(targets), options.weights)
            backward_step(optimiser, functional.cross_entropy(logits, labels) + distance)

        generator = view.generator(self.name, "student")
        return fine_tune(view.trainable_victim(), holdout, recipe, options, generator, step)


def attention_distance(
    maps: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Squared distances of the last attention maps ``(N, 1, H, W)``, weighted by the last of
    ``weights``, mean over images."""
    count = min(len(maps), len(weights))
    terms = zip(maps[-count:], targets[-count:], weights[-count:], strict=True)
    return torch.stack([w * (a - b).square().sum() / len(a) for a, b, w in terms]).sum()


def groups(maps: Sequence[Tensor]) -> list[Tensor]:
    """The last one of consecutive maps of equal size."""
    following = [*(tuple(found.shape) for found in maps[1:]), None]
    return [found for found, after in zip(maps, following, strict=True) if found.shape != after]


def attention_maps(
    network: nn.Module, images: Tensor, power: float
) -> tuple[Sequence[Tensor], Tensor]:
    """The attention map of each block, ``(N, 1, H, W)``, and the logits."""
    parts = blocks(network)
    assert parts is not None and isinstance(network, Network)
    outputs, maps = network.normalise(images), []
    for part in parts[:-1]:
        outputs = part(outputs)
        maps.append(attention(outputs, power))
    return maps, parts[-1](outputs)


def attention(maps: Tensor, power: float) -> Tensor:
    """Sum of activations to ``power`` over channels, of unit L2 norm: ``(N, 1, H, W)``."""
    summed: Tensor = maps.abs().pow(power).sum(dim=1, keepdim=True)
    norms: Tensor = summed.flatten(1).norm(dim=1)
    return summed / (norms.view(-1, 1, 1, 1) + _EPSILON)
