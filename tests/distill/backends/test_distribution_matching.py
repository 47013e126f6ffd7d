"""Distribution matching: the published step written out, what is trained, learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distillsec.distill.augment import Augmentation, Transform
from distillsec.distill.backends.distribution_matching import DM, DistributionMatchingOptions
from distillsec.distill.batch_norm import batch_norm_layers
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]
MEAN, STD, ROWS = 0.5, 0.25, 20
SPACE = Preprocessing((MEAN,), (STD,))


def embedded(network: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, network.embed(images))  # type: ignore[operator]


def by_the_paper(
    task: Task, network: nn.Module, images: Tensor, strategy: Any, step: int
) -> Tensor:
    """The paper's loss, class by class and feature by feature; same draws, nothing shared."""
    draws = task.streams.generator("draw", step)
    augments = task.streams.generator("augment", step)
    real, fake = [], []
    for label in range(3):
        members = [row for row in range(90) if task.real.labels[row] == label]
        order = torch.randperm(len(members), generator=draws)[:ROWS]
        batch = task.real.images[torch.tensor(members)[order]]
        ours = images[label * task.ipc : (label + 1) * task.ipc]
        same = Augmentation(strategy, SPACE).draw(batch.shape, augments, shared=True)
        real.append(same(batch))
        fake.append(same(ours))
    if batch_norm_layers(network):  # all classes in one batch, whose statistics they share
        whole = (embedded(network, torch.cat(real)), embedded(network, torch.cat(fake)))
        sides = [whole[0].split(ROWS), whole[1].split(task.ipc)]
    else:
        sides = [tuple(embedded(network, each) for each in side) for side in (real, fake)]
    total = torch.zeros(())
    for theirs, mine in zip(*sides, strict=True):
        for feature in range(theirs.shape[1]):
            apart = sum(row[feature] for row in theirs) / len(theirs)
            apart = apart - sum(row[feature] for row in mine) / len(mine)
            total = total + apart**2
    return total


@pytest.mark.parametrize("strategy", [(), ("crop", "scale", "rotate", "color", "cutout")])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_loss_is_the_papers(
    toy_task: Tasks, toy_backend: Backends, norm: str, strategy: tuple[str, ...]
) -> None:
    task = toy_task(ipc=2, norm=norm)
    backend = toy_backend("dm", task, batch_real=ROWS, augment="_".join(strategy) or "none")
    run = start_run(task, backend)
    for iteration in range(3):
        run.position.enter(iteration, 0)
        network = backend.network(run)
        images = run.synthetic.batch().images.requires_grad_()
        losses = list(
            backend.losses(run, network, Batch(images=images, labels=run.synthetic.labels))
        )
        assert len(losses) == (1 if norm == "batch" else 3)
        loss = torch.stack(losses).sum()
        fresh = task.network(task.streams.integer("network", iteration, 0)).train()
        book = images.detach().clone().requires_grad_()
        wanted = by_the_paper(task, fresh, book, strategy, iteration)
        assert wanted.item() > 1e-2
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
        (slope,), (expected,) = (
            torch.autograd.grad(*each) for each in ((loss, images), (wanted, book))
        )
        assert bool((slope.flatten(1).abs().amax(1) > 0).all())  # it reaches every image
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)


def test_a_step_is_sgd_with_momentum_on_normalised_images(
    toy_task: Tasks, toy_backend: Backends
) -> None:
    task = toy_task(ipc=2, iterations=3)
    backend = toy_backend("dm", task, batch_real=ROWS, augment="none", lr_img=0.3)
    start = torch.randn(6, 1, 8, 8, generator=task.streams.generator("init"))
    images, velocity = start, torch.zeros_like(start)
    for step in range(3):
        network = task.network(task.streams.integer("network", step, 0))
        leaf = images.clone().requires_grad_()
        loss = by_the_paper(task, network, leaf * STD + MEAN, (), step)
        velocity = 0.5 * velocity + torch.autograd.grad(loss, leaf)[0]
        images = images - 0.3 * velocity
    found = distil(task, backend).batch.images
    assert (images - start).abs().mean() > 1e-3
    torch.testing.assert_close(found, images * STD + MEAN, rtol=1e-4, atol=1e-5)


def test_both_sides_of_a_class_share_one_transform(
    toy_task: Tasks, toy_backend: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, int]] = []
    apply = Transform.__call__

    def spy(self: Transform, pixels: Tensor) -> Tensor:
        seen.append((self.parameters, len(pixels)))
        return apply(self, pixels)

    monkeypatch.setattr(Transform, "__call__", spy)
    task = toy_task(ipc=2, iterations=2)
    distil(task, toy_backend("dm", task, augment="crop_scale_rotate"))
    assert [rows for _, rows in seen] == [16, 2] * 6
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert all(real[0] is ours[0] and len(real[0]) == 1 for real, ours in pairs)
    drawn = {tuple(real[0].flatten().tolist()) for real, _ in pairs}
    assert len(drawn) > 3  # anew for every class and step


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_network_is_random_and_stays_so(
    toy_task: Tasks, toy_backend: Backends, norm: str
) -> None:
    shown: list[dict[str, Tensor]] = []

    class Listener(Hook):
        def on_network(self, moment: Moment) -> None:
            assert moment.network is not None
            shown.append({name: value.clone() for name, value in moment.network.named_parameters()})

    task = toy_task(ipc=2, iterations=4, norm=norm)
    distil(task, toy_backend("dm", task), [Listener()])
    assert len(shown) == 3  # another network in each iteration, and none after the last step
    for iteration, weights in enumerate(shown):
        fresh = task.network(task.streams.integer("network", iteration, 0))
        assert all(torch.equal(value, weights[name]) for name, value in fresh.named_parameters())
    assert not torch.equal(*(weights["head.weight"] for weights in shown[:2]))


def test_the_loss_falls(toy_task: Tasks, toy_backend: Backends) -> None:
    task = toy_task(ipc=2, iterations=60, width=8)
    backend = toy_backend("dm", task, augment="none", batch_real=30, lr_img=5.0)

    def loss(images: Tensor) -> float:
        """Under networks that the run never saw."""
        found = 0.0
        for seed in range(5):
            network = task.network(seed)
            for label in range(3):
                real = embedded(network, task.real.images[task.real.labels == label])
                ours = embedded(network, images[2 * label : 2 * label + 2])
                found += (real.mean(0) - ours.mean(0)).square().sum().item()
        return found

    start = start_run(task, backend).synthetic.batch().images
    made = distil(task, backend)
    assert loss(made.batch.images) < 0.2 * loss(start)
    assert made.recipe is task.recipe


def test_the_published_defaults() -> None:
    ours = DistributionMatchingOptions()
    values = (ours.iterations, ours.init, ours.lr_img, ours.momentum_img, ours.batch_real)
    assert values == (20_000, "real", 1.0, 0.5, 256)
    assert ours.augment == DM.victim_augment == "color_crop_cutout_flip_scale_rotate"
    assert (DM.victim_epochs, DM.victim_lr) == (1000, 0.01)
