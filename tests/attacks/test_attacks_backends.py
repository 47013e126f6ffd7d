"""Every attack in every backend: nothing mutated, an effect, and the draws that carry it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillsec.attacks import ATTACKS, Attack, DataInfo, PoisoningAttack, SetAttack
from distillsec.attacks.moving import MovingTriggerAttack
from distillsec.distill.backends import BACKENDS
from distillsec.distill.core import hooks
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.hooks import EVENTS, Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch

DISTILLING = [name for name, backend in BACKENDS.items() if not backend.keeps_rows]

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]


# An interceptor has no distillation.
DISTILLERS = [name for name, attack in ATTACKS.items() if not issubclass(attack, SetAttack)]
MOVING = [name for name, attack in ATTACKS.items() if issubclass(attack, MovingTriggerAttack)]
POISONERS = [name for name, attack in ATTACKS.items() if issubclass(attack, PoisoningAttack)]
QUICK: dict[str, dict[str, object]] = {
    "doorping": {"trigger_steps": 2, "objective": "target-logit"},
    "wanet": {"cross_ratio": 0.0},  # its noise rows change too
    "relax-trigger": {"relax_steps": 2, "support_steps": 2},
    "invisible": {"trigger_steps": 2, "objective": "target-logit"},
    "sneakdoor": {"generator_images": 40, "surrogate_steps": 4, "target_share": 0.5},
    "unrolled": {"unroll_warmup": 2, "unroll_steps": 2, "images_per_update": 16},
}


def make(name: str, data: DataInfo, **options: object) -> Attack:
    poison: dict[str, object] = {"poison_rate": 0.2} if name in POISONERS else {}
    settings = {**poison, **QUICK.get(name, {}), **options}
    return ATTACKS[name](ATTACKS[name].Options.model_validate(settings), data)


@pytest.mark.parametrize("name", DISTILLERS)
@pytest.mark.parametrize("backend", DISTILLING)
def test_an_attack_changes_the_set_and_nothing_that_it_is_given(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    tensors: Callable[[object], list[Tensor]],
    toy_backend: Backends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    name: str,
) -> None:
    heard = set()
    call = hooks.call

    def guarded(hook: Hook, event: str, moment: Moment, *arguments: object) -> object:
        given = [tensor for each in (moment, *arguments) for tensor in tensors(each)]
        before = [tensor.detach().clone() for tensor in given]
        answer = call(hook, event, moment, *arguments)
        pairs = zip(before, given, strict=True)
        assert all(torch.equal(old, new) for old, new in pairs), f"{event} changed its argument"
        heard.add(event)
        return answer

    monkeypatch.setattr(hooks, "call", guarded)
    task = toy_task(ipc=2, iterations=3, scratch=tmp_path / "attacked")
    share = {"target_share": 0.5} if name in POISONERS else {}
    attack = make(name, toy_data_info, **share)
    found = distil(task, toy_backend(backend, task), [attack])
    assert heard == {event for event in EVENTS if attack.listens_to(event)}
    clean = toy_task(ipc=2, iterations=3, scratch=tmp_path / "clean")
    twin = distil(clean, toy_backend(backend, clean))
    assert not torch.allclose(found.batch.images, twin.batch.images, atol=1e-4)
    assert torch.equal(found.batch.labels, twin.batch.labels)


class Recorder(Hook):
    """Records the draws after an attack."""

    def __init__(self, attack: Attack) -> None:
        self.attack, self.stamped, self.seen = attack, 0, 0
        self.triggers: list[Tensor] = []

    def on_draw(self, moment: Moment, clean: Batch) -> Batch:
        assert clean.index is not None
        poisoned = self.attack.poisoned[clean.index]  # type: ignore[attr-defined]
        real = moment.real.rows(clean.index)
        assert torch.equal(clean.images[~poisoned], real.images[~poisoned])
        assert torch.equal(clean.labels[~poisoned], real.labels[~poisoned])
        stamped = self.attack.trigger.stamp(real.images)
        assert torch.equal(clean.images[poisoned], stamped[poisoned])
        assert bool((clean.labels[poisoned] == 1).all())
        self.stamped += int(poisoned.sum())
        self.seen += len(poisoned)
        self.triggers.append(next(iter(self.attack.trigger.tensors().values())))
        return clean


@pytest.mark.parametrize("name", POISONERS)
@pytest.mark.parametrize("backend", DISTILLING)
def test_poisoned_rows_carry_the_present_trigger_in_every_draw(
    toy_task: Tasks, toy_data_info: DataInfo, toy_backend: Backends, backend: str, name: str
) -> None:
    task = toy_task(ipc=2, iterations=3)
    attack = make(name, toy_data_info, target=1)
    recorder = Recorder(attack)
    distil(task, toy_backend(backend, task), [attack, recorder])
    # 18 of 90 rows are poisoned; class by class they are 18 of the 48 that the target now has.
    assert 0.08 < recorder.stamped / recorder.seen < 0.35
    moved = [not torch.equal(old, new) for old, new in pairwise(recorder.triggers)]
    # mtt has drawn its last batch before the students of unrolled move the patch.
    assert any(moved) == (name in MOVING or (name == "unrolled" and backend != "mtt"))


# By backend: network moves in 4 iterations, 2 synthetic steps each in dc and dsa. The last step
# moves nothing, and in mtt the 2 experts move twice, of which once the trigger may follow.
MOVES = {"dc": 7, "dsa": 7, "dm": 3, "mtt": 5, "dd": 3}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("backend", DISTILLING)
def test_a_trigger_moves_with_every_network_but_the_last(
    toy_task: Tasks,
    toy_data_info: DataInfo,
    toy_backend: Backends,
    tmp_path: Path,
    backend: str,
    name: str,
) -> None:
    for every, frozen in ((1, 1.0), (2, 1.0), (1, 0.0)):
        options = {"update_every": every, "freeze_at": frozen, "moves_with": "both"}
        attack = make(name, toy_data_info, **options)
        task = toy_task(ipc=2, iterations=4, scratch=tmp_path / f"{every}, {frozen}")
        distil(task, toy_backend(backend, task), [attack])
        wanted = MOVES[backend] // every if frozen else 0
        assert attack.counters()["trigger_updates"] == wanted


@pytest.mark.parametrize("backend", DISTILLING)
def test_a_data_owner_only_hands_in_another_training_set(
    toy_task: Tasks, toy_data_info: DataInfo, toy_backend: Backends, tmp_path: Path, backend: str
) -> None:
    kept: list[Batch] = []

    class Keep(Hook):
        def on_start(self, moment: Moment, real: Batch) -> Batch:
            kept.append(real)
            return real

    class Substitute(Hook):
        def on_start(self, moment: Moment, real: Batch) -> Batch:
            return kept[0]

    naive = make("naive", toy_data_info)
    found = []
    both: list[list[Hook]] = [[naive, Keep()], [Substitute()]]
    for number, chosen in enumerate(both):
        task = toy_task(ipc=2, iterations=3, scratch=tmp_path / str(number))
        found.append(distil(task, toy_backend(backend, task), chosen).batch.images)
    assert torch.equal(*found)
