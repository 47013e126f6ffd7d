"""What defenses that train compute: isolation, mixing, private steps, against closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from distillsec.defenses.common import mixing, sgd
from distillsec.defenses.training import (
    abl,
    cutmix,
    dp_sgd,
    partition_ensemble,
    strong_augmentation,
)
from distillsec.distill.types import Batch, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from distillsec.defenses.base import DefenderView, Trainer
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# ABL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "turned"), [(0.8, 0.8), (0.3, -0.3), (0.0, 0.0)])
def test_a_low_loss_is_increased(loss: float, turned: float) -> None:
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


def test_one_percent_of_the_rows_must_be_two_and_should_be_ten(badnets: Case) -> None:
    """Rounded down, as in the authors' code: of 99 rows none."""
    defense = abl.Abl(abl.AblOptions())
    for count, isolated in ((99, 0), (100, 1), (199, 1), (200, 2), (999, 9), (1000, 10)):
        view = badnets.rows(torch.arange(count)).view
        assert abl.isolated_count(view, 0.01) == isolated
        assert defense.not_applicable_because(view) == (
            None if isolated >= 2 else f"isolates {isolated} of {count} rows, needs 2"
        )
        caution = f"isolates {isolated} of {count} rows"
        assert defense.caution(view) == (None if isolated >= 10 else caution)


# The authors' code (bboylyg/ABL at 3fd736c) on these weights and rows gave the numbers below.
ROWS = Batch(
    images=torch.tensor(
        [[(7 * i + 3 * j) % 5 / 4 for j in range(4)] for i in range(8)], dtype=torch.float64
    ),
    labels=torch.arange(8) % 3,
)


def linear(scale: float = 1.0) -> nn.Linear:
    network = nn.Linear(4, 5).double()
    values = [[((3 * i + 5 * j) % 7 - 3) / 3 for j in range(4)] for i in range(5)]
    with torch.no_grad():
        network.weight.copy_(scale * torch.tensor(values, dtype=torch.float64))
        network.bias.zero_()
    return network


def test_rows_are_isolated_in_the_order_of_the_authors_code() -> None:
    """backdoor_isolation.py, compute_loss_value."""
    found = abl.fastest_rows(linear(), ROWS, 8)
    assert found.tolist() == [4, 1, 3, 2, 0, 7, 5, 6]
    assert abl.fastest_rows(linear(), ROWS, 2).tolist() == [4, 1]


@pytest.mark.parametrize(
    ("labels", "loss", "moved"),
    [
        (
            [0, 1, 2, 0, 1, 2, 0, 1],
            3.5198282621826644,
            [0.007926672751931818, 0.015880010506408748, 0.01576350541299607, 0.01518232984850965],
        ),
        (
            [4, 1, 4, 0, 1, 4, 1, 4],
            0.18649492884933105,
            [-0.00167667275193129, -0.00650501050640839, -0.00326350541299607, 0.0004426701514904],
        ),
    ],
)
def test_local_ascent_steps_as_the_authors_code_and_its_flooding_do(
    labels: list[int], loss: float, moved: list[float]
) -> None:
    """backdoor_isolation.py, train_step: both kinds gave these; the low loss is climbed."""
    network = linear(4.0)
    before = network.weight.detach().clone()
    value = functional.cross_entropy(network(ROWS.images), torch.tensor(labels))
    assert value.item() == pytest.approx(loss, abs=1e-12)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    optimiser.zero_grad()
    abl.local_ascent(value, 0.5).backward()
    optimiser.step()
    assert (network.weight - before)[0].tolist() == pytest.approx(moved, abs=1e-12)


def test_unlearning_is_that_of_the_authors_code() -> None:
    """backdoor_unlearning.py, train_step_unlearning, three times, with its optimiser."""
    network = linear()
    optimiser = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    sgd.set_rate(optimiser, abl.AblOptions().unlearning_rate)
    abl.unlearn(network, optimiser, ROWS, iter([torch.arange(8)] * 3))
    assert network.weight[0].tolist() == pytest.approx(
        [-1.0002338359138219, 0.6660838246567177, -0.0005489881632983, -0.6670647338924953],
        abs=1e-12,
    )
    assert network.bias.tolist() == pytest.approx(
        [
            -0.0010447386573412649,
            -0.0005197850171434809,
            -0.00033206372800975313,
            0.0005248050587520323,
            0.0013717823437424668,
        ],
        abs=1e-12,
    )


