"""Training with SGD: steps, schedules and mini-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses.common import sgd
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.training import fit
from distillsec.distill.types import Batch, Recipe


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def made() -> nn.Module:
    maker = NetworkMaker(
        spec=NetworkSpec(network="convnet", width=6, depth=2, norm="batch"),
        image_shape=(1, 8, 8),
        classes=4,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.3,)),
    )
    return maker(0)


def images_of(count: int) -> Batch:
    images = torch.rand(count, 1, 8, 8, generator=seeded(3))
    return Batch(images=images, labels=torch.arange(count) % 4)


def test_training_by_a_step_is_training() -> None:
    """``train_by_recipe`` with the default step gives the same weights as ``fit``."""
    batch = images_of(23)
    recipe = Recipe(
        preprocessing=Preprocessing((0.5,), (0.3,)), epochs=5, batch_size=5, lr=0.05, augment="crop"
    )
    one = fit(made(), batch, recipe, seeded(4))
    other = sgd.train_by_recipe(made(), batch, recipe, seeded(4))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("lr", "rate"), [(None, 0.05), (0.2, 0.2)])
@pytest.mark.parametrize(("hold", "halves"), [(1, 1), (2, 1), (1, 2)])
def test_fine_tuning_anneals_the_learning_rate(
    lr: float | None, rate: float, hold: int, halves: int
) -> None:
    seen: list[tuple[float, int]] = []

    def step(network: nn.Module, optimiser: torch.optim.Optimizer, *rows: Tensor) -> None:
        seen.append((optimiser.param_groups[0]["lr"], len(rows[0])))
        optimiser.step()

    options = sgd.FineTuningOptions(steps=7, batch=8, lr=lr, hold=hold, halves=halves)
    recipe = Recipe(preprocessing=Preprocessing((0.5,), (0.3,)), lr=0.05)
    tuned = sgd.fine_tune(made(), images_of(20), recipe, options, seeded(), step)
    places = [0, 0, 2, 2, 4, 4, 6] if hold == 2 else range(7)
    wanted = [rate * (1 + np.cos(np.pi * halves * place / 7)) / 2 for place in places]
    assert [rate for rate, _ in seen] == pytest.approx(wanted)
    assert [count for _, count in seen] == [8, 8, 4, 8, 8, 4, 8]
    assert not tuned.training and not any(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize(("count", "size", "wanted"), [(9, 4, [4, 4]), (1, 4, [1]), (6, 3, [3, 3])])
def test_a_single_last_row_is_no_mini_batch(count: int, size: int, wanted: list[int]) -> None:
    batches = sgd.mini_batches(count, size, seeded(), torch.device("cpu"))
    assert [len(rows) for rows in batches] == wanted
    assert len(torch.cat(batches).unique()) == sum(wanted)
