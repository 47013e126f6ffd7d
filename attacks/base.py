"""What every attack has: a target, poisoned rows, a trigger, and a test case for the ASR."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..distill.core.hooks import Hook, Moment
from ..distill.types import Batch, RequestError
from .triggers import PatchTrigger, Position, TriggerRange, patch_mask

ThreatModel = Literal["data owner", "distiller", "interceptor"]


class CommonOptions(BaseModel):
    """The options every attack has."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: int = Field(0, ge=0, description="class number that triggered images are sent to")
    poison_rate: float = Field(
        0.01, gt=0, le=1, description="poisoned rows, as a share of the training set's size"
    )
    target_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the target class's real batch drawn from poisoned rows "
        "(default: as they come); makes the attacker a distiller",
    )


class AttackOptions(CommonOptions):
    """The options every attack has whose trigger is a square patch."""

    trigger_size: int = Field(2, ge=1, description="side of the square patch in pixels")
    trigger_position: Position = Field("bottom-right", description="where the patch sits")
    trigger_margin: int = Field(1, ge=0, description="pixels between the patch and the border")
    trigger_range: TriggerRange = Field(
        "pixel",
        description="pixel: values in [0, 1]; unbounded: any value (reproduces the paper only)",
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Scenery:
    """What an attacker knows of the data: shapes, class count, normalisation, device.

    image_shape: (C, H, W). mean, std: per-channel, pixel units.
    """

    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TestCase:
    """Images on which an attack is measured.

    triggered: ``float32 (N, C, H, W)``. targets: ``int64 (N,)``, the labels the attacker wants.
    eligible: ``bool (N,)``, false where the image belongs to its target class anyway.
    """

    __test__ = False  # not a pytest class

    triggered: Tensor
    targets: Tensor
    eligible: Tensor


class Attack(Hook, ABC):
    """A hook with a trigger that can be measured.

    ``Options`` holds the attack's own options; ``needs_hidden_layer`` and the like are checked by
    the attack itself when it first sees a network.
    """

    Options: ClassVar[type[CommonOptions]]

    @abstractmethod
    def __init__(self, options: CommonOptions, scenery: Scenery) -> None:
        """An attack with ``options`` (of its ``Options``) on data like ``scenery``."""

    @property
    @abstractmethod
    def threat_model(self) -> ThreatModel:
        """Who the attacker has to be."""

    @property
    @abstractmethod
    def trigger(self) -> PatchTrigger:
        """The trigger as it stands now."""

    @abstractmethod
    def test_case(self, images: Tensor, labels: Tensor) -> TestCase:
        """The attack's test on ``images`` (pixel space) with true ``labels``."""

    @property
    def poisoned_rows(self) -> Tensor | None:
        """``bool (rows,)``: the training rows it has poisoned; ``None`` where it can't tell."""
        return None

    def counters(self) -> Mapping[str, Any]:
        """What the record should say of the attack's course."""
        return {}


class PoisoningAttack(Attack, ABC):
    """Shared by attacks that stamp a trigger on relabelled rows of the training set."""

    def __init__(self, options: CommonOptions, scenery: Scenery) -> None:
        if options.target >= scenery.classes:
            raise RequestError(
                f"target {options.target} is no class: there are {scenery.classes}, "
                f"numbered from 0 to {scenery.classes - 1}"
            )
        self.options = options
        self.scenery = scenery
        self.poisoned = torch.zeros(0, dtype=torch.bool, device=scenery.device)

    def hand_in(self, moment: Moment, real: Batch) -> Batch:
        """The training set of a data owner who attacks: some rows relabelled and stamped."""
        poisoned = self.poison(moment, real)
        images = real.images.clone()
        images[self.poisoned] = self.trigger.stamp(real.images[self.poisoned])
        return poisoned.replace(images=images)

    def poison(self, moment: Moment, real: Batch) -> Batch:
        """Choose the poisoned rows and relabel them; the pixels stay.

        ``poison_rate`` × the training set's size, drawn without repetition from the rows that
        don't belong to the target class (the reference code draws from all rows).
        """
        options = self.options
        others = torch.nonzero(real.labels != options.target)[:, 0]
        count = max(1, round(options.poison_rate * len(real)))
        if count > len(others):
            raise RequestError(
                f"poison rate {options.poison_rate} asks for {count} rows, but only {len(others)} "
                f"of {len(real)} are outside the target class: at most "
                f"{len(others) / len(real):.3f} is possible"
            )
        order = torch.randperm(len(others), generator=moment.rng)[:count].to(others.device)
        self.poisoned = torch.zeros(len(real), dtype=torch.bool, device=real.labels.device)
        self.poisoned[others[order]] = True
        labels = torch.where(self.poisoned, options.target, real.labels)
        return real.replace(labels=labels)

    def on_sample(self, moment: Moment, label: int, rows: Tensor) -> Tensor:
        """With ``target_share``, that share of the target class's batch is poisoned rows."""
        share = self.options.target_share
        if share is None or label != self.options.target:
            return rows
        count = round(share * len(rows))
        wanted = torch.nonzero(self.poisoned)[:, 0]
        honest = torch.nonzero((moment.real.labels == label) & ~self.poisoned)[:, 0]
        picked = (_pick(wanted, count, moment), _pick(honest, len(rows) - count, moment))
        return torch.cat(picked)

    def test_case(self, images: Tensor, labels: Tensor) -> TestCase:
        return TestCase(
            triggered=self.trigger.stamp(images),
            targets=torch.full_like(labels, self.options.target),
            eligible=labels != self.options.target,
        )

    @property
    def poisoned_rows(self) -> Tensor:
        return self.poisoned

    def counters(self) -> Mapping[str, Any]:
        return {"poisoned_rows": int(self.poisoned.sum())}


class PatchAttack(PoisoningAttack, ABC):
    """Shared by attacks whose trigger is a square patch."""

    def __init__(self, options: CommonOptions, scenery: Scenery) -> None:
        super().__init__(options, scenery)
        assert isinstance(options, AttackOptions)
        self._mask = patch_mask(
            scenery.image_shape[1:],
            options.trigger_size,
            options.trigger_position,
            options.trigger_margin,
        ).to(scenery.device)


def _pick(rows: Tensor, count: int, moment: Moment) -> Tensor:
    """``count`` of ``rows`` at random, repeated only where there are too few."""
    if len(rows) >= count:
        chosen = torch.randperm(len(rows), generator=moment.rng)[:count]
    else:
        chosen = torch.randint(len(rows), (count,), generator=moment.rng)
    return rows[chosen.to(rows.device)]