def test_the_papers_sum_lowers_one_loss_and_raises_the_other_to_a_guess() -> None:
    rest, isolated = ROWS.rows(torch.arange(5)), ROWS.rows(torch.arange(5, 8))
    network, bound = linear(), 2.2  # of the isolated rows' losses one is below, two are above
    losses = functional.cross_entropy(network(isolated.images), isolated.labels, reduction="none")
    below = losses < bound
    assert below.tolist() == [False, False, True]
    kept = functional.cross_entropy(network(rest.images), rest.labels)
    wanted = torch.autograd.grad(kept - losses[below].sum() / 3, list(network.parameters()))
    before = [value.detach().clone() for value in network.parameters()]
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
    abl.unlearn_and_keep(network, optimiser, rest, isolated, iter([torch.arange(5)]), bound)
    for value, old, slope in zip(network.parameters(), before, wanted, strict=True):
        assert torch.allclose(value, old - slope, atol=1e-12)


@pytest.mark.parametrize(("epochs", "tuning", "finetuning"), [(2, 20, 60), (300, 60, 180)])
def test_epochs_are_the_papers_or_more_for_longer_recipes(
    badnets: Case, epochs: int, tuning: int, finetuning: int
) -> None:
    recipe = replace(badnets.view.distilled.recipe, epochs=epochs)
    assert (abl.epochs(20, recipe), abl.epochs(60, recipe)) == (tuning, finetuning)
    assert abl.finetuning_rates(0.1, 60) == [0.1] * 40 + [0.01] * 20


def test_settings_that_differ_in_unlearning_share_the_training(badnets: Case) -> None:
    """And do not change it: the second answer is the first one's."""
    view = badnets.rows(torch.arange(200)).view
    options = {"tuning_epochs": 2, "finetuning_epochs": 2}
    few, many = (abl.AblOptions(**options, unlearning_steps=count) for count in (3, 30))
    first = weights(abl.Abl(few).train(view))
    assert not torch.equal(first, weights(abl.Abl(many).train(view)))
    assert torch.equal(first, weights(abl.Abl(few).train(view)))


# Mixing ------------------------------------------------------------------------------------------


def test_rectangles_have_the_requested_area() -> None:
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


@pytest.mark.parametrize(
    ("size", "share", "middle", "box"),
    [
        # rand_bbox of clovaai/CutMix-PyTorch at 2d8eb68, shares 1 - 0.3, 1 - 0.75, ...
        ((32, 32), 0.7, (5, 30), (0, 17, 18, 32)),
        ((28, 28), 0.25, (14, 0), (7, 0, 21, 7)),
        ((8, 10), 0.5, (7, 4), (5, 1, 8, 7)),
        ((32, 32), 1.0, (16, 16), (0, 0, 32, 32)),
        ((33, 33), 1 - 0.9, (10, 20), (5, 15, 15, 25)),
        ((32, 32), 0.0, (3, 3), (3, 3, 3, 3)),
        # Cutout of JonasGeiping/data-poisoning at 88d929c, forest/data/mixing_data_augmentations.py
        ((32, 32), 0.34, (10, 31), (1, 22, 19, 32)),
        ((28, 28), 0.34, (14, 0), (6, 0, 22, 8)),
        ((8, 8), 0.34, (4, 4), (2, 2, 6, 6)),
        ((33, 33), 0.34, (16, 16), (7, 7, 25, 25)),
    ],
)
def test_rectangles_are_where_the_authors_code_puts_them(
    size: tuple[int, int], share: float, middle: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    found = [
        mixing.span(length, place, math.sqrt(share))
        for length, place in zip(size, middle, strict=True)
    ]
    assert (found[0].start, found[1].start, found[0].stop, found[1].stop) == box


def test_the_default_hole_is_the_authors() -> None:
    assert strong_augmentation.StrongAugmentationOptions().hole == pytest.approx(1 - 0.66)


def test_maxup_starts_after_the_warmup(badnets: Case) -> None:
    """6 of the authors' 40 epochs; here of 12 the first 2, of which each has 4 mini-batches."""
    view = badnets.rows(torch.arange(200)).view
    assert view.distilled.recipe.epochs == 12 and view.distilled.recipe.batch_size == 64
    assert (
        strong_augmentation.warmup_steps(
            view, strong_augmentation.StrongAugmentationOptions().warmup
        )
        == 2 * 4
    )
    recipe = replace(view.distilled.recipe, epochs=40)
    forty = replace(view, distilled=replace(view.distilled, recipe=recipe))
    assert (
        strong_augmentation.warmup_steps(
            forty, strong_augmentation.StrongAugmentationOptions().warmup
        )
        == 6 * 4
    )


def test_maxup_takes_the_worst_copy(badnets: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one copy the loss is cutout's; with more it is higher."""
    seen: dict[int, list[float]] = {}
    for copies in (1, 6):
        losses: list[float] = []

        def note(optimiser: Any, loss: Tensor, noted: list[float] = losses) -> None:
            noted.append(loss.item())
            optimiser.step()  # no gradient, so nothing changes

        monkeypatch.setattr(strong_augmentation, "backward_step", note)
        few = badnets.rows(torch.arange(200)).view
        strong_augmentation.StrongAugmentation(
            strong_augmentation.StrongAugmentationOptions(copies=copies)
        ).train(few)
        seen[copies] = losses
    assert len(seen[1]) == len(seen[6]) == 12 * 4
    assert all(six > one for one, six in zip(seen[1][8:], seen[6][8:], strict=True))


# DP-SGD ------------------------------------------------------------------------------------------


def private(cases: Callable[..., Case], rows: int = 60, epochs: int = 3) -> DefenderView:
    case = cases(poisoned=True, norm="instance").rows(torch.arange(rows))
    recipe = replace(case.view.distilled.recipe, epochs=epochs, batch_size=20)
    return case.fresh(distilled=replace(case.view.distilled, recipe=recipe))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in network.parameters()]).detach()


