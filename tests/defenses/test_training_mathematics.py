"""What defenses that train compute: isolation, mixing, private steps, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from distillsec.defenses import abl, dp_sgd, mixing
from distillsec.distill.types import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from distillsec.defenses.base import DefenderView
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# ABL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "turned"), [(0.8, 0.8), (0.3, -0.3), (0.0, 0.0)])
def test_a_low_loss_is_climbed(loss: float, turned: float) -> None:
    value = torch.tensor(loss, requires_grad=True)
    found = abl.local_ascent(value, 0.5)
    found.backward()
    assert found.item() == pytest.approx(turned)
    assert value.grad is not None and value.grad.item() == (1 if loss > 0.5 else -1)


def test_the_fastest_rows_have_the_lowest_losses(badnets: Case) -> None:
    victim, batch = badnets.view.victim, badnets.view.distilled.batch
    found = abl.fastest_rows(victim, batch, 7)
    losses = [
        functional.cross_entropy(victim(batch.images[row : row + 1]), batch.labels[row : row + 1])
        for row in range(len(batch))
    ]
    wanted = torch.stack(losses).sort().values[:7]
    assert torch.allclose(torch.stack(losses)[found].sort().values, wanted, atol=1e-6)


def test_a_hundredth_of_a_hundred_rows_is_one(badnets: Case) -> None:
    rows = torch.arange(100)
    assert abl.isolated_count(badnets.rows(rows).view, 0.01) == 1
    assert abl.isolated_count(badnets.rows(rows[:30]).view, 0.01) == 1
    defense = abl.Abl(abl.AblOptions())
    assert defense.caution(badnets.rows(rows).view) == "isolates 1 of 100 rows"
    assert defense.caution(badnets.view) is None


# Mixing ------------------------------------------------------------------------------------------


def test_rectangles_have_the_area_that_they_are_asked_for() -> None:
    images = torch.zeros(2, 1, 40, 60)
    whole = 0
    for number in range(200):
        mine = float(torch.rand((), generator=seeded(number)))
        hole = mixing.rectangle(images, mine, seeded(number))
        rows, columns = hole[0, 0].any(dim=1), hole[0, 0].any(dim=0)
        assert hole.sum() == rows.sum() * columns.sum()  # one rectangle
        area, wanted = float(hole.double().mean()), 1 - mine
        assert area <= wanted + 1e-9  # rounded down, cut off at the border
        if not (rows[0] or rows[-1] or columns[0] or columns[-1]):
            assert area >= wanted - 2 * (40 + 60) / (40 * 60)
            whole += 1
    assert whole > 20


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_of_a_beta_distribution(alpha: float) -> None:
    generator = seeded(1)
    draws = [mixing.beta(alpha, generator) for _ in range(800)]
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixed_labels_are_soft_labels() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=seeded(1))
    labels, order = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([4, 2, 0, 1, 3])
    hot = functional.one_hot(labels, 4).double()
    wanted = functional.cross_entropy(logits, 0.3 * hot + 0.7 * hot[order])
    assert torch.allclose(mixing.mixed_loss(logits, labels, order, 0.3), wanted)


def test_cutouts_are_squares_of_the_mean_pixel() -> None:
    images = torch.rand(60, 2, 10, 10, generator=seeded(1)) + 1
    fill = torch.tensor([0.1, 0.2]).view(-1, 1, 1)
    cut = mixing.cutout(images, 0.4, fill, seeded(2))
    holes = (cut != images).any(dim=1)
    sizes = set()
    for image, hole in zip(cut, holes, strict=True):
        rows, columns = hole.any(dim=1), hole.any(dim=0)
        assert hole.sum() == rows.sum() * columns.sum() <= 16
        assert torch.equal(image[:, hole], fill.flatten(1).expand(2, int(hole.sum())))
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert (4, 4) in sizes and len(sizes) > 3


def test_maxup_takes_the_worst_copy(badnets: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one copy the loss is cutout's; with more it is higher."""
    seen: dict[int, list[float]] = {}
    for copies in (1, 6):
        losses: list[float] = []

        def note(optimiser: Any, loss: Tensor, told: list[float] = losses) -> None:
            told.append(loss.item())
            optimiser.step()  # no gradient, so nothing moves

        monkeypatch.setattr(mixing, "follow", note)
        few = badnets.rows(torch.arange(200)).view
        mixing.StrongAugmentation(mixing.StrongAugmentationOptions(copies=copies)).train(few)
        seen[copies] = losses
    assert len(seen[1]) == len(seen[6])
    assert all(six > one for one, six in zip(seen[1], seen[6], strict=True))


