"""What holds for every defense: docstring, options, repeatable results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from distillsec.defenses import DEFENSES
from distillsec.defenses.base import (
    DefenderView,
    Defense,
    InputScorer,
    Inspector,
    Purifier,
    Repairer,
    Sanitiser,
    SetScorer,
    Trainer,
)
from distillsec.distill.training import predict
from distillsec.distill.types import Batch

if TYPE_CHECKING:
    from tests.defenses.conftest import Case

OF_INPUTS = [n for n, d in DEFENSES.items() if issubclass(d, InputScorer | Purifier)]
OF_SETS = [n for n, d in DEFENSES.items() if issubclass(d, SetScorer)]
MADE_UP = {"blur", "pixel-clip", "holdout-only"}  # no paper: baselines


# Less work than the quick budget, where that is slow.
TINY: dict[str, dict[str, Any]] = {
    "spectre": {"dimensions": 4, "tried": 2},
    "activation-clustering": {"components": 3},
    "autoencoder": {"epochs": 1},
    "sentinet": {"overlays": 6},
    "strip": {"copies": 5},
    "neural-cleanse": {"steps": 3, "images": 50},
    "tabor": {"steps": 3, "images": 50},
    "nc-unlearning": {"passes": 3, "images": 50, "steps": 4, "threshold": -1e9},
    "abs": {"steps": 5, "missing": 20},
    "mm-bd": {"starts": 2, "steps": 10},
    "bti-dbf": {"mask_steps": 2, "copy_steps": 2, "steps": 2, "width": 4},
    "mntd": {"pairs": 2, "shadow_epochs": 1, "epochs": 3},
    "fine-tuning": {"steps": 4},
    "holdout-only": {"steps": 4},
    "fine-pruning": {"steps": 4},
    "nad": {"steps": 4, "teacher_steps": 4},
    "ft-sam": {"steps": 4},
    "anp": {"iterations": 4},
    "i-bau": {"rounds": 1, "steps": 2, "climbs": 2},
    "rnp": {"unlearning_epochs": 2, "recovering_epochs": 2},
    "abl": {"tuning_epochs": 2, "finetuning_epochs": 2, "unlearning_steps": 4},
    "partition-ensemble": {"epochs": 2},
}


def quick(name: str) -> Defense:
    kind = DEFENSES[name]
    return kind(kind.Options(**{**kind.quick, **TINY.get(name, {})}))


def answer(defense: Defense, view: DefenderView, images: Tensor) -> Tensor:
    """The result of a defense of any family, as one tensor."""
    if isinstance(defense, SetScorer):
        found = defense.score_set(view)
        rows = torch.stack([found.rows.double(), found.flagged.double()]).flatten().cpu()
        return torch.cat([rows, torch.tensor([found.statistic])])
    if isinstance(defense, InputScorer):
        return defense.score_inputs(view, images)
    if isinstance(defense, Inspector):
        seen = defense.inspect(view)
        anomaly = torch.zeros(0) if seen.anomaly is None else seen.anomaly.cpu()
        assert seen.anomaly is None or anomaly.shape == (view.classes,)
        alarm = -1.0 if seen.alarm is None else float(seen.alarm)
        return torch.cat([anomaly, torch.tensor([seen.statistic, alarm])])
    if isinstance(defense, Sanitiser):
        return defense.sanitise(view).batch.images
    if isinstance(defense, Trainer):
        return predict(defense.train(view), images)
    if isinstance(defense, Repairer):
        return predict(defense.repair(view), images)
    assert isinstance(defense, Purifier)
    return defense.purify(view)(images)


def shortened(case: Case) -> Case:
    """A third of the rows, with a recipe of three epochs."""
    few = case.rows(torch.arange(0, len(case.poisoned), 3))
    distilled = few.view.distilled
    recipe = replace(distilled.recipe, epochs=3)
    return replace(few, view=few.fresh(distilled=replace(distilled, recipe=recipe)))


def contents(view: DefenderView) -> list[Tensor]:
    batch, holdout = view.distilled.batch, view.holdout
    tensors = [batch.images, batch.labels, holdout.images, holdout.labels]
    return [*tensors, *view.victim.state_dict().values()]


@pytest.mark.parametrize("name", DEFENSES)
def test_docstrings_are_complete(name: str) -> None:
    kind = DEFENSES[name]
    text = kind.__doc__ or ""
    assert kind.name == name and kind.needs
    assert "In words:" in text and "Need" in text
    assert ("Deviations:" in text) != (name in MADE_UP)
    assert name in MADE_UP or any(str(year) in text for year in range(2017, 2027))


@pytest.mark.parametrize("name", DEFENSES)
def test_options_are_documented_and_survive_json(name: str) -> None:
    kind = DEFENSES[name]
    assert all(field.description for field in kind.Options.model_fields.values())
    for values in ({}, dict(kind.quick)):
        options = kind.Options(**values)
        stored = json.loads(json.dumps(options.model_dump(mode="json")))
        assert kind.Options(**stored) == options == kind(options).options
    assert kind.quick.keys() <= kind.Options.model_fields.keys()


@pytest.mark.parametrize("name", DEFENSES)
def test_results_repeat_and_nothing_is_changed(
    name: str, badnets: Case, cases: Callable[..., Case]
) -> None:
    case = cases(poisoned=True, norm="instance") if name == "dp-sgd" else badnets
    if issubclass(DEFENSES[name], Trainer):
        case = shortened(case)
    view = case.fresh()
    before = [tensor.clone() for tensor in contents(view)]
    images = badnets.clean.images[:40]
    first = answer(quick(name), view, images)
    assert all(map(torch.equal, before, contents(view)))
    assert not view.victim.training
    assert all(not module._forward_hooks for module in view.victim.modules())
    assert not any(parameter.requires_grad for parameter in view.victim.parameters())
    again = answer(quick(name), case.fresh(), images)
    assert torch.equal(first, again) and bool(first.double().isfinite().all())
    assert not first.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEFENSES)
def test_defenses_run_on_the_device_of_the_set(
    name: str, badnets: Case, cases: Callable[..., Case]
) -> None:
    case = cases(poisoned=True, norm="instance") if name == "dp-sgd" else badnets
    view = case.view
    moved = case.fresh(
        distilled=view.distilled.to("cuda"),
        victim=view.trainable_victim().requires_grad_(False).to("cuda"),
        network=replace(view.network, device="cuda"),
        holdout=view.holdout.to("cuda"),
    )
    defense = quick(name)
    reason = defense.not_applicable_because(moved) or "at this budget"
    if "needs opacus" in reason:
        pytest.skip(reason)
    assert "at this budget" in reason
    found = answer(defense, moved, case.clean.images[:40].to("cuda"))
    assert bool(found.double().isfinite().all())


@pytest.mark.parametrize(
    "name", [n for n, d in DEFENSES.items() if issubclass(d, InputScorer | Purifier)]
)
def test_the_result_for_an_image_does_not_depend_on_the_others(name: str, badnets: Case) -> None:
    images = torch.cat([badnets.clean.images[:5], badnets.triggered[:5]])
    together = answer(quick(name), badnets.fresh(), images)
    for number in (0, 4, 7):
        alone = answer(quick(name), badnets.fresh(), images[number : number + 1])
        assert torch.allclose(alone, together[number : number + 1], atol=1e-5)


@pytest.mark.parametrize("name", DEFENSES)
def test_without_holdout_or_rows_defenses_work_or_are_not_applicable(
    name: str, badnets: Case
) -> None:
    """No crash, and no number that is not finite."""
    none = Batch(images=badnets.view.holdout.images[:0], labels=badnets.view.holdout.labels[:0])
    labels = badnets.view.labels
    few = torch.cat([torch.nonzero(labels == label)[:3, 0] for label in range(10)])
    one = torch.cat([torch.nonzero(labels == label)[:1, 0] for label in range(10)])
    images = badnets.clean.images[:4]
    cases: list[tuple[Tensor, dict[str, Any]]] = [(few, {}), (one, {}), (few, {"holdout": none})]
    for rows, changes in cases:
        view = badnets.rows(rows).fresh(**changes)
        defense = quick(name)
        reason = defense.not_applicable_because(view)
        if reason is None:
            assert bool(answer(defense, view, images).double().isfinite().all())
        else:
            assert reason[0].islower() or reason[0].isdigit()
            assert "\n" not in reason


@pytest.mark.parametrize("name", OF_SETS)
def test_ten_rows_a_class_cause_a_caution(name: str, badnets: Case) -> None:
    labels = badnets.view.labels
    ten = torch.cat([torch.nonzero(labels == label)[:10, 0] for label in range(10)])
    view = badnets.rows(ten).view
    defense = quick(name)
    assert defense.not_applicable_because(view) is None and defense.caution(view)


@pytest.mark.parametrize("name", DEFENSES)
def test_soft_labels_are_accepted(name: str, badnets: Case) -> None:
    """A set with soft labels is scored by its classes, and cleaned with its labels kept."""
    batch = badnets.view.distilled.batch
    rows = torch.arange(0, len(batch), 4)
    soft = torch.nn.functional.one_hot(batch.labels[rows], 10).float()
    few = badnets.rows(rows)
    hard = few.view
    distilled = replace(hard.distilled, batch=Batch(images=batch.images[rows], labels=soft))
    view = few.fresh(distilled=distilled)
    defense = quick(name)
    if defense.not_applicable_because(view):
        assert defense.not_applicable_because(hard)
    elif isinstance(defense, Sanitiser):
        assert defense.sanitise(view).batch.labels is soft
    elif isinstance(defense, SetScorer):
        images = badnets.clean.images[:4]
        assert torch.equal(answer(defense, view, images), answer(defense, few.fresh(), images))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("strip", {"copies": 0}),
        ("teco", {"corruptions": ("fog", "smog")}),
        ("gaussian-blur", {"kernel": 4}),
        ("partition-ensemble", {"partitions": 2}),
        ("activation-clustering", {"reduction": "umap"}),
        ("jpeg", {"quality": 101}),
        ("shrinkpad", {"share": 1.0}),
        ("neural-cleanse", {"success": 0}),
        ("nad", {"weights": ()}),
        ("strong-augmentation", {"kind": "autoaugment"}),
        ("abl", {"isolation": 1.0}),
        ("dp-sgd", {"delta": 0}),
    ],
)
def test_impossible_options_are_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DEFENSES[name].Options(**values)
