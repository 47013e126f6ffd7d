"""Gradient matching: the published step, micro-batches, siamese batches, batch norm, learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distillsec.distill.augment import Transform
from distillsec.distill.backends.gradient_matching import (
    DC,
    DSA,
    GradientMatchingOptions,
    SiameseOptions,
    published_loops,
)
from distillsec.distill.batch_norm import batch_norm_layers
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.loop import distil
from distillsec.distill.core.real import RealData
from distillsec.distill.core.run import Observer
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.data.registry import load_dataset
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.randomness import Streams
from distillsec.distill.slopes import mean_slopes
from distillsec.distill.training import accuracy, fit
from distillsec.distill.types import Batch, Distillate, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
MEAN, STD = 0.5, 0.25


def dc(task: Task, **options: Any) -> Backend:
    return DC(GradientMatchingOptions(**options), ipc=task.ipc, recipe=task.recipe)


def dsa(task: Task, **options: Any) -> Backend:
    return DSA(SiameseOptions(**options), ipc=task.ipc, recipe=task.recipe)


# Published settings ----------------------------------------------------------------------------


def test_the_published_loops_are_met_and_interpolated() -> None:
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: published_loops(ipc) for ipc in published} == published
    every = [published_loops(ipc) for ipc in range(1, 51)]
    assert all(outer >= 1 and inner >= 1 for outer, inner in every)
    assert all(later[0] >= earlier[0] for earlier, later in pairwise(every))
    inner = [pair[1] for pair in every]
    assert inner[:10] == sorted(inner[:10])
    assert inner[9:] == sorted(inner[9:], reverse=True)
    assert published_loops(15) == (15, 38)  # half-way between 50 and 25
    assert published_loops(100) == (50, 10)


def test_the_published_defaults() -> None:
    ours = GradientMatchingOptions()
    values = (ours.iterations, ours.init, ours.lr_img, ours.momentum_img, ours.lr_net)
    assert values == (1000, "noise", 0.1, 0.5, 0.01)
    assert (ours.batch_real, ours.batch_train, ours.distance) == (256, 256, "layerwise")
    assert SiameseOptions().init == "real"
    assert SiameseOptions().augment == "color_crop_cutout_flip_scale_rotate"
    assert (DC.victim_epochs, DSA.victim_epochs) == (300, 1000)
    assert DSA.victim_augment == SiameseOptions().augment


def test_options_replace_the_published_loops(toy_task: Tasks) -> None:
    assert dc(toy_task(ipc=10)).steps() == 10
    assert dc(toy_task(ipc=10), outer_loop=3).steps() == 3
    assert dsa(toy_task(ipc=50)).steps() == 50


# The real gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 32, 70])
def test_the_real_gradient_in_pieces_is_the_whole_batchs(toy_task: Tasks, rows: int) -> None:
    task = toy_task()
    network = task.network(0)
    weights = list(network.parameters())
    batch = task.real.rows(torch.arange(rows))
    loss = functional.cross_entropy(network(batch.images), batch.labels)
    whole = torch.autograd.grad(loss, weights)
    value, pieces = mean_slopes(network, weights, batch, 32)
    torch.testing.assert_close(value, loss.detach())
    for piece, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(piece, expected, rtol=1e-5, atol=1e-6)


# One step against the paper --------------------------------------------------------------------


def by_the_paper(task: Task, batch_real: int, steps: int, inner: int) -> Tensor:
    """DC's algorithm 1 for one network, written out; same draws, nothing shared."""
    streams, real = task.streams, task.real
    images = torch.randn(3 * task.ipc, 1, 8, 8, generator=streams.generator("init"))
    labels = torch.tensor([c for c in range(3) for _ in range(task.ipc)])
    velocity = torch.zeros_like(images)
    network = task.network(streams.integer("network", 0, 0))
    for step in range(steps):
        images.requires_grad_()
        draws = streams.generator("draw", step)
        total = torch.zeros(())
        for c in range(3):
            members = torch.tensor([row for row in range(90) if real.labels[row] == c])
            rows = members[torch.randperm(len(members), generator=draws)[:batch_real]]
            loss = functional.cross_entropy(network(real.images[rows]), real.labels[rows])
            wanted = torch.autograd.grad(loss, list(network.parameters()))
            ours = images[labels == c] * STD + MEAN
            loss = functional.cross_entropy(network(ours), torch.full((task.ipc,), c))
            given = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
            for g, w in zip(given, wanted, strict=True):
                if g.dim() == 1:
                    continue
                for row, other in zip(g.reshape(len(g), -1), w.reshape(len(w), -1), strict=True):
                    total = total + 1 - row @ other / (row.norm() * other.norm() + 1e-6)
        (slope,) = torch.autograd.grad(total, images)
        velocity = 0.5 * velocity + slope
        images = (images - 0.1 * velocity).detach()
        orders = streams.generator("network", step)
        for _ in range(inner):
            order = torch.randperm(len(images), generator=orders)
            loss = functional.cross_entropy(network(images[order] * STD + MEAN), labels[order])
            slopes = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for weight, each in zip(network.parameters(), slopes, strict=True):
                    weight.sub_(0.01 * each)
    return images * STD + MEAN


@pytest.mark.parametrize("steps", [1, 3])
def test_dc_is_the_papers_algorithm(toy_task: Tasks, steps: int) -> None:
    task = toy_task(ipc=2, iterations=1)
    backend = dc(task, outer_loop=steps, inner_loop=2, batch_real=20)
    expected = by_the_paper(task, batch_real=20, steps=steps, inner=2)
    start = task.streams.generator("init")
    moved = expected - (torch.randn(6, 1, 8, 8, generator=start) * STD + MEAN)
    assert moved.abs().mean() > 1e-4
    torch.testing.assert_close(distil(task, backend).batch.images, expected, rtol=1e-4, atol=1e-5)


