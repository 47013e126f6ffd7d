"""Trajectory matching: the paper's steps by hand, the learned rate, rounds, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from distillsec.attacks import ATTACKS, Attack, DataInfo
from distillsec.distill.augment import Augmentation
from distillsec.distill.backends.trajectory_matching import MTT, TrajectoryMatchingOptions
from distillsec.distill.backends.unroll import GradientName
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.loop import distil
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.files.safe import read_json
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, RequestError, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]
MEAN, STD = 0.5, 0.25
# A student of 5 steps on batches of 4 out of 6 images: orders of 4 and 2.
STUDENT: dict[str, Any] = {
    "student_steps": 5,
    "batch_syn": 4,
    "student_rate": 0.05,
    "lr_rate": 1e-4,
    "lr_img": 20.0,
    "train_epochs": 3,
    "expert_epochs": 2,
    "max_start_epoch": 2,
}


def doorping(data: DataInfo, **options: Any) -> Attack:
    settings = {"poison_rate": 0.2, "objective": "target-logit", "trigger_steps": 2, **options}
    return ATTACKS["doorping"](ATTACKS["doorping"].Options.model_validate(settings), data)


def experts_of(task: Task, round_: int = 0) -> Tensor:
    """All weights of a finished buffer, ``(experts, epochs + 1, P)``."""
    assert task.scratch is not None
    folder = task.scratch / f"round-{round_}"
    return torch.cat([load_file(path)["weights"] for path in sorted(folder.glob("experts-*"))])


# One step against the paper ----------------------------------------------------------------------


def logits(network: nn.Module, weights: list[Tensor], images: Tensor) -> Tensor:
    """The toy ConvNet's answer with other weights, layer by layer."""
    kernel, bias, scale, shift, matrix, offset = weights
    inside = functional.conv2d((images - MEAN) / STD, kernel, bias, padding=1)
    centred = inside - inside.mean((2, 3), keepdim=True)
    spread = (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    normed = centred / spread * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    pooled = functional.avg_pool2d(normed.relu(), 2).flatten(1)
    return pooled @ matrix.T + offset


def by_the_paper(
    task: Task, buffer: Tensor, images: Tensor, rate: Tensor, step: int, strategy: Any
) -> Tensor:
    """The loss of one iteration: a student unrolled by hand, tensor by tensor."""
    streams = task.streams
    draws, orders = streams.generator("draw", step), streams.generator("draw", step, 1)
    augments = streams.generator("augment", step)
    expert = int(torch.randint(len(buffer), (1,), generator=draws))
    epoch = int(torch.randint(2, (1,), generator=draws))
    network = task.network(0)
    sizes = [parameter.numel() for parameter in network.parameters()]
    shapes = [parameter.shape for parameter in network.parameters()]

    def parts(vector: Tensor) -> list[Tensor]:
        pieces = zip(vector.split(sizes), shapes, strict=True)
        return [piece.view(shape).clone() for piece, shape in pieces]

    start, target = parts(buffer[expert, epoch]), parts(buffer[expert, epoch + 2])
    now = [part.requires_grad_() for part in start]
    labels = torch.tensor([c for c in range(3) for _ in range(task.ipc)])
    batches: list[Tensor] = []
    for _ in range(5):
        if not batches:
            order = torch.randperm(len(labels), generator=orders)
            batches = [order[:4], order[4:]]
        rows = batches.pop()
        augmentation = Augmentation(strategy, Preprocessing((MEAN,), (STD,)))
        transform = augmentation.draw((len(rows), 1, 8, 8), augments, shared=False)
        answer = logits(network, now, transform(images[rows]))
        loss = -answer.log_softmax(1)[torch.arange(len(rows)), labels[rows]].mean()
        slopes = torch.autograd.grad(loss, now, create_graph=True)
        now = [weight - rate * slope for weight, slope in zip(now, slopes, strict=True)]
    ours = sum(((a - b) ** 2).sum() for a, b in zip(now, target, strict=True))
    way = sum(((a.detach() - b) ** 2).sum() for a, b in zip(start, target, strict=True))
    assert isinstance(ours, Tensor)
    return ours / way


@pytest.mark.parametrize("strategy", [(), ("crop", "scale", "color")])
@pytest.mark.parametrize("gradient", ["exact", "recompute"])
def test_mtt_is_the_papers_algorithm(
    toy_task: Tasks, toy_backend: Backends, gradient: str, strategy: tuple[str, ...]
) -> None:
    task = toy_task(ipc=2, iterations=3)
    augment = "_".join(strategy) or "none"
    made = distil(task, toy_backend("mtt", task, **STUDENT, augment=augment, gradient=gradient))
    buffer = experts_of(task)
    start = torch.randn(6, 1, 8, 8, generator=task.streams.generator("init"))
    images, rate = start, torch.tensor(0.05)
    velocities = [torch.zeros_like(images), torch.zeros_like(rate)]
    for step in range(3):
        leaves = [images.clone().requires_grad_(), rate.clone().requires_grad_()]
        loss = by_the_paper(task, buffer, leaves[0] * STD + MEAN, leaves[1], step, strategy)
        slopes = torch.autograd.grad(loss, leaves)
        velocities = [0.5 * v + slope for v, slope in zip(velocities, slopes, strict=True)]
        images, rate = images - 20 * velocities[0], rate - 1e-4 * velocities[1]
    assert (images - start).abs().mean() > 1e-3
    torch.testing.assert_close(made.batch.images, images * STD + MEAN, rtol=1e-3, atol=2e-5)
    assert abs(rate.item() - 0.05) > 1e-5
    assert made.recipe.lr == pytest.approx(rate.item(), rel=1e-5)
    assert made.batch.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_loss_is_a_share_of_the_experts_way(toy_task: Tasks, toy_backend: Backends) -> None:
    task = toy_task(ipc=2)
    found = {}
    for gradient in get_args(GradientName):
        backend = toy_backend("mtt", task, **STUDENT, augment="none", gradient=gradient)
        run = start_run(task, backend)
        backend.prepare(run)
        run.position.enter(1, 0)
        images = run.synthetic.batch().images.requires_grad_()
        network = backend.network(run)
        (loss,) = backend.losses(run, network, Batch(images=images, labels=run.synthetic.labels))
        inputs = (images, run.synthetic.learned["student_rate"])
        found[gradient] = loss.item(), *torch.autograd.grad(loss, inputs)
        before = [weight.clone() for weight in network.parameters()]
        backend.advance(run, network, run.synthetic.batch())
        moved = zip(before, network.parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in moved)
    wanted = by_the_paper(task, experts_of(task), images, torch.tensor(0.05), 1, ())
    for value, *_ in found.values():
        assert value == pytest.approx(wanted.item(), rel=1e-4)
    for exact, recomputed, tesla in zip(*(found[name][1:] for name in found), strict=True):
        torch.testing.assert_close(recomputed, exact, rtol=1e-4, atol=1e-7)
        assert (tesla - exact).abs().max() > 1e-3 * exact.abs().max()


# The rate ----------------------------------------------------------------------------------------


def test_a_rate_that_falls_to_zero_stops_the_run(toy_task: Tasks, toy_backend: Backends) -> None:
    task = toy_task(ipc=2, iterations=6)
    for lr_rate in (1e4, 0.0):
        backend = toy_backend("mtt", task, **{**STUDENT, "lr_rate": lr_rate, "student_rate": 5.0})
        if lr_rate:
            refusal = r"^the student's learning rate fell to -\S+, it must stay above 0: lower"
            with pytest.raises(RunError, match=refusal):
                distil(task, backend)
        else:
            assert distil(task, backend).recipe.lr == 5.0


# Rounds ------------------------------------------------------------------------------------------


def test_every_round_trains_its_experts_anew(
    toy_task: Tasks, toy_data_info: DataInfo, toy_backend: Backends
) -> None:
    task, attack = toy_task(ipc=2, iterations=5), doorping(toy_data_info, moves_with="both")
    distil(task, toy_backend("mtt", task, rounds=2), [attack])
    first, second = experts_of(task, 0), experts_of(task, 1)
    assert not torch.allclose(first[:, 0], second[:, 0], atol=1e-2)
    assert task.scratch is not None
    assert sorted(path.name for path in task.scratch.iterdir()) == ["round-0", "round-1"]
    kept = [read_json(task.scratch / f"round-{number}" / "manifest.json") for number in (0, 1)]
    assert [each["identity"]["round"] for each in kept] == [0, 1]
    assert kept[0]["hooks_before"] != kept[1]["hooks_before"]  # the trigger as it stands
    # 2 experts of 2 epochs in each round, and 5 students of which the last one moves nothing.
    assert attack.counters()["trigger_updates"] == 2 + 2 + 4


@pytest.mark.parametrize(("moves_with", "updates"), [("experts", 2), ("students", 3), ("both", 5)])
def test_the_trigger_moves_with_experts_or_students_or_both(
    toy_task: Tasks, toy_data_info: DataInfo, toy_backend: Backends, moves_with: str, updates: int
) -> None:
    task, attack = toy_task(ipc=2, iterations=4), doorping(toy_data_info, moves_with=moves_with)
    distil(task, toy_backend("mtt", task), [attack])
    assert attack.counters()["trigger_updates"] == updates


def test_runs_of_several_seeds_share_a_buffer_of_its_own_seed(
    toy_task: Tasks, toy_backend: Backends, tmp_path: Path
) -> None:
    scratch, found = tmp_path / "shared", []
    for seed in (0, 1):
        task = toy_task(ipc=2, seed=seed, scratch=scratch)
        found.append(distil(task, toy_backend("mtt", task, expert_seed=5)).batch.images)
    assert (found[0] - found[1]).abs().max() > 0.1
    alone = toy_task(ipc=2, seed=1, scratch=tmp_path / "alone")
    again = distil(alone, toy_backend("mtt", alone, expert_seed=5)).batch.images
    assert torch.equal(again, found[1])
    with pytest.raises(RequestError, match="expert_seed is 5, not 1"):
        other = toy_task(ipc=2, seed=1, scratch=scratch)
        distil(other, toy_backend("mtt", other))


# Settings ----------------------------------------------------------------------------------------


def test_experts_too_short_for_their_students_are_refused(
    toy_task: Tasks, toy_backend: Backends
) -> None:
    settings = {"train_epochs": 3, "expert_epochs": 2, "augment": "none"}
    assert toy_backend("mtt", toy_task(), **settings, max_start_epoch=2)
    with pytest.raises(RequestError) as refused:
        toy_backend("mtt", toy_task(), **settings, max_start_epoch=3)
    said = str(refused.value)
    assert "wants experts of 4 epochs, train_epochs is 3" in said and "\n" not in said


def test_the_published_defaults() -> None:
    ours = TrajectoryMatchingOptions().model_dump()
    wanted = {
        "iterations": 5000,
        "init": "real",
        "lr_img": 1000.0,
        "momentum_img": 0.5,
        "student_steps": 20,
        "batch_syn": None,
        "student_rate": 0.01,
        "lr_rate": 1e-5,
        "expert_epochs": 3,
        "max_start_epoch": 25,
        "gradient": "exact",
        "experts": 100,
        "train_epochs": 50,
        "expert_lr": 0.01,
        "expert_momentum": 0.0,
        "expert_batch": 256,
    }
    assert ours == ours | wanted
    augment = "color_crop_cutout_flip_scale_rotate"
    assert (MTT.victim_epochs, MTT.victim_lr, MTT.victim_augment) == (1000, None, augment)
    assert ours["augment"] == augment
