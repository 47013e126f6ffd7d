"""The classic case, for defenses of the model and of its training; see ``test_classic``.

With ten classes and networks of 16 channels many defenses find or repair little; the tests record
that too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from distillsec.defenses import DEFENSES
from distillsec.defenses.base import Inspection, Repairer, Trainer
from distillsec.defenses.common import shadows
from distillsec.defenses.models import mntd
from distillsec.distill.training import predict

if TYPE_CHECKING:
    from tests.defenses.conftest import Case

TARGET = 3
Cases = Callable[..., Any]
WIDE = {"width": 64, "depth": 3, "epochs": 40}


def made(name: str, **options: Any) -> Any:
    kind = DEFENSES[name]
    return kind(kind.Options(**{**kind.quick, **options}))


def seen(name: str, case: Case, **options: Any) -> Inspection:
    defense = made(name, **options)
    assert defense.not_applicable_because(case.view) is None
    found = defense.inspect(case.view)
    assert isinstance(found, Inspection)
    return found


def rates(network: nn.Module, case: Case) -> tuple[float, float]:
    """ASR and CTA of the case's test images."""
    asr = (predict(network, case.triggered) == TARGET).double().mean()
    right = (predict(network, case.clean.images) == case.clean.labels).double().mean()
    return float(asr), float(right)


def left(name: str, case: Case, **options: Any) -> tuple[float, float]:
    """ASR and CTA of the defense's model."""
    defense = made(name, **options)
    assert defense.not_applicable_because(case.view) is None
    if isinstance(defense, Repairer):
        return rates(defense.repair(case.view), case)
    assert isinstance(defense, Trainer)
    return rates(defense.train(case.view), case)


# Inspection --------------------------------------------------------------------------------------


def lead(found: Inspection) -> float:
    """The largest anomaly over the second largest; the target has it."""
    assert found.suspect == TARGET and found.anomaly is not None
    order = found.anomaly.sort(descending=True).values
    return float(order[0] / order[1])


def test_mm_bd_names_the_target(badnets: Case) -> None:
    assert lead(seen("mm-bd", badnets)) > 1.1


@pytest.mark.parametrize("name", ["neural-cleanse", "tabor"])
def test_the_poisoned_model_is_flagged_and_the_clean_one_is_not(
    name: str, badnets: Case, honest: Case
) -> None:
    found, clean = seen(name, badnets), seen(name, honest)
    assert lead(found) > 1.2 and found.alarm
    assert not clean.alarm and found.statistic > 2 * clean.statistic


@pytest.mark.slow
def test_abs_finds_no_neuron_in_a_narrow_network(badnets: Case, honest: Case) -> None:
    for case in (badnets, honest):
        found = seen("abs", case)
        assert not found.alarm and found.statistic <= 0.1


@pytest.mark.slow
def test_abs_finds_the_neuron_in_a_wide_network(cases: Cases) -> None:
    """The patch is a seventh of an 8×8 image: the search must allow that size."""
    found = seen("abs", cases(poisoned=True, **WIDE), size=0.15)
    clean = seen("abs", cases(poisoned=False, **WIDE), size=0.15)
    assert found.statistic > clean.statistic


def test_bti_dbf_names_a_class_and_raises_no_alarm(badnets: Case, honest: Case) -> None:
    for case in (badnets, honest):
        found = seen("bti-dbf", case, mask_steps=10, copy_steps=10, steps=10)
        assert found.alarm is None and found.suspect is not None and found.anomaly is not None
        assert float(found.anomaly.sum()) == pytest.approx(1)


@pytest.mark.slow
def test_mntd_classifies_networks_like_its_shadows(honest: Case) -> None:
    """32 pairs of shadows instead of 2,304, tested on 8 other pairs."""
    view = honest.view
    options = shadows.ShadowOptions(pairs=40, epochs=40, batch=32)
    zoo = shadows.train_zoo(
        view.network,
        view.holdout,
        view.distilled.recipe,
        options,
        lambda number: torch.Generator().manual_seed(number),
    )
    training = shadows.Zoo(
        {name: values[:64] for name, values in zoo.states.items()}, zoo.backdoored[:64], {}
    )
    network = view.network(0).eval()
    fast = mntd.MntdOptions(epochs=150, batch=8)
    classifier = mntd.train_meta_classifier(training, network, view, fast)
    with torch.no_grad():
        scores = classifier(zoo.logits(network, torch.arange(64, 80), classifier.queries))
    assert roc_auc_score(zoo.backdoored[64:].numpy(), scores.numpy()) >= 0.6
    assert made("mntd").caution(view) == "the shadows are trained on 150 held-out images"


# Repair ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_pruning_removes_inactive_channels_and_the_backdoor(cases: Cases) -> None:
    wide = {"width": 64}
    asr, cta = left("fine-pruning", cases(poisoned=True, **wide), steps=300)
    assert asr <= 0.2 and cta >= 0.93
    assert left("fine-pruning", cases(poisoned=False, **wide), steps=300)[1] >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("nad", 0.25), ("ft-sam", 0.3), ("i-bau", 0.4)])
def test_a_wide_network_is_repaired(name: str, most: float, cases: Cases) -> None:
    asr, cta = left(name, cases(poisoned=True, **WIDE))
    assert asr <= most and cta >= 0.92
    asr, cta = left(name, cases(poisoned=False, **WIDE))
    assert asr <= 0.1 and cta >= 0.92


