"""Searches for triggers and shadows against the authors' codes, on the same inputs.

The numbers were computed by the code that each test names.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from distillsec.defenses import DEFENSES
from distillsec.defenses.base import DefenderView, Inspector
from distillsec.defenses.common import shadows, trigger_inversion
from distillsec.defenses.common.by_class import anomaly_index, median
from distillsec.defenses.models import mm_bd, mntd, nc_unlearning, neural_cleanse, tabor
from distillsec.distill.types import Batch

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def waves(count: int, speed: float) -> Tensor:
    """Numbers in [0, 1] by a formula: the same whatever the library's generator is."""
    return 0.5 + 0.5 * torch.sin(speed * torch.arange(count, dtype=torch.float64))


# The anomaly index -------------------------------------------------------------------------------


def test_the_index_of_an_even_number_of_norms_is_the_codes() -> None:
    """bolunwang/backdoor (e857774), ``mad_outlier_detection.py``, ``outlier_detection``."""
    norms = torch.tensor([107.0, 105, 102, 86, 100, 110, 80, 93, 71, 81])
    found = anomaly_index(-norms)
    assert int(found.argmax()) == 8 and float(found.max()) == pytest.approx(1.638, abs=5e-4)


def index_of_least(norms: Tensor) -> Tensor:
    """The anomaly index of the least of each column of ``norms`` (classes, N)."""
    centre = median(norms)
    return (centre - norms.amin(dim=0)) / (1.4826 * median((norms - centre).abs()))


@pytest.mark.parametrize(("classes", "share"), [(3, 0.23), (4, 0.21), (10, 0.33), (43, 0.64)])
def test_many_clean_models_exceed_two_by_chance(classes: int, share: float) -> None:
    """100,000 draws: a standard error below 0.002."""
    norms = 60 + 10 * torch.randn(classes, 100_000, generator=seeded(1))
    found = index_of_least(norms)
    flagged = float((found > 2).double().mean())
    assert flagged == pytest.approx(share, abs=0.01)
    assert flagged == pytest.approx(neural_cleanse.chance_of_alarm(classes), abs=0.006)
    alone = [float(anomaly_index(-norms[:, column]).max()) for column in range(50)]
    assert torch.allclose(torch.tensor(alone), found[:50], rtol=1e-4)


def test_of_two_classes_the_index_is_always_the_same() -> None:
    norms = 60 + 10 * torch.randn(2, 1000, generator=seeded(1), dtype=torch.float64)
    assert index_of_least(norms).tolist() == pytest.approx([1 / 1.4826] * 1000, rel=1e-9)


def of_classes(case: Case, count: int) -> DefenderView:
    """A view with the first ``count`` classes."""
    distilled = case.view.distilled
    batch = distilled.batch.rows(torch.nonzero(case.view.labels < count)[:, 0])
    return case.fresh(distilled=replace(distilled, batch=batch, classes=distilled.classes[:count]))


@pytest.mark.parametrize(
    ("name", "least"), [("neural-cleanse", 3), ("tabor", 3), ("nc-unlearning", 3), ("mm-bd", 5)]
)
def test_few_classes_are_not_applicable(name: str, least: int, badnets: Case) -> None:
    defense = DEFENSES[name](DEFENSES[name].Options())
    for count in (2, 3, 4, 5, 10):
        wanted = None if count >= least else f"needs {least} classes, there are {count}"
        assert defense.not_applicable_because(of_classes(badnets, count)) == wanted


@pytest.mark.parametrize("name", ["neural-cleanse", "tabor", "nc-unlearning"])
def test_a_caution_says_how_many_clean_models_are_flagged(name: str, badnets: Case) -> None:
    kind = DEFENSES[name]
    expected = "with 10 classes 33% of clean models exceed 2 by chance"
    assert kind(kind.Options()).caution(badnets.view) == expected
    another: dict[str, Any] = {"threshold": 3.0}
    assert kind(kind.Options(**another)).caution(badnets.view) is None
    assert "21%" in str(kind(kind.Options()).caution(of_classes(badnets, 4)))