def test_batch_norm_is_refused(badnets: Case) -> None:
    reason = dp_sgd.DpSgd(dp_sgd.DpSgdOptions()).not_applicable_because(badnets.view)
    assert reason is not None and reason.startswith("batch norm")


def test_without_noise_and_clipping_it_is_sgd(cases: Callable[..., Case]) -> None:
    """On Poisson samples, whose gradients are divided by their expected size."""
    view = private(cases)
    options = dp_sgd.DpSgdOptions(clip=1e6, noise=0)
    found = dp_sgd.DpSgd(options).train(view)
    recipe, batch = view.distilled.recipe, view.distilled.batch
    network, generator = view.network(view.seed("dp-sgd", "weights")), view.generator("dp-sgd")
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
    assert dp_sgd.DpSgd(options).caution(view) == "without noise there is no privacy"


def test_no_row_changes_the_network_by_more_than_the_clip(cases: Callable[..., Case]) -> None:
    view = private(cases, epochs=1)
    recipe = replace(view.distilled.recipe, momentum=0, weight_decay=0, batch_size=60)
    view = replace(view, distilled=replace(view.distilled, recipe=recipe))
    start = weights(view.network(view.seed("dp-sgd", "weights")))
    for clip in (1e-2, 1e-3):
        found = dp_sgd.DpSgd(dp_sgd.DpSgdOptions(clip=clip, noise=0)).train(view)
        moved = float((weights(found) - start).norm())
        assert 0 < moved <= recipe.lr * clip * (1 + 1e-3)  # the mean of clipped gradients


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_epsilon_is_that_of_opacus_and_falls_with_noise(cases: Callable[..., Case]) -> None:
    from opacus.accountants import RDPAccountant

    view = private(cases)
    epsilons = []
    for noise in (0.1, 0.8, 1.28, 4.0):
        defense = dp_sgd.DpSgd(dp_sgd.DpSgdOptions(noise=noise))
        epsilons.append(defense.figures(view)["epsilon"])
        accountant = RDPAccountant()
        for _ in range(9):
            accountant.step(noise_multiplier=noise, sample_rate=20 / 60)
        assert epsilons[-1] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    assert epsilons == sorted(epsilons, reverse=True) and all(map(math.isfinite, epsilons))
    caution = defense.caution(view)
    assert caution is not None and "60 received rows" in caution and "does not cover" in caution


def test_private_training_repeats_and_keeps_the_set(cases: Callable[..., Case]) -> None:
    view = private(cases)
    before = view.distilled.batch.images.clone()
    defense = dp_sgd.DpSgd(dp_sgd.DpSgdOptions())
    assert torch.equal(weights(defense.train(view)), weights(defense.train(view)))
    assert torch.equal(before, view.distilled.batch.images)
    other = replace(view, entropy=12)
    assert not torch.equal(weights(defense.train(view)), weights(defense.train(other)))


def test_recipes_of_steps_are_trained_by_epochs(cases: Callable[..., Case]) -> None:
    """A set with learned steps of its own: these defenses train by its epochs."""
    view = private(cases, rows=200)
    recipe = replace(view.distilled.recipe, steps=(Step(rows=(0, 1), rate=0.1),))
    stepped = replace(view, distilled=replace(view.distilled, recipe=recipe))
    for defense in (
        cutmix.CutMix(cutmix.CutMixOptions()),
        dp_sgd.DpSgd(dp_sgd.DpSgdOptions()),
        abl.Abl(abl.AblOptions(tuning_epochs=1, finetuning_epochs=1, unlearning_steps=2)),
    ):
        assert torch.equal(weights(defense.train(stepped)), weights(defense.train(view)))


# Every grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        abl.Abl,
        cutmix.CutMix,
        strong_augmentation.StrongAugmentation,
        dp_sgd.DpSgd,
        partition_ensemble.PartitionEnsemble,
    ],
)
def test_a_grid_has_valid_settings_and_the_published_one(kind: type[Trainer]) -> None:
    settings = [kind.Options(**changes) for changes in kind.grid]
    assert 3 <= len(settings) <= 6 and kind.Options() in settings
    assert all(one != two for one, two in itertools.combinations(settings, 2))