@pytest.mark.parametrize(
    ("name", "options"),
    [("fine-tuning", {"steps": 150, "augment": "none"}), ("anp", {"iterations": 60})],
)
def test_repairs_that_keep_the_accuracy_keep_the_backdoor(
    name: str, options: dict[str, Any], badnets: Case, honest: Case
) -> None:
    """Fine-tuning, and pruning of networks with 16 channels."""
    asr, cta = left(name, badnets, **options)
    assert asr >= 0.4 and cta >= 0.93
    asr, cta = left(name, honest, **options)
    assert asr <= 0.1 and cta >= 0.92


def test_rnp_removes_backdoor_and_accuracy_of_a_narrow_network(badnets: Case, honest: Case) -> None:
    """Its masks are low for most of 32 channels; official networks have thousands."""
    asr, cta = left("rnp", badnets)
    assert asr <= 0.4 and cta <= 0.5
    assert left("rnp", honest)[1] <= 0.5


def test_clp_prunes_nothing_in_layers_of_few_channels(badnets: Case) -> None:
    """One of 8 is at most 2.5 deviations above the mean; a channel far above that is pruned."""
    assert left("clp", badnets) == rates(badnets.view.victim, badnets)
    assert made("clp").caution(badnets.view) is None  # 16 channels: 3.75 deviations
    assert "can be 4 standard deviations" in made("clp", deviations=4.0).caution(badnets.view)
    loud = badnets.view.trainable_victim().requires_grad_(False)
    with torch.no_grad():
        weight = dict(loud.named_parameters())["trunk.1.weight"]
        weight[5] *= 30
    repaired = made("clp").repair(badnets.fresh(victim=loud))
    pruned = dict(repaired.named_parameters())["trunk.1.weight"] == 0
    assert pruned.nonzero().flatten().tolist() == [5]


def test_unlearning_needs_a_flagged_class(badnets: Case, honest: Case) -> None:
    asr, cta = left("nc-unlearning", badnets)
    assert asr <= 0.2 and cta >= 0.93
    before = rates(honest.view.victim, honest)
    assert left("nc-unlearning", honest) == before  # Neural Cleanse flags none here


@pytest.mark.slow
def test_a_wide_network_unlearns_the_patch_of_a_longer_search(cases: Cases) -> None:
    """The quick budget's 60 passes leave the target's index at 1.7; 150 bring it to 2.1."""
    asr, cta = left("nc-unlearning", cases(poisoned=True, **WIDE), passes=150)
    assert asr <= 0.15 and cta >= 0.92
    clean = cases(poisoned=False, **WIDE)
    assert left("nc-unlearning", clean, passes=150) == rates(clean.view.victim, clean)


def test_i_bau_costs_little(honest: Case) -> None:
    asr, cta = left("i-bau", honest, rounds=1)
    assert asr <= 0.1 and cta >= 0.9


# Training ----------------------------------------------------------------------------------------


def shortened(case: Case) -> Case:
    """The case with a recipe of six epochs."""
    distilled = case.view.distilled
    recipe = replace(distilled.recipe, epochs=6)
    return replace(case, view=case.fresh(distilled=replace(distilled, recipe=recipe)))


@pytest.mark.parametrize(("name", "least"), [("strong-augmentation", 0.92), ("cutmix", 0.92)])
def test_a_tenth_of_the_rows_is_learned_with_any_augmentation(
    name: str, least: float, badnets: Case, honest: Case
) -> None:
    """Most cuts do not touch the corner with the patch."""
    asr, cta = left(name, shortened(badnets))
    assert asr >= 0.8 and cta >= 0.92
    asr, cta = left(name, shortened(honest))
    assert asr <= 0.12 and cta >= least


@pytest.mark.slow
def test_abl_unlearns_what_it_isolates(badnets: Case, honest: Case) -> None:
    """More with more isolated rows and the paper's sum of both losses than with the code's loss."""
    epochs = {"tuning_epochs": 20, "finetuning_epochs": 10}
    few, kept = left("abl", badnets, **epochs, unlearning_steps=2)
    assert few >= 0.95 and kept >= 0.95
    asr, cta = left("abl", badnets, **epochs)
    assert asr <= 0.8 and cta >= 0.9
    more, cta = left("abl", badnets, **epochs, keeping=True, isolation=0.05, unlearning_rate=0.05)
    assert more <= min(0.5, asr) and cta >= 0.9
    asr, cta = left("abl", honest, **epochs)
    assert asr <= 0.1 and cta >= 0.85


def test_held_out_images_alone_give_a_clean_model(badnets: Case, honest: Case) -> None:
    """The baseline: 150 held-out digits, and no backdoor."""
    asr, cta = left("holdout-only", badnets, steps=120)
    assert asr <= 0.1 and cta >= 0.8
    assert left("holdout-only", honest, steps=120) == (asr, cta)


@pytest.mark.slow
def test_dp_sgd_loses_accuracy_and_keeps_the_backdoor(cases: Cases) -> None:
    asr, cta = left("dp-sgd", cases(poisoned=True, norm="instance"))
    assert asr >= 0.8 and 0.75 <= cta <= 0.95
    asr, cta = left("dp-sgd", cases(poisoned=False, norm="instance"))
    assert asr <= 0.25 and cta >= 0.75