# Siamese augmentation --------------------------------------------------------------------------


def test_dsa_puts_real_and_synthetic_through_the_same_transform(
    toy_task: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str | None, Tensor, int, bool]] = []
    apply = Transform.__call__

    def spy(self: Transform, pixels: Tensor) -> Tensor:
        seen.append((self.operation, self.parameters, len(pixels), pixels.requires_grad))
        return apply(self, pixels)

    monkeypatch.setattr(Transform, "__call__", spy)
    task = toy_task(ipc=2)
    backend = dsa(task, init="noise", batch_real=20, outer_loop=2, inner_loop=3)
    run = start_run(task, backend)
    run.position.enter(0, 0)
    network = backend.network(run)
    pixels = run.synthetic.pixels()
    losses = list(backend.losses(run, network, Batch(images=pixels, labels=run.synthetic.labels)))
    assert len(seen) == 6  # a real and a synthetic batch for each of 3 classes
    for real, ours in zip(seen[::2], seen[1::2], strict=True):
        assert real[0] == ours[0]
        assert real[1] is ours[1]
        assert len(real[1]) == 1  # one set of parameters for all images
        assert (real[2:], ours[2:]) == ((20, False), (2, True))
    assert not torch.equal(seen[0][1], seen[2][1])  # anew for every class
    torch.stack(losses).sum().backward()
    gradient = run.synthetic.leaf.grad
    assert gradient is not None
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
    seen.clear()
    backend.advance(run, network, run.synthetic.batch())
    assert [rows for _, _, rows, _ in seen] == [6] * 3
    assert all(len(parameters) == 6 for _, parameters, _, _ in seen)  # one set for each image


def test_dsa_without_operations_is_dc(toy_task: Tasks) -> None:
    task = toy_task(ipc=2)
    settings: dict[str, Any] = {"outer_loop": 2, "inner_loop": 1, "batch_real": 20}
    plain = distil(task, dc(task, **settings)).batch.images
    assert torch.equal(distil(task, dsa(task, augment="none", **settings)).batch.images, plain)
    assert not torch.equal(distil(task, dsa(task, augment="crop", **settings)).batch.images, plain)


# Batch norm ------------------------------------------------------------------------------------


def test_batch_norm_takes_its_statistics_from_real_images(toy_task: Tasks) -> None:
    task = toy_task(norm="batch")
    backend = dc(task, batch_real=20, inner_loop=1)
    run = start_run(task, backend)
    run.position.enter(0, 0)
    network = backend.network(run)
    (norm,) = batch_norm_layers(network)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    draws = task.streams.generator("draw", 0, 1)
    members = [torch.nonzero(task.real.labels == c)[:, 0] for c in range(3)]
    rows = torch.cat([each[torch.randperm(30, generator=draws)[:16]] for each in members])
    inside = convolution((task.real.images[rows] - MEAN) / STD).detach()
    means, variances = inside.mean((0, 2, 3)), inside.transpose(0, 1).flatten(1).var(1)

    losses = backend.losses(run, network, run.synthetic.batch())
    next(losses)
    torch.testing.assert_close(norm.running_mean, 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances)
    assert not norm.training
    frozen = norm.running_mean.clone()
    assert len(list(losses)) == 2
    assert torch.equal(norm.running_mean, frozen)
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 1
    backend.advance(run, network, run.synthetic.batch())
    assert norm.training
    assert not torch.equal(norm.running_mean, frozen)


def test_other_norms_draw_nothing_extra(toy_task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for norm in ("instance", "batch"):
        task = toy_task(norm=norm)
        drawn: list[int] = []
        draw = RealData.draw

        def spy(self: RealData, label: int, count: int, generator: torch.Generator) -> Batch:
            drawn.append(count)  # noqa: B023
            return draw(self, label, count, generator)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(RealData, "draw", spy)
            distil(replace(task, iterations=1), dc(task, batch_real=20))
        counts[norm] = drawn
    assert counts == {"instance": [20] * 3, "batch": [16] * 3 + [20] * 3}


# Learning --------------------------------------------------------------------------------------


class Losses(Observer):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_iteration(self, iteration: int, loss: float, made: Distillate, state: Any) -> None:
        self.losses.append(loss)


@pytest.mark.parametrize(("make", "augment"), [(dc, ""), (dsa, "crop_scale_rotate")])
def test_a_set_of_digits_is_learned(make: Callable[..., Backend], augment: str) -> None:
    data = load_dataset("digits")
    recipe = Recipe(preprocessing=Preprocessing(data.mean, data.std), epochs=100, augment=augment)
    spec = NetworkSpec(width=16, depth=2)

    def network(seed: int) -> nn.Module:
        return build_network(
            spec,
            image_shape=(1, 8, 8),
            classes=10,
            preprocessing=Preprocessing(data.mean, data.std),
            seed=seed,
        )

    task = Task(
        real=data.train,
        classes=10,
        ipc=1,
        iterations=40,
        init="noise",
        clip_pixels=False,
        recipe=recipe,
        network=network,
        streams=Streams(0),
    )
    options = {"augment": augment} if augment else {}
    watcher = Losses()
    backend = make(task, batch_real=32, lr_img=1.0, **options)
    noise = start_run(task, backend).synthetic.batch()
    learned = distil(task, backend, observer=watcher)
    assert sum(watcher.losses[-10:]) < 0.9 * sum(watcher.losses[:10])

    def clean_test_accuracy(batch: Batch) -> float:
        return accuracy(fit(network(1), batch, recipe, torch.Generator().manual_seed(1)), data.test)

    assert clean_test_accuracy(learned.batch) > clean_test_accuracy(noise) + 0.2