# Neural Cleanse ----------------------------------------------------------------------------------

Runs = list[tuple[float, int]]


def steady(number: int) -> tuple[float, float]:
    return 1.0, max(40 - 0.5 * number, 4.0)


def up_and_down(number: int) -> tuple[float, float]:
    return 1.0 if number % 15 < 9 else 0.9, 50 - 0.1 * number if number < 200 else 30.0


def never(number: int) -> tuple[float, float]:
    return 0.5, 10.0


def late(number: int) -> tuple[float, float]:
    success = 0.5 if number < 12 else (1.0 if number // 7 % 2 else 0.98)
    return success, 30.0 - (number * 7) % 11


def slow(number: int) -> tuple[float, float]:
    return 1.0 if number % 12 < 6 else 0.5, 60 * 0.997**number


@pytest.mark.parametrize(
    ("script", "most", "passes", "begins", "ends"),
    [
        (steady, 60, 60, [(0, 5), (0.001, 4), (0.002, 5), (0.004, 5), (0.008, 5)], 2.048),
        (
            up_and_down,
            300,
            226,
            [(0, 5), (0.001, 4), (0.002, 5), (0.0007071067811865475, 6)],
            5.5242717280199024e-06,
        ),
        (never, 40, 40, [(0, 40)], 0),
        (
            late,
            200,
            51,
            [(0, 26), (0.001, 7), (0.00035355339059327376, 7), (0.0007071067811865475, 7)],
            0.00025,
        ),
        (
            slow,
            1000,
            1000,
            [(0, 5), (0.001, 6), (0.00035355339059327376, 6), (0.0007071067811865475, 6)],
            1.6077746776921856e-16,
        ),
    ],
)
def test_weights_and_the_last_pass_are_the_codes(
    script: Any, most: int, passes: int, begins: Runs, ends: float
) -> None:
    """bolunwang/backdoor (e857774), ``visualizer.py``, ``Visualizer.visualize`` with the settings
    of ``gtsrb_visualize_example.py``, its training step replaced by the scripted numbers."""
    options = trigger_inversion.InversionOptions()
    search = trigger_inversion._PenaltySchedule(1, options, torch.device("cpu"))
    costs, best = [], math.inf
    for number in range(most):
        if not search.active[0]:
            break
        costs.append(float(search.costs[0]))
        success, size = script(number)
        best = min(best, size) if success >= 0.99 else best
        search.update(
            torch.tensor([0]), torch.tensor([success]), torch.tensor([best], dtype=torch.float64)
        )
    runs: list[list[float]] = []
    for cost in costs:
        if runs and runs[-1][0] == cost:
            runs[-1][1] += 1
        else:
            runs.append([cost, 1])
    assert len(costs) == passes
    assert [(cost, count) for cost, count in runs[: len(begins)]] == begins
    assert costs[-1] == ends


def test_an_early_stop_can_be_turned_off() -> None:
    options = trigger_inversion.InversionOptions(early_stop=False)
    search = trigger_inversion._PenaltySchedule(1, options, torch.device("cpu"))
    for number in range(300):
        success, _ = up_and_down(number)
        search.update(torch.tensor([0]), torch.tensor([success]), torch.tensor([1.0]))
    assert bool(search.active[0])


class Counting(nn.Module):
    """Sends everything to class 0, and remembers how many images it saw at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return images.mean(dim=(1, 2, 3))[:, None] * torch.tensor([1.0, 0.5])


def test_a_pass_is_31_mini_batches_of_an_endless_stream() -> None:
    """1,000 // 32, whatever there is: a hundred images come ten times in two passes."""
    network = Counting()
    known = Batch(images=torch.rand(100, 1, 4, 4), labels=torch.zeros(100, dtype=torch.int64))
    options = trigger_inversion.InversionOptions(steps=2)
    trigger_inversion.invert_triggers(network, known, 2, options, seeded())
    rounds = [32, 32, 32, 4] * 16
    assert network.seen == [2 * count for count in rounds[:62]]


def test_masks_start_as_in_the_code() -> None:
    """Its ``reset_state``: arctanh((mask − 0.5) · (2 − 1e-7)), which 0 and 1 survive."""
    values = torch.tensor([0.0, 0.3, 1.0])
    free = trigger_inversion.unbounded(values, torch.device("cpu"))
    wanted = np.arctanh((np.array([0.0, 0.3, 1.0]) - 0.5) * (2 - 1e-7))
    assert np.allclose(free.detach().numpy(), wanted, rtol=1e-5)


def test_a_fifth_is_stamped_once_for_each_flagged_class() -> None:
    images = torch.rand(20, 1, 4, 4, generator=seeded())
    clean = Batch(images=images, labels=torch.arange(20))
    masks = torch.ones(3, 1, 4, 4)
    patterns = torch.tensor([0.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    patches = trigger_inversion.Patches(masks, patterns, torch.ones(3).bool(), torch.ones(3))
    stamped = nc_unlearning.partly_stamped(clean, patches, [1, 2], 0.2, seeded(1))
    assert len(stamped) == 16 + 4 + 4
    assert bool((stamped.images[16:20] == 2).all()) and bool((stamped.images[20:] == 3).all())
    assert torch.equal(stamped.images[:16], images[stamped.labels[:16]])
    assert torch.equal(stamped.labels[16:20], stamped.labels[20:])
    assert sorted(stamped.labels[:20].tolist()) == list(range(20))


# TABOR -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "wanted"),
    [
        ("size", 21.67114740395703),
        ("outside", 29.710882078433457),
        ("scattered", 3.1102496494496403),
        ("scattered_outside", 16.94453802245831),
        ("blocking", 1.3879311668608845),
        ("overlaying", 1.4908019916822544),
    ],
)
def test_each_penalty_is_the_public_codes(term: str, wanted: float) -> None:
    """ain-soph/trojanzoo (45d680c), ``Tabor.regularization_loss`` with one weight 1 at a time."""
    numbers = torch.arange(75, dtype=torch.float64)
    last = nn.Linear(75, 4).double()
    with torch.no_grad():
        weight = 0.3 * torch.sin(torch.arange(300, dtype=torch.float64))
        last.weight.copy_(weight.view(4, 75))
        last.bias.zero_()
    draft = trigger_inversion.Candidates(
        nn.Sequential(nn.Flatten(), last),
        torch.tensor([2]),
        waves(25, 1.3).view(1, 1, 5, 5),
        (0.5 + 0.5 * torch.cos(0.7 * numbers)).view(1, 3, 5, 5),
        waves(300, 2.1).view(4, 3, 5, 5),
        torch.tensor([0, 1, 2, 3]),
    )
    names = ("size", "outside", "scattered", "scattered_outside", "blocking", "overlaying")
    options = tabor.TaborOptions(**{name: float(name == term) for name in names})
    assert tabor.penalties(draft, options).tolist() == pytest.approx([wanted], rel=1e-9)


def test_the_weights_are_the_public_codes() -> None:
    options = tabor.TaborOptions()
    weights = (options.size, options.outside, options.scattered, options.scattered_outside)
    assert weights == (1e-6, 1e-5, 1e-7, 1e-8)
    assert (options.blocking, options.overlaying, options.cost) == (0, 1e-2, 1)


# MM-BD -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margins", "p_value"),
    [
        ([-0.18108, -0.56564, -0.23061, 0.27542, -0.24898, -0.28623], 0.00045543),
        (
            [
                -0.17687,
                -0.50563,
                -0.22262,
                0.05763,
                -0.31436,
                -0.41864,
                -0.04757,
                0.10904,
                -0.30061,
                -0.11959,
            ],
            0.209786,
        ),
    ],
)
def test_margins_and_the_p_value_are_the_codes(margins: list[float], p_value: float) -> None:
    """wanghangpsu/MM-BD (903338d), ``univ_bd.py``, on this network from these starts."""
    classes, count = len(margins), 5
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, classes)
    )
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            place = torch.arange(parameter.numel(), dtype=torch.float64)
            scale = 0.5 if number < 2 else 0.25
            parameter.copy_((torch.sin(1.7 * place + number) * scale).view_as(parameter))
    network.requires_grad_(False)
    place = torch.arange(classes * count * 16, dtype=torch.float64)
    starts = (0.5 + 0.5 * torch.sin(2.3 * place * place)).float().view(classes, count, 1, 4, 4)
    options = mm_bd.MmBdOptions()
    found = mm_bd.largest_margins(network, starts, options.steps, options.lr)
    # A class may stop a step earlier or later: its sum then changes by a hundred-thousandth.
    assert found.tolist() == pytest.approx(margins, abs=1e-4)
    assert mm_bd.p_value_of_largest(found) == pytest.approx(p_value, rel=5e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gamma_of_four_margins_flags_half_of_the_clean_models() -> None:
    """50 draws: a standard error of 0.07."""
    margins = np.random.default_rng(3).normal(10, 2, (50, 5))
    found = [mm_bd.p_value_of_largest(row) for row in torch.from_numpy(margins)]
    share = float(np.mean(np.array(found) < 0.05))
    assert share == pytest.approx(mm_bd.chance_of_alarm(5), abs=0.17)


def test_few_classes_cause_a_caution(badnets: Case) -> None:
    defense = mm_bd.MmBd(mm_bd.MmBdOptions())
    expected = "a gamma fitted to 9 margins flags 17% of clean models"
    assert defense.caution(badnets.view) == expected


# MNTD --------------------------------------------------------------------------------------------


def made_mntd(**options: Any) -> mntd.Mntd:
    return mntd.Mntd(mntd.MntdOptions(**{**mntd.Mntd.quick, **options}))


def test_fewer_shadows_than_published_are_not_applicable(
    badnets: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mntd, "train_zoo", lambda *_, **__: pytest.fail("it trains"))
    expected = "not measured at this budget: 8 pairs of shadows, the published number is 2304"
    assert made_mntd().not_applicable_because(badnets.view) == expected
    assert "2303 pairs" in str(made_mntd(pairs=2303).not_applicable_because(badnets.view))
    assert made_mntd(pairs=2304).not_applicable_because(badnets.view) is None
    assert mntd.Mntd(mntd.MntdOptions()).not_applicable_because(badnets.view) is None


def test_a_zoo_of_any_size_is_used_with_its_number_of_pairs(honest: Case, tmp_path: Path) -> None:
    view = honest.view
    options = shadows.ShadowOptions(pairs=2, epochs=1, batch=50)
    file = tmp_path / "zoo.safetensors"
    maker, recipe = view.network, view.distilled.recipe
    shadows.train_zoo(maker, view.holdout, recipe, options, seeded).save(file)
    defense = made_mntd(zoo=str(file), epochs=3)
    assert isinstance(defense, Inspector) and defense.not_applicable_because(view) is None
    expected = "a zoo of 2 pairs of shadows, the published number is 2304"
    assert defense.caution(view) == expected
    found = defense.inspect(view)
    assert math.isfinite(found.statistic) and found.alarm == (found.statistic > 0)
    assert made_mntd(zoo=str(file), epochs=3).inspect(view).statistic == found.statistic


def test_shadows_are_trained_by_adam_without_augmentation(honest: Case) -> None:
    """Its first step moves every weight that has a gradient by the learning rate."""
    view = honest.view
    options = shadows.ShadowOptions(pairs=2, epochs=1, batch=len(view.holdout))
    assert (options.lr, options.optimiser) == (1e-3, "adam")
    zoo = shadows.train_zoo(view.network, view.holdout, view.distilled.recipe, options, seeded)
    first = view.network(int(torch.randint(2**31 - 1, (), generator=seeded())))
    for name, before in first.named_parameters():
        moved = (zoo.states[name][0] - before).detach().abs()
        moved = moved[moved > 2e-4]
        assert len(moved) == 0 or bool((moved <= 1.001e-3).all())
        if name.endswith("head.weight"):
            assert len(moved) > 0.9 * before.numel()


def test_squares_end_before_the_last_row_and_column() -> None:
    """AI-secure/Meta-Nerual-Trojan-Detection (e773f1a), ``random_troj_setting``: the corner is
    below the image's side less the square's."""
    ends: list[int] = []
    for number in range(300):
        mask, _ = shadows.random_trigger((1, 9, 9), seeded(number))
        if not bool((mask > 0).all()):
            rows, columns = (torch.nonzero(mask[0].any(dim=side))[:, 0] for side in (1, 0))
            ends += [int(rows.max()), int(columns.max())]
    assert max(ends) == 7


def test_grey_patterns_have_any_number_of_white_pixels() -> None:
    """Of s² pixels 1 to s² − 1, all as likely: shares of a mean of a half, never none nor all."""
    shares = []
    for number in range(400):
        mask, pattern = shadows.random_trigger((1, 9, 9), seeded(number))
        inside = pattern[mask > 0]
        shares.append(float(inside.mean()))
        assert 1 <= inside.sum() <= len(inside) - 1
    assert float(np.mean(shares)) == pytest.approx(0.5, abs=0.04)  # a standard error of 0.012
    assert min(shares) < 0.1 and max(shares) > 0.9


def test_coloured_patterns_are_clipped_noise() -> None:
    """Uniform from −ε to 1 + ε with ε uniform: 1 − ln 3 / 2 of the values are 0 or 1."""
    clipped = []
    for number in range(400):
        mask, pattern = shadows.random_trigger((3, 9, 9), seeded(number))
        inside = pattern[:, mask[0] > 0]
        clipped.append(float(((inside == 0) | (inside == 1)).double().mean()))
    assert float(np.mean(clipped)) == pytest.approx(1 - math.log(3) / 2, abs=0.04)


def test_an_auroc_is_the_usual_one() -> None:
    scores = torch.tensor([0.3, 0.1, 0.3, 0.9, -2.0, 0.4])
    positive = torch.tensor([True, False, False, True, False, True])
    wanted = roc_auc_score(positive.numpy(), scores.numpy())
    assert mntd.auroc(scores, positive) == pytest.approx(wanted, abs=1e-12)
    assert mntd.auroc(scores[:1], positive[:1]) == 0.5


def test_the_last_ninth_of_the_pairs_chooses_the_epoch(honest: Case) -> None:
    """Clearly different shadows are separated after one epoch; later epochs are no better."""
    view = honest.view
    states: dict[str, list[Tensor]] = {}
    for number in range(18):
        for name, value in view.network(number).state_dict().items():
            raised = value.clone()
            if number % 2 and name.endswith("head.bias"):
                raised[0] += 30
            states.setdefault(name, []).append(raised)
    stacked = {name: torch.stack(values) for name, values in states.items()}
    zoo = shadows.Zoo(stacked, torch.arange(18) % 2 == 1, {})
    network = view.network(0).eval()

    def learned(epochs: int, zoo: shadows.Zoo = zoo) -> dict[str, Tensor]:
        options = mntd.MntdOptions(epochs=epochs, batch=1, lr=0.01)
        return mntd.train_meta_classifier(zoo, network, view, options).state_dict()

    once = learned(1)
    assert all(torch.equal(value, once[name]) for name, value in learned(4).items())
    # The pair that chooses doesn't teach; without one the last epoch counts.
    swapped = zoo.backdoored.clone()
    swapped[16:] = ~swapped[16:]
    other = learned(1, shadows.Zoo(stacked, swapped, {}))
    assert all(torch.equal(value, once[name]) for name, value in other.items())
    few = shadows.Zoo({n: v[:16] for n, v in stacked.items()}, zoo.backdoored[:16], {})
    assert not torch.equal(learned(4, few)["queries"], learned(1, few)["queries"])
