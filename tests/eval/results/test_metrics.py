"""Measures against scipy, numpy, brute force and closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kornia.metrics import ssim
from scipy import stats
from torch import Tensor, nn

from distillsec.attacks import TestCase
from distillsec.distill.types import Batch
from distillsec.eval.results.metrics import (
    Summary,
    collect,
    distance,
    effectiveness,
    is_scores,
    kind_of,
    mean_distance,
    over_seeds,
    rates,
    stealth,
    summarise,
)

NOTHING = {"mean": None, "std": None, "ci95": None}


# Summaries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.1, 0.9, 0.4], [0.5, 0.6, 0.55, 0.8, 0.2], [1.0] * 4])
def test_a_summary_is_students_interval(values: list[float]) -> None:
    found = summarise(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    scale = stats.sem(values)
    expected = (
        stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scale)
        if scale
        else (values[0], values[0])
    )
    assert found.ci95 == pytest.approx(expected, rel=1e-12)
    assert found.values == tuple(values)


def test_five_values_by_hand() -> None:
    found = summarise([1, 2, 3, 4, 5])
    half = 2.7764451052 * math.sqrt(2.5) / math.sqrt(5)  # t(0.975, 4)
    assert found.ci95 == pytest.approx((3 - half, 3 + half))


def test_one_value_has_no_deviation() -> None:
    found = summarise([0.25])
    assert (found.mean, found.std, found.ci95) == (0.25, None, None)


def test_two_values_have_no_interval() -> None:
    """Student's interval of 0.55 and 0.75 would reach from -0.62 to 1.92."""
    for kind in ("number", "rate", "share"):
        found = summarise([0.55, 0.75], kind)
        assert found.mean == pytest.approx(0.65) and found.ci95 is None


