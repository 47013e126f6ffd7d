"""What holds for every attack of the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from distillsec.attacks import ATTACKS, Attack, AttackOptions, DataInfo, SetAttack, ThreatModel
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core import hooks
from distillsec.distill.core.hooks import EVENTS, Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.files.artifact import load_trigger, save_trigger
from distillsec.distill.types import Batch, Distillate

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
NAMES = sorted(ATTACKS)
# An interceptor has no distillation.
DISTILLING = [name for name in NAMES if not issubclass(ATTACKS[name], SetAttack)]
QUICK = {
    "relax_steps": 2,
    "support_steps": 2,
    "support_per_class": 2,
    "generator_images": 40,
    "surrogate_steps": 4,
}


def make(name: str, data: DataInfo, **options: Any) -> Attack:
    """The attack with those of ``options`` that it has, a fifth of the rows poisoned if it does."""
    attack = ATTACKS[name]
    chosen = {"poison_rate": 0.2, **QUICK, **options}
    fields = attack.Options.model_fields
    known = {k: v for k, v in chosen.items() if k in fields and v is not None}
    return attack(attack.Options.model_validate(known), data)


def same_trigger(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def trigger(attack: Attack) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in attack.trigger.tensors().items()}


def run(task: Task, attack: Hook | None) -> Tensor:
    options = GradientMatchingOptions(batch_real=16, outer_loop=2, inner_loop=1)
    backend = DC(options, ipc=task.ipc, recipe=task.recipe)
    return distil(task, backend, [attack] if attack else []).batch.images


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("name", DISTILLING)
def test_an_attack_changes_nothing_that_it_is_given(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    tensors: Callable[[object], list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    share: float | None,
) -> None:
    events = []
    call = hooks.call

    def guarded(hook: Hook, event: str, moment: Moment, *arguments: Any) -> Any:
        given = [tensor for each in (moment, *arguments) for tensor in tensors(each)]
        before = [tensor.detach().clone() for tensor in given]
        answer = call(hook, event, moment, *arguments)
        pairs = zip(before, given, strict=True)
        assert all(torch.equal(old, new) for old, new in pairs), f"{event} changed its argument"
        if moment.network is not None:
            hooked = [m for m in moment.network.modules() if m._forward_hooks]
            assert not hooked, f"{event} left forward hooks on the network"
        events.append(event)
        return answer

    monkeypatch.setattr(hooks, "call", guarded)
    task = toy_task(ipc=2)
    images, labels = task.real.images.clone(), task.real.labels.clone()
    attack = make(name, toy_data_info, target_share=share)
    found = run(task, attack)
    listened = {event for event in EVENTS if attack.listens_to(event)}
    assert set(events) == listened
    assert torch.equal(task.real.images, images)
    assert torch.equal(task.real.labels, labels)
    assert not torch.equal(found, run(task, None))


@pytest.mark.parametrize("name", DISTILLING)
def test_an_attack_repeats_with_its_seed(
    toy_task: Tasks, toy_data_info: DataInfo, name: str
) -> None:
    one, two = make(name, toy_data_info), make(name, toy_data_info)
    assert torch.equal(run(toy_task(), one), run(toy_task(), two))
    assert same_trigger(trigger(one), trigger(two))
    # An attack that is used again starts from nothing.
    counters, found = one.counters(), trigger(one)
    assert torch.equal(run(toy_task(), one), run(toy_task(), two))
    assert one.counters() == counters
    assert same_trigger(trigger(one), found)


@pytest.mark.parametrize("name", DISTILLING)
def test_an_attacks_trigger_and_test_case(
    toy_task: Tasks, toy_data_info: DataInfo, tmp_path: Any, name: str
) -> None:
    attack = make(name, toy_data_info, target=1)
    run(toy_task(), attack)
    real = toy_task().real
    case = attack.test_case(real.images, real.labels)
    assert case.triggered.shape == real.images.shape
    assert case.triggered.dtype == torch.float32
    assert case.triggered.min() >= 0
    assert case.triggered.max() <= 1
    assert case.targets.dtype == torch.int64
    assert case.eligible.dtype == torch.bool
    assert torch.equal(case.eligible, attack.goal.eligible(real.labels))
    assert not bool((real.labels == case.targets)[case.eligible].any())
    assert not torch.equal(case.triggered, real.images)
    assert torch.equal(real.images, toy_task().real.images)
    info = {**attack.trigger.describe(), "target": 1}
    save_trigger(tmp_path / "t.safetensors", attack.trigger.tensors(), info)
    kept, said = load_trigger(tmp_path / "t.safetensors")
    assert same_trigger(kept, trigger(attack))
    assert said["range"] == "pixel"


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_is_described_and_complete(toy_data_info: DataInfo, name: str) -> None:
    attack = ATTACKS[name]
    assert attack.name == name
    assert issubclass(attack, Attack)
    assert issubclass(attack.Options, AttackOptions)
    assert not inspect.isabstract(attack)
    document = inspect.getdoc(attack) or ""
    assert "In words:" in document
    assert "Deviations" in document
    assert all(field.description for field in attack.Options.model_fields.values())
    made = make(name, toy_data_info)
    assert made.threat_model in get_args(ThreatModel)
    if made.threat_model == "data owner":
        others = [event for event in EVENTS if event not in ("on_start", "on_sample")]
        assert not any(made.listens_to(event) for event in others)


def test_a_data_owners_draws_are_those_of_a_clean_run(
    toy_task: Tasks, toy_data_info: DataInfo
) -> None:
    """Naive only changes the training set: distilling that set without hooks gives the same."""
    task, naive = toy_task(), make("naive", toy_data_info)
    kept: list[Batch] = []

    class Keep(Hook):
        def on_start(self, moment: Moment, real: Batch) -> Batch:
            kept.append(real)
            return real

    options = GradientMatchingOptions(batch_real=16)
    backend = DC(options, ipc=1, recipe=task.recipe)
    attacked = distil(task, backend, [naive, Keep()]).batch.images

    class Substitute(Hook):
        def on_start(self, moment: Moment, real: Batch) -> Batch:
            return kept[0]

    assert torch.equal(distil(task, backend, [Substitute()]).batch.images, attacked)


@pytest.mark.parametrize("name", ["badnets", "sig", "wanet", "simple-trigger", "relax-trigger"])
def test_a_resumed_run_of_a_data_owner_gives_the_same_set(
    toy_task: Tasks, toy_data_info: DataInfo, name: str
) -> None:
    """They have no state of their own: the stream poisons the same rows again."""
    kept: list[Any] = []
    task = toy_task(iterations=3)
    options = GradientMatchingOptions(batch_real=16, outer_loop=1, inner_loop=1)

    class Watch(Observer):
        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], Any]
        ) -> None:
            if iteration == 1:
                kept.append(state())

    def set_and_trigger(state: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        backend, attack = DC(options, ipc=1, recipe=task.recipe), make(name, toy_data_info)
        made = distil(task, backend, [attack], observer=Watch(), state=state)
        assert attack.state_dict() == {}
        return made.batch.images, trigger(attack)

    images, stamped = set_and_trigger()
    again, stamped_again = set_and_trigger(kept[0])
    assert torch.equal(again, images) and same_trigger(stamped_again, stamped)
