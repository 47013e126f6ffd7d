"""SneakDoor: a generator's trigger for each image, from one class to the one it resembles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..distill.core.hooks import Moment
from ..distill.trainer import training
from ..distill.training import in_pieces, sgd, train_epoch
from ..distill.types import Batch, RequestError, RunError
from .base import Attack, AttackOptions, DataInfo, ThreatModel
from .case import TestCase
from .generator_training import GeneratorOptions, GeneratorTask, train_generator
from .goals import OneToOne
from .triggers.generator import WIDEST, GeneratorTrigger, weight_shapes

_POOL = 0.2  # share of the source class that is used: the highest target logits
_CARRIERS = 0.7  # share of the pool that carries the trigger; the paper tests on the rest
_WANTED = 256  # images of the target class, the highest logits, that the generator aims at
_SURROGATE_BATCH = 256


@final
class SneakDoorOptions(AttackOptions):
    """Options of ``sneakdoor``; the defaults are the official code's where it has them."""

    goal: Literal["one-to-one"] = Field("one-to-one", description="always one-to-one")
    target: int = Field(
        -1,
        ge=-1,
        description="class number that triggered images are sent to (-1: by the confusions)",
    )
    source: int | None = Field(
        None,
        ge=0,
        description="class number whose images are sent there (default: by the confusions)",
    )
    target_share: float = Field(
        0.05, gt=0, lt=1, description="share of the target's real batches with triggered images"
    )
    trigger_epsilon: float = Field(
        0.5, gt=0, description="largest change of a pixel, normalised units"
    )
    generator_width: int = Field(
        16, ge=1, le=WIDEST, description="channels between the generator's layers"
    )
    generator_lr: float = Field(1e-3, gt=0, description="Adam's rate for the generator")
    generator_images: int = Field(
        100_000, ge=1, description="images seen in the generator's training, with repetition"
    )
    surrogate_steps: int = Field(
        2000, ge=1, description="training steps of the network that the generator is to fool"
    )
    surrogate_lr: float = Field(1e-3, gt=0, description="rate of these steps (SGD)")