def test_a_rates_interval_stays_within_0_and_1() -> None:
    values = [0.9, 1.0, 1.0]
    free, cut = summarise(values).ci95, summarise(values, "rate").ci95
    assert free is not None and cut is not None and free[1] > 1
    assert cut == (free[0], 1.0)
    gain = summarise([-0.2, 0.1, -0.1], kind_of("backdoor_gain")).ci95
    assert gain is not None and gain[0] < 0


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 10), (10, 10), (1, 3)])
def test_a_shares_interval_is_wilsons(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    values = [1.0] * hits + [0.0] * (count - hits)
    found = summarise(values, kind_of("control_set_alarm"))
    assert found.ci95 == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("values", [[], [None], [None, None]])
def test_nothing_gives_none_and_never_nan(values: list[float | None]) -> None:
    assert summarise(values).model_dump() == {**NOTHING, "values": tuple(values)}


def test_missing_values_are_kept_but_do_not_count() -> None:
    found = summarise([0.2, None, 0.4])
    assert found.values == (0.2, None, 0.4)
    assert found.model_copy(update={"values": (0.2, 0.4)}) == summarise([0.2, 0.4])
    assert json.loads(found.model_dump_json())["values"] == [0.2, None, 0.4]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(0.3, 0.1, (2000, 5))
    intervals = [summarise(row.tolist()).ci95 for row in draws]
    covered = np.mean([found is not None and found[0] <= 0.3 <= found[1] for found in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)  # 4 standard errors


# Rates -----------------------------------------------------------------------------------------


class Table(nn.Module):
    """Answers image k with the class that stands in its first pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 4).float()


def pictures(answers: list[int]) -> Tensor:
    images = torch.zeros(len(answers), 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(answers).float()
    return images


def case(triggered: list[int], targets: list[int], labels: list[int]) -> TestCase:
    goal, true = torch.tensor(targets), torch.tensor(labels)
    return TestCase(triggered=pictures(triggered), targets=goal, eligible=goal != true)


def test_rates_by_brute_force() -> None:
    generator = np.random.default_rng(1)
    labels, clean, attacked = (generator.integers(0, 4, 200).tolist() for _ in range(3))
    targets = [2] * 200
    found = rates(
        Table(),
        Batch(images=pictures(clean), labels=torch.tensor(labels)),
        case(attacked, targets, labels),
    )
    rows = list(zip(labels, clean, attacked, targets, strict=True))
    eligible = [row for row in rows if row[0] != row[3]]
    assert found == {
        "clean_test_accuracy": sum(c == y for y, c, _, _ in rows) / 200,
        "attack_success_rate": sum(a == t for _, _, a, t in eligible) / len(eligible),
        "attack_success_rate_all": sum(a == t for _, _, a, t in rows) / 200,
        "robust_accuracy": sum(a == y for y, _, a, _ in eligible) / len(eligible),
        "false_trigger_rate": sum(c == t for _, c, _, t in eligible) / len(eligible),
    }
    assert len(set(found.values())) == 5


def test_rates_without_an_attack_and_without_images() -> None:
    batch = Batch(images=pictures([0, 1]), labels=torch.tensor([0, 2]))
    assert rates(Table(), batch, None) == {"clean_test_accuracy": 0.5}
    none = Batch(images=pictures([]), labels=torch.zeros(0, dtype=torch.int64))
    assert rates(Table(), none, None) == {"clean_test_accuracy": None}
    found = rates(Table(), batch, case([0, 2], [0, 2], [0, 2]))
    assert found["attack_success_rate"] is found["robust_accuracy"] is None
    assert found["attack_success_rate_all"] == 1


def test_effectiveness_is_the_published_formula() -> None:
    def both(asr: float | None, cta: float) -> dict[str, float | None]:
        return {"attack_success_rate": asr, "clean_test_accuracy": cta}

    assert effectiveness(both(1.0, 0.9), both(0.0, 0.9)) == 1.0
    assert effectiveness(both(1.0, 0.9), both(1.0, 0.9)) == 0.5
    assert effectiveness(both(1.0, 0.9), both(0.2, 0.8)) == pytest.approx((0.8 - 0.1 + 1) / 2)
    assert effectiveness(both(0.5, 0.8), both(0.7, 0.9)) == 0.5  # neither gain nor loss counts
    assert effectiveness(both(None, 0.8), both(0.7, 0.9)) is None


# Victims and seeds -----------------------------------------------------------------------------


def test_what_is_not_known_is_a_number() -> None:
    """A user's figure may be a loss of 3.4: nothing is cut at 1."""
    assert [kind_of(name) for name in ("final_loss", "epsilon", "control_psnr")] == ["number"] * 3
    assert [kind_of(name) for name in ("control_tpr_at_5", "row_auroc", "auroc")] == ["rate"] * 3


def test_gains_are_paired_by_victim() -> None:
    asr, control = [0.9, 0.5, 0.7, None], [0.1, 0.2, 0.3, 0.4]
    found = collect(
        [{"clean_test_accuracy": 0.8, "attack_success_rate": rate} for rate in asr],
        [{"clean_test_accuracy": 0.6, "attack_success_rate": rate} for rate in control],
    )
    assert set(found) == {
        "clean_test_accuracy",
        "attack_success_rate",
        "control_clean_test_accuracy",
        "control_attack_success_rate",
        "backdoor_gain",
    }
    assert found["attack_success_rate"] == summarise(asr, "rate")
    assert found["control_attack_success_rate"] == summarise(control, "rate")
    assert found["control_clean_test_accuracy"].mean == pytest.approx(0.6)
    assert found["backdoor_gain"] == summarise([0.9 - 0.1, 0.5 - 0.2, 0.7 - 0.3, None])


def test_a_rate_that_only_later_victims_have_is_missing_for_the_others() -> None:
    """A run that an earlier version began and this one finishes."""
    earlier = {"clean_test_accuracy": 0.8}
    later = {"clean_test_accuracy": 0.6, "false_trigger_rate": 0.02}
    for victims in ([earlier, later], [later, earlier]):
        found = collect(victims, victims)
        values = [each.get("false_trigger_rate") for each in victims]
        assert found["false_trigger_rate"] == summarise(values, "rate")
        assert found["control_false_trigger_rate"].mean == 0.02


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("clean_test_accuracy", True),
        ("clean_test_accuracy attack_success_rate attack_success_rate_all robust_accuracy", True),
        (
            "clean_test_accuracy attack_success_rate attack_success_rate_all robust_accuracy "
            "false_trigger_rate",
            True,
        ),
        ("clean_test_accuracy false_trigger_rate", False),
        ("clean_test_accuracy attack_success_rate robust_accuracy", False),
        ("attack_success_rate", False),
    ],
)
def test_scores_of_this_and_earlier_versions_are_known(names: str, known: bool) -> None:
    scores: dict[str, float | None] = dict.fromkeys(names.split(), 0.5)
    assert is_scores(scores) == known
    assert not is_scores({**scores, names.split()[-1]: 1.5})