# DP-SGD ------------------------------------------------------------------------------------------


def private(cases: Callable[..., Case], rows: int = 60, epochs: int = 3) -> DefenderView:
    case = cases(poisoned=True, norm="instance").rows(torch.arange(rows))
    recipe = replace(case.view.distilled.recipe, epochs=epochs, batch_size=20)
    return case.fresh(distilled=replace(case.view.distilled, recipe=recipe))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in network.parameters()]).detach()


def test_batch_norm_is_refused(badnets: Case) -> None:
    told = dp_sgd.DpSgd(dp_sgd.DpSgdOptions()).objection(badnets.view)
    assert told is not None and told.startswith("batch norm")


def test_without_noise_and_clipping_it_is_sgd(cases: Callable[..., Case]) -> None:
    """On Poisson samples, whose gradients are divided by their expected size."""
    view = private(cases)
    options = dp_sgd.DpSgdOptions(clip=1e6, noise=0)
    found = dp_sgd.DpSgd(options).train(view)
    recipe, batch = view.distilled.recipe, view.distilled.batch
    network, generator = view.network(view.seed(43, 1)), view.generator(43, 0)
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(value) for value in parameters]
    for step in range(9):  # three epochs of three mini-batches
        rate = recipe.lr * (0.1 if step >= 6 else 1)
        rows = torch.nonzero(torch.rand(60, generator=generator) < 1 / 3)[:, 0]
        logits = network(batch.images[rows])
        loss = functional.cross_entropy(logits, batch.labels[rows], reduction="sum") / 20
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for value, speed, slope in zip(parameters, velocity, gradients, strict=True):
                speed.mul_(recipe.momentum).add_(slope + recipe.weight_decay * value)
                value.sub_(rate * speed)
    assert torch.allclose(weights(found), weights(network), atol=1e-4)
    assert dp_sgd.DpSgd(options).figures(view) == {}
    assert dp_sgd.DpSgd(options).caution(view) == "without noise nothing is private"


def test_no_row_moves_it_further_than_the_clip(cases: Callable[..., Case]) -> None:
    view = private(cases, epochs=1)
    recipe = replace(view.distilled.recipe, momentum=0, weight_decay=0, batch_size=60)
    view = replace(view, distilled=replace(view.distilled, recipe=recipe))
    start = weights(view.network(view.seed(43, 1)))
    for clip in (1e-2, 1e-3):
        found = dp_sgd.DpSgd(dp_sgd.DpSgdOptions(clip=clip, noise=0)).train(view)
        moved = float((weights(found) - start).norm())
        assert 0 < moved <= recipe.lr * clip * (1 + 1e-3)  # the mean of clipped gradients


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_epsilon_is_opacus_own_and_falls_with_noise(cases: Callable[..., Case]) -> None:
    from opacus.accountants import RDPAccountant

    view = private(cases)
    told = []
    for noise in (0.8, 1.1, 4.0):
        defense = dp_sgd.DpSgd(dp_sgd.DpSgdOptions(noise=noise))
        told.append(defense.figures(view)["epsilon"])
        accountant = RDPAccountant()
        for _ in range(9):
            accountant.step(noise_multiplier=noise, sample_rate=20 / 60)
        assert told[-1] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    assert told == sorted(told, reverse=True) and all(map(math.isfinite, told))
    caution = defense.caution(view)
    assert caution is not None and "60 received rows" in caution and "does not cover" in caution


def test_training_privately_repeats_and_keeps_the_set(cases: Callable[..., Case]) -> None:
    view = private(cases)
    before = view.distilled.batch.images.clone()
    defense = dp_sgd.DpSgd(dp_sgd.DpSgdOptions())
    assert torch.equal(weights(defense.train(view)), weights(defense.train(view)))
    assert torch.equal(before, view.distilled.batch.images)
    other = replace(view, entropy=12)
    assert not torch.equal(weights(defense.train(view)), weights(defense.train(other)))


def test_recipes_of_steps_are_trained_by_epochs(cases: Callable[..., Case]) -> None:
    """A set with learned steps of its own: whoever trains otherwise goes by its epochs."""
    view = private(cases)
    recipe = replace(view.distilled.recipe, steps=(Step(rows=(0, 1), rate=0.1),))
    stepped = replace(view, distilled=replace(view.distilled, recipe=recipe))
    for defense in (
        mixing.CutMix(mixing.CutMixOptions()),
        dp_sgd.DpSgd(dp_sgd.DpSgdOptions()),
        abl.Abl(abl.AblOptions(unlearning_steps=2)),
    ):
        assert torch.equal(weights(defense.train(stepped)), weights(defense.train(view)))