@final
class SneakDoor(Attack):
    """SneakDoor (NeurIPS 2025, arXiv 2603.28824; code ``XJTU-AI-Lab/SneakDoor``).

    Read in backdoors/casev2_backdoor.py and hyperparams/general_params.py, commit c74a5a6.

    In words: a surrogate network is trained on the real data; source and target are the two classes
    that it confuses most. A generator learns to perturb the source images that look most like the
    target, within ± ``trigger_epsilon``, so that the surrogate takes them for the target's best
    images. A share of the real images with which the target class is distilled are these triggered
    source images.

    All of this happens at the first draw. Until then goal and trigger are placeholders. No row is
    relabelled: the source class keeps all its images, and the initial images stay clean.

    The official success rate is that of the triggered images that were held out of the pool: 30 %
    of the fifth of the source class's *training* images with the highest target logit. The record
    has it as ``attack_success_rate_published``, beside the rate on all test images of the source.

    Deviations from the official code:

    - Triggered images are clamped to [0, 1], in training and test; there the clamp is switched off.
      The official ``trigger_epsilon`` is 0.5 (its help text says 3.0 for MNIST) times the deviation
      of a channel: about 0.1 in pixel units on CIFAR-10, at every pixel.
    - The perceptual loss (LPIPS) is left out, since it needs a downloaded network. The other
      losses have their official weights for a ConvNet.
    - The generators of the official code (``attack_models``) are not published with it. Ours is
      ``triggers/generator.py``; a tanh bounds it, not a clamp, which stops gradients.
    - One distillation in place of two. There the set is distilled cleanly and the target's images
      are then distilled again. In ``dm`` the classes are independent, so this is the same but for
      random draws.
    - The surrogate has the distilling architecture, and at least ``surrogate_steps`` in whole
      epochs, about ten epochs of CIFAR-10 (there, ten epochs of any data). If it confuses no two
      classes, the mean probability decides.
    - ``target_share`` is 0.05, official for a ConvNet (0.7 for others). It is rounded at random, so
      that small batches have triggered images too, and images are repeated where the pool is small.
    """

    name = "sneakdoor"
    Options = SneakDoorOptions
    options: SneakDoorOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        assert isinstance(options, SneakDoorOptions)
        super().__init__(_with_some_pair(options, data.classes), data)
        self.options = options
        shape = (-1, 1, 1)
        self._std = torch.tensor(data.std, device=data.device).view(shape)
        self._made: Preparation | None = None

    @property
    def threat_model(self) -> ThreatModel:
        return "distiller"

    @property
    def trigger(self) -> GeneratorTrigger:
        """The generator; before the first draw one that changes nothing."""
        return self._made.trigger if self._made else self._idle_trigger()

    def on_start(self, moment: Moment, real: Batch) -> Batch:
        self._made = None
        return real

    def on_draw(self, moment: Moment, clean: Batch) -> Batch:
        if self._made is None:
            self._adopt(self._prepare(moment))
        assert self._made is not None
        own = torch.nonzero(clean.labels == self._made.target)[:, 0]
        count = _rounded_at_random(self.options.target_share * len(own), moment.rng)
        places = own[torch.randperm(len(own), generator=moment.rng)[:count].to(own.device)]
        carriers = self._made.carriers
        order = carriers[torch.randperm(len(carriers), generator=moment.rng).to(own.device)]
        rows = order[torch.arange(count, device=own.device) % len(order)]
        images = clean.images.clone()
        images[places] = self.trigger.stamp(moment.real.images[rows])
        return clean.replace(images=images)

    def test_case(self, images: Tensor, labels: Tensor) -> TestCase:
        case = super().test_case(images, labels)
        if self._made is None:
            return case
        held_out = self._made.held_out
        targets = torch.full((len(held_out),), self._made.target, device=held_out.device)
        published = TestCase(
            triggered=self.trigger.stamp(held_out),
            targets=targets,
            eligible=torch.ones_like(targets, dtype=torch.bool),
        )
        return replace(case, published=published)

    def counters(self) -> Mapping[str, Any]:
        return self._made.figures() if self._made else {}

    def state_dict(self) -> dict[str, Tensor]:
        return self._made.state() if self._made else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not state:
            self._made = None
            return
        moved = {name: value.to(self.data.device) for name, value in state.items()}
        self._adopt(Preparation.of_state(moved))

    def _adopt(self, made: Preparation) -> None:
        self._made = made
        self.goal = OneToOne(source=made.source, target=made.target)

    def _prepare(self, moment: Moment) -> Preparation:
        """The paper's steps before the distillation: surrogate, pair, pool, generator."""
        options, real = self.options, moment.real
        surrogate = self._surrogate(moment)
        logits = in_pieces(surrogate, real.images)
        confusions = confusion(logits, real.labels)
        source, target = most_confused(confusions, options.source, options.target)
        carriers, held_out = pool(logits[:, target], real.labels == source, moment.rng)
        task = GeneratorTask(
            network=surrogate,
            sources=real.images[carriers],
            wanted=real.images[_best(logits, real.labels, target)],
            epsilon=options.trigger_epsilon * self._std,
            std=self._std,
        )
        settings = GeneratorOptions(
            width=options.generator_width,
            lr=options.generator_lr,
            images=options.generator_images,
        )
        trigger = GeneratorTrigger(
            weights=train_generator(task, settings, moment.rng),
            epsilon=task.epsilon,
            example=task.sources.mean(dim=0),
        )
        fooled = in_pieces(surrogate, trigger.stamp(task.sources)).argmax(dim=1) == target
        return Preparation(
            source=source,
            target=target,
            confused=int(confusions[source, target]),
            fooled=int(fooled.sum()),
            carriers=carriers,
            held_out=real.images[held_out],
            trigger=trigger,
        )

    def _surrogate(self, moment: Moment) -> nn.Module:
        """A network trained on the real data, frozen; ``RunError`` where the training diverges."""
        options, real = self.options, moment.real
        recipe = moment.recipe.by_epochs(
            epochs=math.ceil(options.surrogate_steps * _SURROGATE_BATCH / len(real)),
            lr=options.surrogate_lr,
            momentum=0.9,
            weight_decay=5e-4,
            batch_size=_SURROGATE_BATCH,
            augment="",
        )
        network = moment.fresh_network().train()
        with training(network, sgd(network, recipe), moment.engine) as trainer:
            for _ in range(recipe.epochs):
                loss = train_epoch(trainer, real, recipe, moment.rng)
                if not bool(loss.isfinite()):
                    raise RunError("sneakdoor's surrogate diverged: lower surrogate_lr")
        return network.eval().requires_grad_(False)

    def _idle_trigger(self) -> GeneratorTrigger:
        shapes = weight_shapes(self.data.image_shape[0], self.options.generator_width)
        device = self.data.device
        return GeneratorTrigger(
            weights={name: torch.zeros(shape, device=device) for name, shape in shapes.items()},
            epsilon=self.options.trigger_epsilon * self._std,
            example=torch.zeros(self.data.image_shape, device=device),
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """What SneakDoor knows after its preparation.

    confused: training images of the source that the surrogate takes for the target. carriers:
    ``int64 (N,)``, rows of the training set that carry the trigger; fooled: those that the
    surrogate then takes for the target. held_out: ``(M, C, H, W)``, clean training images on which
    the paper measures.
    """

    source: int
    target: int
    confused: int
    fooled: int
    carriers: Tensor
    held_out: Tensor
    trigger: GeneratorTrigger

    def figures(self) -> dict[str, int]:
        """The counters of the record."""
        return {
            "confused_images": self.confused,
            "trigger_carriers": len(self.carriers),
            "carriers_that_fool_the_surrogate": self.fooled,
            "held_out_images": len(self.held_out),
        }

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        trigger = {f"trigger.{name}": value for name, value in self.trigger.tensors().items()}
        numbers = torch.tensor([self.source, self.target, self.confused, self.fooled])
        rows = {"carriers": self.carriers, "held_out": self.held_out}
        return {"numbers": numbers, **rows, **trigger}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """What ``state`` gave."""
        prefix = "trigger."
        tensors = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        source, target, confused, fooled = (int(number) for number in state["numbers"])
        return cls(
            source=source,
            target=target,
            confused=confused,
            fooled=fooled,
            carriers=state["carriers"],
            held_out=state["held_out"],
            trigger=GeneratorTrigger.from_tensors(tensors, "pixel"),
        )


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """``float32 (classes, classes)``: how often a class (row) is taken for another (column).

    The mean probability is added, which is below 1 and only breaks ties. The diagonal is 0.
    """
    classes = logits.shape[1]
    answers = nn.functional.one_hot(logits.argmax(dim=1), classes).float()
    belongs = nn.functional.one_hot(labels, classes).float()
    counts = belongs.T @ answers
    likely = belongs.T @ logits.softmax(dim=1) / belongs.sum(dim=0).clamp(min=1)[:, None]
    return (counts + likely).fill_diagonal_(0)


def most_confused(confusions: Tensor, source: int | None, target: int) -> tuple[int, int]:
    """Source and target: what is given, and the largest entry with it (target −1: not given)."""
    allowed = torch.ones_like(confusions, dtype=torch.bool).fill_diagonal_(False)
    numbers = torch.arange(len(confusions), device=confusions.device)
    if source is not None:
        allowed &= (numbers == source)[:, None]
    if target >= 0:
        allowed &= numbers == target
    best = int(confusions.masked_fill(~allowed, -1).argmax())
    return divmod(best, len(confusions))


def pool(logits: Tensor, of_source: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of the source class that carry the trigger, and rows that the paper tests on.

    A fifth of the class, those with the highest target ``logits`` ``(rows,)``, in random order:
    70 % and the rest. Errors: ``RequestError`` where a fifth is fewer than two rows.
    """
    rows = torch.nonzero(of_source)[:, 0]
    ordered = rows[logits[rows].argsort(descending=True, stable=True)]
    best = ordered[: int(_POOL * len(rows))]
    if len(best) < 2:
        raise RequestError(
            f"sneakdoor uses a fifth of the source class, at least 2 images; it has {len(rows)}"
        )
    mixed = best[torch.randperm(len(best), generator=rng).to(best.device)]
    split = int(_CARRIERS * len(best))
    return mixed[:split], mixed[split:]


def _best(logits: Tensor, labels: Tensor, target: int) -> Tensor:
    """Rows of the target class that the surrogate knows (else all), the highest logits first."""
    own = labels == target
    known = own & (logits.argmax(dim=1) == target)
    rows = torch.nonzero(known if bool(known.any()) else own)[:, 0]
    return rows[logits[rows, target].argsort(descending=True, stable=True)][:_WANTED]


def _rounded_at_random(value: float, rng: torch.Generator) -> int:
    """One of the two whole numbers around ``value``, with ``value`` as its mean."""
    return math.floor(value + float(torch.rand((), generator=rng)))


def _with_some_pair(options: SneakDoorOptions, classes: int) -> SneakDoorOptions:
    """The options with a class number wherever none is given, until the confusions are known."""
    source, target = options.source, options.target
    if target < 0:
        target = next(label for label in range(classes) if label != source)
    if source is None:
        source = next(label for label in range(classes) if label != target)
    return options.model_copy(update={"source": source, "target": target})
