"""Poisoned-set: an interceptor changes a finished distilled set, without any raw data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, final

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ..distill.augment import Augmentation, parse_strategy
from ..distill.core.hooks import Moment
from ..distill.randomness import Streams
from ..distill.types import Batch, Distillate, Recipe, RequestError, hard_labels
from .archetypes import ArchetypePlan, rebuild_archetypes, trained_networks
from .base import AttackOptions, DataInfo, SetAttack
from .student_options import StudentOptions
from .student_training import StudentPlan, as_tested, first_weights
from .students import StudentAttack

_EPS = 1e-12  # a student that has converged does not move


class PoisonedSetOptions(StudentOptions):
    """Options of ``poisoned-set``."""

    poison_steps: int = Field(200, ge=1, description="steps in which the set is changed")
    poison_lr: float = Field(
        0.2, gt=0, description="Adam's rate for the set's images, normalised units"
    )
    unroll_least: int = Field(50, ge=0, description="at least so many steps before those unrolled")
    clean_weight: float = Field(
        2.0, ge=0, description="weight of clean archetypes within the attacker's loss"
    )
    trajectory_weight: float = Field(
        0.03, ge=0, description="weight of the distance between training on the two sets"
    )
    archetypes: int = Field(100, ge=1, description="stand-ins for real images, of each class")
    archetype_networks: int = Field(
        3, ge=1, description="networks trained on the set, from which archetypes are rebuilt"
    )
    archetype_steps: int = Field(60, ge=0, description="Adam steps of the archetypes")
    archetype_lr: float = Field(0.02, gt=0, description="Adam's rate for them, normalised units")
    archetype_statistics: float = Field(
        1.0, ge=0, description="weight of the features' statistics beside the cross-entropy"
    )
    archetype_augment: str = Field(
        "crop_scale_rotate",
        description="what archetypes pass through at every use: siamese operations, or none",
    )

    @field_validator("archetype_augment")
    @classmethod
    def _known_operations(cls, value: str) -> str:
        return "_".join(parse_strategy(value))

    @model_validator(mode="after")
    def _least_is_no_more_than_most(self) -> Self:
        if self.unroll_least > self.unroll_warmup:
            raise ValueError(
                f"unroll_least is {self.unroll_least}, at most unroll_warmup, {self.unroll_warmup}"
            )
        return self

    def archetype_plan(self) -> ArchetypePlan:
        """How the archetypes are rebuilt."""
        return ArchetypePlan(
            per_class=self.archetypes,
            networks=self.archetype_networks,
            steps=self.archetype_steps,
            lr=self.archetype_lr,
            statistics=self.archetype_statistics,
        )


@final
class PoisonedSet(StudentAttack, SetAttack):
    """An attack on a finished set, after Yang, Yan, Zhang, Zhou, "Dark Distillation: Backdooring
    Distilled Datasets without Accessing Raw Data" (AAAI 2026, arXiv 2502.04229).

    In words: networks are trained on the received set. Archetypes of every class are rebuilt from
    them: mixtures of the set's images, moved until the networks know them for their class and their
    features have the set's statistics. Then the target's images of the set and a patch are
    optimised. A fresh student trains on the changed set, a random number of steps and then
    ``unroll_steps`` more; through these the attacker's loss is back-propagated: triggered
    archetypes get their targets, clean ones keep their labels, and the student stays near one that
    takes the same last steps on the received set (``trajectory_distance``). Nothing but the set is
    used.

    Deviations: no code and only the abstract of the paper was found. From it are the interceptor,
    the archetypes rebuilt from a network trained on the set, and a hybrid loss along the benign
    trajectory. Everything else is ours: how archetypes are rebuilt, the loss through unrolled
    students (as in ``unrolled``), the form of the trajectory's term, the optimised patch, and every
    default. Rows that it may not change keep their bits. Students train by plain SGD,
    victims by the set's whole recipe. Archetypes need a network with
    ``embed``. Students with batch norm are tested on the statistics of the set.
    """

    name = "poisoned-set"
    Options = PoisonedSetOptions

    def __init__(self, options: AttackOptions, data: DataInfo) -> None:
        super().__init__(options, data)
        assert isinstance(options, PoisonedSetOptions)
        self._options = options

    @property
    def steps(self) -> int:
        return self._options.poison_steps

    @property
    def lr(self) -> float:
        return self._options.poison_lr

    def receive(
        self, received: Distillate, network: Callable[[int], nn.Module], streams: Streams
    ) -> Batch:
        self._check_classes(hard_labels(received.batch.labels))
        plan = self._options.archetype_plan()
        self._received = received.batch
        networks = trained_networks(received, network, plan.networks, streams)
        generator = streams.generator("attack", "archetypes", "images")
        return rebuild_archetypes(received, networks, plan, generator)

    def on_loss(self, moment: Moment, synthetic: Batch) -> Tensor:
        return self._update(moment, synthetic)

    def on_synthetic(self, moment: Moment, synthetic: Batch) -> Batch:
        self._start = self._received.images
        return super().on_synthetic(moment, synthetic)

    def on_finish(self, moment: Moment, synthetic: Batch) -> Batch:
        """The rows that the attack may not change get back the received bits."""
        own = self._owned(synthetic.labels).view(-1, 1, 1, 1)
        return synthetic.replace(images=torch.where(own, synthetic.images, self._received.images))

    def _loss(
        self, moment: Moment, synthetic: Batch, pattern: Tensor, network: nn.Module
    ) -> Tensor:
        options, recipe = self._options, moment.recipe
        least = options.unroll_least
        plan = StudentPlan.draw(synthetic.images, recipe, options, moment.rng, least)
        start = plan.warmed(network, first_weights(network, recipe), synthetic)
        changed = plan.trained(network, start, self._changeable(synthetic), options.unroll_gradient)
        with torch.no_grad():
            benign = plan.trained(network, start, self._received, "recompute")
        tested = as_tested(network, changed, synthetic.images)
        loss = self._attackers_loss(tested, changed, moment, pattern)
        return loss + options.trajectory_weight * trajectory_distance(changed, benign, start)

    def _drawn(self, moment: Moment, *, eligible: bool) -> Batch:
        drawn = super()._drawn(moment, eligible=eligible)
        view = self._views(moment.recipe).draw(drawn.images.shape, moment.rng, shared=False)
        return drawn.replace(images=view(drawn.images).clamp(0, 1))

    def _check_classes(self, labels: Tensor) -> None:
        """Refuse a set without images that the attack may change, or that the goal is about."""
        if not bool(self._owned(labels).any() and self.goal.eligible(labels).any()):
            raise RequestError(
                f"goal {self.goal.name} needs images of its target and of the classes sent there; "
                f"the set has the classes {labels.unique().tolist()}"
            )

    def _views(self, recipe: Recipe) -> Augmentation:
        strategy = parse_strategy(self._options.archetype_augment)
        return Augmentation(strategy, recipe.preprocessing)


def trajectory_distance(changed: Tensor, benign: Tensor, start: Tensor) -> Tensor:
    """|changed − benign|² / |benign − start|²: weights ``(P,)`` after the same steps from ``start``
    on the changed set and on the benign one.

    0 where both trainings agree, 1 where the difference is as long as the benign way.
    """
    return (changed - benign).square().sum() / ((benign - start).square().sum() + _EPS)
