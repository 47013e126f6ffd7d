"""The classic case: a poisoned full-size training set of the digits, and the clean one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Tensor

from distillsec.attacks.triggers import PatchTrigger, patch_mask
from distillsec.defenses.base import DefenderView
from distillsec.distill.data.registry import load_dataset
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.training import fit
from distillsec.distill.types import Batch, DistilledSet, Recipe

TARGET = 3
RATE = 0.1
HELD_OUT = 150


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What a defender sees, and the truth.

    poisoned: ``bool (N,)``, the set's poisoned rows (none in the clean case). clean, triggered:
    the same test images of other classes than the target, without and with the trigger.
    """

    view: DefenderView
    poisoned: Tensor
    clean: Batch
    triggered: Tensor

    def rows(self, index: Tensor) -> Case:
        """The same with other rows of the set; the victim stays."""
        batch = self.view.distilled.batch.rows(index)
        distilled = replace(self.view.distilled, batch=batch)
        return replace(self, view=self.fresh(distilled=distilled), poisoned=self.poisoned[index])

    def fresh(self, **changes: Any) -> DefenderView:
        """The view with some fields changed and an empty cache."""
        fields = ("distilled", "victim", "network", "holdout", "entropy")
        return DefenderView(**{name: getattr(self.view, name) for name in fields} | changes)


def make_case(
    *,
    poisoned: bool,
    norm: str = "batch",
    seed: int = 0,
    rate: float = RATE,
    faint: float = 0.0,
    epochs: int = 12,
    width: int = 16,
    depth: int = 2,
) -> Case:
    """BadNets on the digits: a white 3×3 square on a share of the rows, relabelled to class 3.

    A tenth of the rows is as many again as the target class has; a fiftieth is a sixth of it.
    faint: in place of the square a checkerboard all over the image, so far up and down.
    """
    data = load_dataset("digits")
    train = data.train
    mask = patch_mask((8, 8), 3, "bottom-right", 0)
    patch = PatchTrigger(pattern=mask.clone(), mask=mask)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1

    def stamp(images: Tensor) -> Tensor:
        return (images + faint * board).clamp(0, 1) if faint else patch.stamp(images)

    rows = torch.zeros(len(train), dtype=torch.bool)
    if poisoned:
        others = torch.nonzero(train.labels != TARGET)[:, 0]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        rows[others[order[: round(rate * len(train))]]] = True
    images = torch.where(rows.view(-1, 1, 1, 1), stamp(train.images), train.images)
    labels = torch.where(rows, TARGET, train.labels)
    recipe = Recipe(
        preprocessing=Preprocessing(data.mean, data.std), epochs=epochs, lr=0.05, batch_size=64
    )
    distilled = DistilledSet(
        batch=Batch(images=images, labels=labels), classes=data.classes, recipe=recipe
    )
    network = NetworkMaker(
        spec=NetworkSpec(network="convnet", width=width, depth=depth, norm=norm),
        image_shape=data.image_shape,
        classes=10,
        preprocessing=data.preprocessing,
    )
    torch.set_num_threads(1)
    victim = fit(
        network(seed + 1), distilled.batch, recipe, torch.Generator().manual_seed(seed)
    ).requires_grad_(False)
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(5))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    shown = data.test.rows(rest[data.test.labels[rest] != TARGET])
    return Case(
        view=DefenderView(
            distilled=distilled,
            victim=victim,
            network=network,
            holdout=replace(data.test.rows(held), index=None),
            entropy=11,
        ),
        poisoned=rows,
        clean=shown,
        triggered=stamp(shown.images),
    )


@pytest.fixture(scope="session")
def badnets() -> Case:
    """The poisoned case."""
    return make_case(poisoned=True)


@pytest.fixture(scope="session")
def sparse() -> Case:
    """A poisoned case in which a fiftieth of the rows is poisoned."""
    return make_case(poisoned=True, rate=0.02)


@pytest.fixture(scope="session")
def honest() -> Case:
    """The clean case: the same images and seeds without poison."""
    return make_case(poisoned=False)


@pytest.fixture(scope="session")
def cases() -> Callable[..., Case]:
    """Any other case: ``cases(poisoned=True, norm="instance")``; each is made once."""
    return functools.cache(make_case)


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Everything here is small: a second thread would not help."""
