"""Experts: plain training reproduced, their files, reuse and refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from distillsec.attacks import ATTACKS, DataInfo
from distillsec.distill import weights as flat
from distillsec.distill.augment import Augmentation, parse_strategy
from distillsec.distill.backends import experts
from distillsec.distill.backends.distribution_matching import DM, DistributionMatchingOptions
from distillsec.distill.backends.experts import Buffer, ExpertPlan, open_buffer
from distillsec.distill.backends.trajectory_matching import MTT, TrajectoryMatchingOptions
from distillsec.distill.core.hooks import Hook
from distillsec.distill.core.run import Run
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.files.safe import write_tensors
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.randomness import Streams
from distillsec.distill.types import RequestError, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
MEAN, STD = 0.5, 0.25


SETTINGS: dict[str, Any] = {
    "experts": 3,
    "train_epochs": 3,
    "experts_per_file": 2,
    "expert_lr": 0.05,
    "expert_momentum": 0.5,
    "expert_weight_decay": 1e-3,
    "expert_batch": 40,
    "expert_seed": 7,
    "augment": "none",
    "expert_epochs": 1,
    "max_start_epoch": 1,
}


def planned(task: Task, **changes: Any) -> ExpertPlan:
    """The plan of ``mtt`` with these options."""
    options = TrajectoryMatchingOptions(**{**SETTINGS, **changes})
    return MTT(options, ipc=1, recipe=task.recipe)._plan(task)


def started(task: Task, hooks: Sequence[Hook] = ()) -> Run:
    backend = DM(DistributionMatchingOptions(), ipc=task.ipc, recipe=task.recipe)
    return start_run(task, backend, hooks)


def opened(task: Task, hooks: Sequence[Hook] = (), *, fresh: bool = True, **changes: Any) -> Buffer:
    return open_buffer(started(task, hooks), planned(task, **changes), 0, fresh=fresh)


def folder_of(task: Task, round_: int = 0) -> Path:
    assert task.scratch is not None
    return task.scratch / f"round-{round_}"


def shards(task: Task) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted(folder_of(task).glob("experts-*"))]


def doorping(data: DataInfo) -> list[Hook]:
    options = {"poison_rate": 0.2, "objective": "target-logit", "trigger_steps": 2}
    attack = ATTACKS["doorping"]
    return [attack(attack.Options.model_validate(options), data)]


def naive(data: DataInfo) -> list[Hook]:
    attack = ATTACKS["naive"]
    options = {"poison_rate": 0.2, "target_share": 0.5}
    return [attack(attack.Options.model_validate(options), data)]


def no_hooks(data: DataInfo) -> list[Hook]:
    return []


# Training ----------------------------------------------------------------------------------------


def by_hand(task: Task, plan: ExpertPlan, expert: int) -> list[Tensor]:
    """One expert's weights after each epoch, by SGD's formulas and the named streams."""
    streams, recipe = Streams(plan.seed), plan.recipe
    network = task.network(streams.integer("expert", 0, expert))
    weights = list(network.parameters())
    velocities = [torch.zeros_like(weight) for weight in weights]
    strategy = Augmentation(parse_strategy(recipe.augment), Preprocessing((MEAN,), (STD,)))
    path = [flat.laid_out(network)]
    for epoch in range(plan.epochs):
        rate = recipe.lr / 10 if plan.decay and epoch > plan.epochs // 2 + 1 else recipe.lr
        generator = streams.generator("expert", 0, expert, epoch)
        for rows in torch.randperm(90, generator=generator).split(recipe.batch_size):
            images = task.real.images[rows]
            if recipe.augment:
                images = strategy.draw(images.shape, generator, shared=False)(images)
            loss = functional.cross_entropy(network(images), task.real.labels[rows])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
                    slope = gradient + recipe.weight_decay * weight
                    velocity.mul_(recipe.momentum).add_(slope)
                    weight.sub_(rate * velocity)
        path.append(flat.laid_out(network))
    return path


@pytest.mark.parametrize(
    "changes", [{}, {"augment": "crop_scale_rotate"}, {"train_epochs": 6, "expert_decay": True}]
)
def test_experts_without_hooks_are_plain_training(toy_task: Tasks, changes: dict[str, Any]) -> None:
    task = toy_task()
    plan, buffer = planned(task, **changes), opened(task, **changes)
    for expert in range(plan.experts):
        wanted = by_hand(task, plan, expert)
        for epoch, weights in enumerate(wanted):
            found = buffer.weights(expert, epoch)
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
        assert (wanted[-1] - wanted[0]).abs().max() > 0.02
    if plan.decay:  # the last epoch alone is slower: epochs 0 to 4 are not after 6 // 2 + 1
        slow, fast = (by_hand(task, replace(plan, decay=d), 0)[-1] for d in (True, False))
        assert (slow - fast).abs().max() > 1e-3


def test_the_files_hold_experts_by_epochs_by_weights(toy_task: Tasks) -> None:
    task = toy_task()
    buffer = opened(task)
    count = flat.count(task.network(0))
    found = shards(task)
    assert [shard["weights"].shape for shard in found] == [(2, 4, count), (1, 4, count)]
    names = {path.name for path in folder_of(task).iterdir()}
    assert names == {"manifest.json", "experts-000.safetensors", "experts-001.safetensors"}
    for expert in range(3):
        for epoch in range(4):
            there = found[expert // 2]["weights"][expert % 2, epoch]
            assert torch.equal(buffer.weights(expert, epoch), there)
    for outside in ((3, 0), (0, 4)):
        with pytest.raises(RequestError, match=r"experts-00\d\.safetensors: "):
            buffer.weights(*outside)


def test_experts_do_not_depend_on_the_file_they_lie_in(toy_task: Tasks, tmp_path: Path) -> None:
    buffers = [
        opened(toy_task(scratch=tmp_path / str(together)), experts_per_file=together)
        for together in (1, 3)
    ]
    for expert in range(3):
        assert torch.equal(*(buffer.weights(expert, 3) for buffer in buffers))


def test_an_expert_that_diverges_stops_the_run(toy_task: Tasks) -> None:
    with pytest.raises(RunError, match=r"^an expert diverged in epoch [12]: lower expert_lr$"):
        opened(toy_task(), expert_lr=1e30)
    with pytest.raises(RequestError, match="no scratch folder"):
        opened(replace(toy_task(), scratch=None))


# Reuse and refusal -------------------------------------------------------------------------------


def snapshot(task: Task) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder_of(task).iterdir()}


@pytest.mark.parametrize("hooks", [no_hooks, naive, doorping])
def test_a_finished_buffer_is_reused_untouched(
    toy_task: Tasks, toy_data_info: DataInfo, monkeypatch: pytest.MonkeyPatch, hooks: Any
) -> None:
    task, first, again = toy_task(), hooks(toy_data_info), hooks(toy_data_info)
    made = opened(task, first).weights(2, 3)
    before = snapshot(task)
    monkeypatch.setattr(experts._ExpertTraining, "_train", lambda *_: pytest.fail("trained again"))
    assert torch.equal(opened(task, again).weights(2, 3), made)
    assert snapshot(task) == before
    for one, other in zip(first, again, strict=True):
        kept, found = one.state_dict(), other.state_dict()
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[name], found[name]) for name in kept)


def test_a_moved_trigger_comes_out_of_a_reused_buffer(
    toy_task: Tasks, toy_data_info: DataInfo
) -> None:
    task = toy_task()
    (first,), (again,) = doorping(toy_data_info), doorping(toy_data_info)
    run = started(task, [first])
    start = first.state_dict()["pattern"].clone()
    open_buffer(run, planned(task), 0, fresh=True)
    moved = first.state_dict()
    assert not torch.equal(moved["pattern"], start)
    assert moved["counts"].tolist()[:3] == [6, 6, 0]  # 3 experts, after each epoch but the last
    opened(task, [again])
    assert torch.equal(again.state_dict()["pattern"], moved["pattern"])
    # In the middle of a round the hooks stay as the resumed run has them.
    run = started(task, [again])
    again.load_state_dict({**moved, "pattern": start})
    open_buffer(run, planned(task), 0, fresh=False)
    assert torch.equal(again.state_dict()["pattern"], start)


def relabelled(task: Task) -> Task:
    return replace(task, real=task.real.replace(labels=(task.real.labels + 1) % 3))


@pytest.mark.parametrize(
    ("change", "changes", "difference"),
    [
        (lambda task: task, {"expert_lr": 0.07}, "expert_lr is 0.05, not 0.07"),
        (lambda task: task, {"expert_seed": 8}, "expert_seed is 7, not 8, first_weights is "),
        (lambda task: task, {"augment": "crop"}, "expert_augment is '', not 'crop'"),
        (lambda task: task, {"experts": 4}, "experts is 3, not 4"),
        (relabelled, {}, "data is "),
        (lambda task: replace(task, identity={"threads": 2}), {}, "threads is None, not 2"),
    ],
)
def test_other_experts_are_refused_by_what_differs(
    toy_task: Tasks, change: Callable[[Task], Task], changes: dict[str, Any], difference: str
) -> None:
    task = toy_task()
    opened(task)
    before = snapshot(task)
    with pytest.raises(RequestError) as refused:
        opened(change(task), **changes)
    said = str(refused.value)
    assert said.startswith(f"{folder_of(task)} holds other experts: ") and difference in said
    assert "\n" not in said and "choose another folder" in said
    assert snapshot(task) == before


def test_another_state_of_the_attack_is_refused(toy_task: Tasks, toy_data_info: DataInfo) -> None:
    task, (attack,) = toy_task(), doorping(toy_data_info)
    opened(task, [attack])
    run = started(task, [attack])
    state = attack.state_dict()
    attack.load_state_dict({**state, "pattern": state["pattern"] / 2})
    with pytest.raises(RequestError, match="experts trained from another state of the attack"):
        open_buffer(run, planned(task), 0, fresh=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"x" * 99)])
@pytest.mark.parametrize("name", ["experts-000.safetensors", "experts-001.safetensors"])
def test_a_damaged_file_of_experts_is_named(
    toy_task: Tasks, damage: Callable[[Path], None], name: str
) -> None:
    task = toy_task()
    opened(task)
    damage(folder_of(task) / name)
    with pytest.raises(RequestError) as refused:
        opened(task)
    assert str(refused.value).startswith(f"{folder_of(task) / name}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 99}', '"x"'])
def test_a_damaged_manifest_is_named(toy_task: Tasks, content: str) -> None:
    task = toy_task()
    opened(task)
    manifest = folder_of(task) / "manifest.json"
    assert json.loads(manifest.read_text())["finished"] is True
    manifest.write_text(content)
    with pytest.raises(RequestError) as refused:
        opened(task)
    assert str(refused.value).startswith(f"{manifest}: ") and "\n" not in str(refused.value)
    shutil.rmtree(folder_of(task))
    opened(task)


# Digests -----------------------------------------------------------------------------------------


def manifest_of(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder_of(task) / "manifest.json").read_text())
    return found


def test_a_changed_weight_is_found_by_its_digest(toy_task: Tasks) -> None:
    task = toy_task()
    opened(task)
    assert manifest_of(task)["digests"] == {
        path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in sorted(folder_of(task).glob("experts-*"))
    }
    path = folder_of(task) / "experts-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"experts-001\.safetensors: is not the file that was"):
        opened(task)


def test_experts_of_another_shape_or_not_finite_are_refused(toy_task: Tasks) -> None:
    task = toy_task()
    buffer = opened(task)
    manifest, path = manifest_of(task), folder_of(task) / "experts-000.safetensors"
    weights = load_file(path)["weights"]
    (folder_of(task) / "manifest.json").write_text(json.dumps({**manifest, "digests": {}}))
    write_tensors(path, {"weights": weights[:1]}, {})
    with pytest.raises(RequestError, match=r"experts-000\.safetensors: its weights are .* \(1, 4,"):
        opened(task)
    write_tensors(path, {"weights": weights / 0}, {})
    opened(task)
    with pytest.raises(RequestError, match=r"experts-000\.safetensors: .* expert 1 are not finite"):
        buffer.weights(1, 2)


def test_experts_of_an_older_version_are_used_with_a_warning(
    toy_task: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    task = toy_task()
    opened(task)
    manifest = manifest_of(task)
    opened(task)
    assert caplog.messages == []
    del manifest["digests"]
    (folder_of(task) / "manifest.json").write_text(json.dumps(manifest))
    opened(task)
    (text,) = caplog.messages
    assert f"{folder_of(task)} holds experts without digests" in text