def test_without_a_control_or_an_attack_there_is_no_gain() -> None:
    scores = [{"clean_test_accuracy": 0.8, "attack_success_rate": 0.5}] * 2
    assert set(collect(scores, None)) == {"clean_test_accuracy", "attack_success_rate"}
    clean = [{"clean_test_accuracy": 0.8}] * 2
    assert set(collect(clean, clean)) == {"clean_test_accuracy", "control_clean_test_accuracy"}


def test_seeds_count_one_each_whatever_their_victims() -> None:
    seeds = [
        {"asr": summarise([0.5, 0.7]), "cta": summarise([0.9])},
        {"asr": summarise([0.1] * 10), "cta": summarise([0.8])},
        {"asr": summarise([None]), "cta": summarise([0.7]), "extra": summarise([1.0])},
    ]
    found = over_seeds(seeds)
    assert set(found) == {"asr", "cta"}
    assert found["asr"].values == pytest.approx((0.6, 0.1, None))
    assert found["asr"].mean == pytest.approx(0.35)
    assert found["cta"] == summarise([0.9, 0.8, 0.7])
    assert isinstance(found["cta"], Summary)
    partial = over_seeds([seeds[2], seeds[0]])
    assert "extra" not in partial


# Stealth ---------------------------------------------------------------------------------------


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_psnr_by_its_formula_and_ssim_by_kornia(images: Tensor) -> None:
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    strength = torch.arange(1, 7).view(-1, 1, 1, 1) / 10
    triggered = images * (1 - strength) + noise * strength
    found = stealth(images, triggered)
    errors = ((images - triggered).double().numpy() ** 2).mean(axis=(1, 2, 3))
    assert found["psnr"] == pytest.approx((10 * np.log10(1 / errors)).mean(), rel=1e-5)
    expected = ssim(images, triggered, 11).mean().item()
    assert found["ssim"] == pytest.approx(expected, abs=1e-5)
    assert 0 < expected < 0.95


def test_identical_images_have_ssim_1_and_no_finite_psnr(images: Tensor) -> None:
    found = stealth(images, images.clone())
    assert found["ssim"] == pytest.approx(1, abs=1e-5)
    assert found["psnr"] is None
    assert stealth(images[:0], images[:0]) == {"psnr": None, "ssim": None}


@pytest.mark.parametrize("side", [3, 8, 11, 28])
def test_small_images_have_a_similarity_too(side: int) -> None:
    images = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    some, more = (images.clone() for _ in range(2))
    some[:, :, :1, :1] += 0.2
    more[:, :, :2, :2] += 0.2
    found: Callable[[Tensor], dict[str, float | None]] = lambda t: dict(stealth(images, t))  # noqa: E731
    assert found(images)["ssim"] == pytest.approx(1, abs=1e-5)
    weak, strong = found(some), found(more)
    assert weak["psnr"] == pytest.approx(10 * math.log10(side**2 / 0.04), rel=1e-5)
    assert strong["ssim"] is not None
    assert weak["ssim"] is not None
    assert strong["ssim"] < weak["ssim"] < 1


# Distances -------------------------------------------------------------------------------------


def test_a_distance_by_numpy(images: Tensor) -> None:
    others = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    apart = (images.double() - others.double()).numpy()
    found = distance(images, others)
    assert found["linf"] == pytest.approx(np.abs(apart).max(), rel=1e-6)
    norms = [np.linalg.norm(image.ravel()) for image in apart]
    assert found["l2"] == pytest.approx(np.mean(norms), rel=1e-6)
    assert found["rms"] == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-6)
    assert distance(images, images) == {"linf": 0, "l2": 0, "rms": 0}


def test_the_mean_of_distances() -> None:
    found = mean_distance([{"linf": 1.0, "rms": 0.5}, {"linf": 2.0, "rms": 0.25}])
    assert found == {"linf": 1.5, "rms": 0.375}
    assert mean_distance([]) is None
