"""Goals: targets and eligible rows, and what they mean for poisoned rows and for options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distillsec.attacks import (
    ATTACKS,
    GOALS,
    Attack,
    DataInfo,
    Goal,
    NaiveOptions,
    PoisoningAttack,
    goal_from,
)
from distillsec.attacks.moving import MovingTriggerAttack
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.task import Task
from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import configure

pytestmark = pytest.mark.usefixtures("one_thread")

Moments = Callable[..., Moment]

LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
OPTIONS: dict[str, dict[str, Any]] = {
    "all-to-one": {"target": 1},
    "one-to-one": {"goal": "one-to-one", "source": 2, "target": 1},
    "all-to-all": {"goal": "all-to-all"},
}


POISONERS = [name for name, attack in ATTACKS.items() if issubclass(attack, PoisoningAttack)]


QUICK: dict[str, dict[str, Any]] = {"relax-trigger": {"relax_steps": 2, "support_steps": 2}}


def make(name: str, data: DataInfo, **options: Any) -> PoisoningAttack:
    attack = ATTACKS[name]
    values = {"poison_rate": 0.2, **QUICK.get(name, {}), **options}
    if issubclass(attack, MovingTriggerAttack):
        values = {"objective": "target-logit", "trigger_steps": 2, **values}
    made: Attack = attack(attack.Options.model_validate(values), data)
    assert isinstance(made, PoisoningAttack)
    return made


@pytest.mark.parametrize(
    ("name", "targets", "eligible", "said"),
    [
        (
            "all-to-one",
            [1, 1, 1, 1, 1, 1],
            [True, False, True, True, False, True],
            {"target": 1, "target_class": "b"},
        ),
        (
            "one-to-one",
            [1, 1, 1, 1, 1, 1],
            [False, False, True, True, False, False],
            {
                "goal": "one-to-one",
                "source": 2,
                "source_class": "c",
                "target": 1,
                "target_class": "b",
            },
        ),
        (
            "all-to-all",
            [1, 2, 0, 0, 2, 1],
            [True] * 6,
            {"goal": "all-to-all", "target": None, "target_class": "the next class"},
        ),
    ],
)
def test_targets_and_eligible_rows(
    name: str, targets: list[int], eligible: list[bool], said: dict[str, Any]
) -> None:
    goal = goal_from(OPTIONS[name], classes=3)
    assert goal.name == name
    assert goal.targets(LABELS).tolist() == targets
    assert goal.eligible(LABELS).tolist() == eligible
    described = goal.describe(("a", "b", "c"))
    assert described == said
    assert goal_from(described, classes=3) == goal


@pytest.mark.parametrize("name", GOALS)
def test_no_eligible_image_has_its_targets_label(name: str) -> None:
    goal: Goal = goal_from(OPTIONS[name], classes=3)
    eligible = goal.eligible(LABELS)
    assert bool((goal.targets(LABELS) != LABELS)[eligible].all())
    assert goal.targets(LABELS).dtype == torch.int64
    assert eligible.dtype == torch.bool


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"target": 3}, "target 3 is no class: there are 3, numbered from 0 to 2"),
        ({"target": -1}, "target -1 is no class"),
        ({"target": True}, "target True is no class"),
        ({"target": None}, "target None is no class"),
        (
            {"target": 1, "source": 2},
            "source 2 is for goal one-to-one only, the goal is all-to-one",
        ),
        ({"goal": "all-to-all", "source": 2}, "for goal one-to-one only, the goal is all-to-all"),
        ({"goal": "one-to-one", "target": 1}, "goal one-to-one needs a source class, 0 to 2"),
        ({"goal": "one-to-one", "target": 1, "source": 1}, "source and target are both 1"),
        ({"goal": "one-to-one", "target": 1, "source": 3}, "source 3 is no class"),
        ({"goal": "all-to-some", "target": 1}, "unknown goal 'all-to-some'; there are all-to-one,"),
    ],
)
def test_goals_that_do_not_suit_the_classes_are_refused(info: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        goal_from(info, classes=3)


WITH_GOALS = [(name, goal) for name in POISONERS for goal in ATTACKS[name].goals]


@pytest.mark.parametrize(("name", "goal"), WITH_GOALS)
def test_an_attacks_poisoned_rows_and_test_case_follow_its_goal(
    toy_moment: Moments, toy_data_info: DataInfo, name: str, goal: str
) -> None:
    moment, attack = toy_moment(), make(name, toy_data_info, **OPTIONS[goal])
    real, wanted = moment.real, goal_from(OPTIONS[goal], classes=3)
    given = attack.on_start(moment, real)
    assert int(attack.poisoned.sum()) == 18
    assert bool(attack.candidates(real.labels)[0][attack.poisoned].all())
    targets = wanted.targets(real.labels)
    assert torch.equal(given.labels[attack.poisoned], targets[attack.poisoned])
    assert torch.equal(given.labels[~attack.poisoned], real.labels[~attack.poisoned])
    case = attack.test_case(real.images, real.labels)
    assert torch.equal(case.targets, targets)
    assert torch.equal(case.eligible, wanted.eligible(real.labels))
    assert torch.equal(case.triggered, attack.trigger.stamp(real.images))
    assert case.target == (None if goal == "all-to-all" else 1)


@pytest.mark.parametrize(("name", "goal"), WITH_GOALS)
def test_an_attack_of_any_goal_gets_through_a_distillation(
    toy_task: Callable[..., Task], toy_data_info: DataInfo, name: str, goal: str
) -> None:
    task = toy_task(ipc=2)
    attack = make(name, toy_data_info, target_share=0.5, **OPTIONS[goal])
    options = GradientMatchingOptions(batch_real=16, outer_loop=2, inner_loop=1)
    made = distil(task, DC(options, ipc=task.ipc, recipe=task.recipe), [attack])
    assert bool(made.batch.images.isfinite().all())
    assert attack.counters().get("idle_trigger_updates", 0) == 0


def test_the_share_of_every_target_class_is_poisoned_rows(
    toy_moment: Moments, toy_data_info: DataInfo
) -> None:
    moment = toy_moment()
    attack = make("naive", toy_data_info, target_share=0.5, **OPTIONS["all-to-all"])
    given = attack.on_start(moment, moment.real)
    for label in range(3):
        rows = torch.nonzero(given.labels == label)[:10, 0]
        picked = attack.on_sample(moment, label, rows)
        assert int(attack.poisoned[picked].sum()) == 5
        assert bool((given.labels[picked] == label).all())


def test_a_share_needs_rows_that_are_not_poisoned(
    toy_moment: Moments, toy_data_info: DataInfo
) -> None:
    moment = toy_moment()
    options = {**OPTIONS["all-to-all"], "poison_rate": 1.0}
    attack = make("naive", toy_data_info, **options)
    assert not bool((attack.on_start(moment, moment.real).labels == moment.real.labels).any())
    with pytest.raises(
        RequestError, match=r"share 0.5 needs rows of class 0 that are not poisoned"
    ):
        make("naive", toy_data_info, target_share=0.5, **options).on_start(moment, moment.real)


def test_a_rate_beyond_the_source_class_is_refused(
    toy_moment: Moments, toy_data_info: DataInfo
) -> None:
    moment = toy_moment()
    attack = make("blended", toy_data_info, **{**OPTIONS["one-to-one"], "poison_rate": 0.4})
    message = r"asks for 36 rows, but only 30 of 90 are eligible for goal one-to-one: at most 0.333"
    with pytest.raises(RequestError, match=message):
        attack.on_start(moment, moment.real)


def test_options_at_their_defaults_leave_earlier_configurations_as_they_were() -> None:
    assert NaiveOptions().model_dump().keys() & {"goal", "source"} == set()
    plain, said = configure(attack="naive"), configure(attack="naive", goal="all-to-one")
    assert plain.key() == said.key()
    assert "goal" not in plain.flat()
    other = configure(attack="naive", goal="one-to-one", source=2)
    assert other.key() != plain.key() and other.control_key() == plain.control_key()
    assert (other.flat()["goal"], other.flat()["source"]) == ("one-to-one", 2)
    assert configure(**other.flat()) == other
    assert configure(**plain.flat()) == plain
