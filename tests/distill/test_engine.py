"""The fast path against the plain one: layers, training, every backend, a moving trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from distillsec.attacks.base import DataInfo
from distillsec.attacks.doorping import Doorping
from distillsec.attacks.unrolled import Unrolled
from distillsec.distill.captured import Captured, side_by_side
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.finite import FiniteChecks
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.engine import Engine, Precision
from distillsec.distill.fast_layers import InstanceNorm, PoolByReshape, with_fast_layers
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.notices import warn
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.trainer import training
from distillsec.distill.training import fit, in_full_pieces, predict, sgd, train_epoch
from distillsec.distill.types import Batch, Distillate, RunError

Tasks = Callable[..., Task]
Backends = Callable[..., Backend]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# float32 sums in another order, through a few steps of a toy task.
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def fast(precision: Precision = "float32", *, compiles: bool = False) -> Engine:
    return Engine("fast", precision, compiles=compiles)


@pytest.fixture
def on(toy_task: Tasks) -> Tasks:
    """``toy_task`` on a device, with an engine: ``on("cuda", engine, ipc=2)``."""

    def make(device: str, engine: Engine, **settings: Any) -> Task:
        task = toy_task(**settings)
        own = task.network
        return replace(
            task,
            real=task.real.to(device),
            network=lambda seed: own(seed).to(device),
            engine=engine,
        )

    return make


# Layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 9, 11])
@pytest.mark.parametrize("norm", ["instance", "batch", "layer", "group", "none"])
def test_fast_layers_compute_the_same(side: int, norm: Any) -> None:
    network = build_network(
        NetworkSpec(width=8, depth=2, norm=norm),
        image_shape=(2, side, side),
        classes=3,
        preprocessing=Preprocessing((0.4, 0.5), (0.2, 0.3)),
        seed=1,
    ).double()
    network.normalise.double()
    twin = with_fast_layers(network)
    images = torch.rand(5, 2, side, side, dtype=torch.float64, requires_grad=True)
    ours, theirs = twin(images), network(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = list(network.parameters())
    for value in zip(_slopes(ours, weights, images), _slopes(theirs, weights, images), strict=True):
        torch.testing.assert_close(*value, rtol=1e-9, atol=1e-9)


def _slopes(logits: Tensor, weights: list[nn.Parameter], images: Tensor) -> list[Tensor]:
    """First derivatives at the weights, and a second one at the images, as gradient matching."""
    first = torch.autograd.grad(logits.square().sum(), weights, create_graph=True)
    summed = torch.stack([each.pow(3).sum() for each in first]).sum()
    return [*first, *torch.autograd.grad(summed, images)]


def test_fast_layers_share_the_weights_and_take_what_they_can() -> None:
    network = build_network(
        NetworkSpec(width=8, depth=1),
        image_shape=(1, 8, 8),
        classes=3,
        preprocessing=Preprocessing((0.4,), (0.2,)),
        seed=1,
    )
    twin = with_fast_layers(network)
    kinds = [type(layer) for layer in twin.modules()]
    assert InstanceNorm in kinds and PoolByReshape in kinds
    assert not {nn.GroupNorm, nn.AvgPool2d} & set(kinds)
    theirs = {id(weight) for weight in network.parameters()}
    assert {id(weight) for weight in twin.parameters()} == theirs


# Graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_function_answers_new_inputs_and_keeps_its_state(device: str) -> None:
    total = torch.zeros(3, device=device)

    def add(values: Tensor) -> tuple[Tensor, ...]:
        total.add_(values)
        return (total * 2,)

    captured = Captured(add, [total])
    for round_ in range(1, 4):
        (answer,) = captured(torch.ones(3, device=device))
        assert answer.tolist() == [2.0 * round_] * 3
    (longer,) = captured(torch.full((1,), 5.0, device=device))
    assert longer.tolist() == [16.0] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_tasks_side_by_side_answer_in_order(device: str) -> None:
    numbers = [torch.full((100,), float(n), device=device) for n in range(12)]
    tasks = [partial(torch.sum, number.square()) for number in numbers]
    found = side_by_side(tasks, torch.device(device))
    assert [each.item() for each in found] == [100.0 * n * n for n in range(12)]


def test_pieces_are_of_one_size_and_answers_in_order() -> None:
    sizes = []

    def answer(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.sum(dim=(1, 2, 3))

    images = torch.rand(75, 1, 2, 2)
    torch.testing.assert_close(in_full_pieces(answer, images), images.sum(dim=(1, 2, 3)))
    assert sizes == [25, 25, 25]


@pytest.mark.parametrize("device", DEVICES)
def test_what_must_be_finite_is_named(device: str) -> None:
    checks = FiniteChecks()
    checks.expect(torch.ones(2, device=device), "the first")
    with pytest.raises(RunError, match=r"^the second$"):
        checks.expect(torch.tensor([1.0, torch.nan], device=device), "the second")
        checks.expect(torch.tensor([torch.inf], device=device), "the third")
        checks.read()
    checks.read()  # nothing waits any more


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_fast_training_ends_where_the_plain_one_does(on: Tasks, device: str, norm: str) -> None:
    task = on(device, fast(), norm=norm)
    recipe = replace(task.recipe, epochs=6, batch_size=32, augment="crop_scale", lr=0.05)
    trained, answers = [], []
    for engine in (Engine(), task.engine):
        network = task.network(3)
        generator = torch.Generator().manual_seed(5)
        trained.append(fit(network, task.real, recipe, generator, engine))
        answers.append(predict(trained[-1], task.real.images, engine))
    plain, quick = (network.state_dict() for network in trained)
    for name, value in plain.items():
        torch.testing.assert_close(quick[name], value, **CLOSE)
    assert (answers[0] == answers[1]).float().mean() > 0.97


@pytest.mark.parametrize("device", DEVICES)
def test_momentum_is_kept_between_trainings(on: Tasks, device: str) -> None:
    """An expert's epochs are trainings of their own; a checkpoint holds the momentum."""
    task = on(device, fast())
    recipe = replace(task.recipe, momentum=0.9, batch_size=45)
    found = []
    for engine in (Engine(), task.engine):
        network, generator = task.network(3), torch.Generator().manual_seed(5)
        optimiser = sgd(network, recipe)
        for _ in range(3):
            with training(network, optimiser, engine) as trainer:
                train_epoch(trainer, task.real, recipe, generator)
        found.append([state["momentum_buffer"] for state in optimiser.state.values()])
    for plain, quick in zip(*found, strict=True):
        torch.testing.assert_close(quick, plain, **CLOSE)


def test_two_trainings_at_once_do_not_mix(on: Tasks) -> None:
    task = on("cpu", fast())
    one, other = task.network(1), task.network(2)
    before = [weight.detach().clone() for weight in other.parameters()]
    with training(one, sgd(one, task.recipe), task.engine) as trainer:
        trainer.step(task.real)
        fit(task.network(5), task.real, task.recipe, torch.Generator(), task.engine)
        assert predict(other, task.real.images, task.engine).shape == (90,)
    again = task.network(1)
    with training(again, sgd(again, task.recipe)) as trainer:
        trainer.step(task.real)
    for ours, theirs in zip(one.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert all(map(torch.equal, before, other.parameters()))


def test_a_users_network_runs_plainly_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(nn.Linear):
        """Of no kind that is known."""

    assert fast().static(Mine(2, 2)) is None
    assert "network Mine runs plainly" in caplog.text


# Distillation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("name", ["dc", "dsa", "dm", "mtt", "dd"])
def test_a_fast_distillation_ends_where_the_plain_one_does(
    on: Tasks, toy_backend: Backends, name: str, norm: str, device: str
) -> None:
    images = []
    for engine in (Engine(), fast()):
        task = on(device, engine, ipc=2, iterations=3, norm=norm)
        scratch = None if task.scratch is None else task.scratch / engine.speed
        task = replace(task, scratch=scratch)
        images.append(distil(task, toy_backend(name, task)).batch.images)
    torch.testing.assert_close(images[1], images[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["dc", "dm", "mtt"])
def test_a_resumed_fast_run_has_the_same_bits(on: Tasks, toy_backend: Backends, name: str) -> None:
    class Keeper(Observer):
        kept: LoopState | None = None

        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
        ) -> None:
            if iteration == 2:
                self.kept = state()

    keeper, task = Keeper(), on("cpu", fast(), ipc=2, iterations=4)
    whole = distil(task, toy_backend(name, task), observer=keeper)
    again = replace(task, engine=fast())
    resumed = distil(again, toy_backend(name, again), state=keeper.kept)
    assert torch.equal(whole.batch.images, resumed.batch.images)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["neuron", "target-logit"])
def test_a_trigger_moves_as_on_the_plain_path(
    on: Tasks, toy_backend: Backends, toy_data_info: DataInfo, device: str, objective: str
) -> None:
    patterns = []
    for engine in (Engine(), fast()):
        task = on(device, engine, ipc=2, iterations=2)
        options = Doorping.Options(poison_rate=0.1, trigger_size=3, objective=objective)
        attack = Doorping(options, replace(toy_data_info, device=torch.device(device)))
        distil(task, toy_backend("dc", task), [attack])
        patterns.append(attack.trigger.tensors()["pattern"])
        assert attack.counters()["trigger_updates"] == 3
    torch.testing.assert_close(patterns[1], patterns[0], rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_students_are_unrolled_as_on_the_plain_path(
    on: Tasks, toy_backend: Backends, toy_data_info: DataInfo, device: str, norm: str
) -> None:
    images = []
    for engine in (Engine(), fast()):
        task = on(device, engine, ipc=2, iterations=2, norm=norm)
        options = Unrolled.Options(trigger_size=2, unroll_warmup=3, unroll_steps=2)
        attack = Unrolled(options, replace(toy_data_info, device=torch.device(device)))
        images.append(distil(task, toy_backend("dc", task), [attack]).batch.images)
    torch.testing.assert_close(images[1], images[0], rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_fast_run_that_diverges_names_the_step(
    on: Tasks, toy_backend: Backends, device: str
) -> None:
    task = on(device, fast(), iterations=5)
    with pytest.raises(RunError, match=r"the distillation diverged: .* is not finite at step"):
        distil(task, toy_backend("dc", task, lr_img=1e38))


@pytest.mark.gpu
def test_an_answer_that_is_not_finite_is_found_on_a_gpu(on: Tasks, toy_backend: Backends) -> None:
    class Spoiler(Hook):
        name = "spoiler"

        def on_draw(self, moment: Moment, clean: Batch) -> Batch:
            return clean.replace(images=clean.images * torch.nan)

    task = on("cuda", fast())
    with pytest.raises(RunError, match=r"^spoiler\.on_draw at step 0: images: values are not"):
        distil(task, toy_backend("dc", task), [Spoiler()])


@pytest.mark.parametrize(
    ("device", "precision", "share"),
    [
        ("cpu", "float32", 1e-5),
        ("cpu", "bf16", 6e-2),
        *(
            pytest.param("cuda", precision, share, marks=pytest.mark.gpu)
            for precision, share in (("float32", 1e-5), ("tf32", 1e-2), ("bf16", 6e-2))
        ),
    ],
)
def test_the_synthetic_gradient_is_as_precise_as_is_said(
    on: Tasks, toy_backend: Backends, device: str, precision: Precision, share: float
) -> None:
    """The images' change after one step, against that of the plain path in float32 on the CPU."""
    ends = []
    for where, engine in (("cpu", Engine()), (device, fast(precision))):
        engine.apply()
        task = on(where, engine, ipc=4, iterations=1, width=16)
        backend = toy_backend("dc", task, outer_loop=1, inner_loop=0)
        ends.append(distil(task, backend).batch.images.cpu())
    Engine().apply()
    start = distil(task, toy_backend("dc", task, outer_loop=1, inner_loop=0, lr_img=1e-30))
    wanted = ends[0] - start.batch.images.cpu()
    assert (ends[1] - ends[0]).norm() < share * wanted.norm()


def test_passes_run_where_nothing_can_be_compiled(
    on: Tasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **_: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise TorchDynamoException("no header Python.h\nmore lines")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    warn.cache_clear()
    task = on("cpu", fast(compiles=True))
    network = task.network(0)
    found = predict(network, task.real.images, task.engine)
    assert torch.equal(found, predict(network, task.real.images))
    assert "run without being compiled: TorchDynamoException: no header Python.h" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_passes_compute_the_same(on: Tasks, toy_backend: Backends, device: str) -> None:
    images = []
    for engine in (Engine(), fast(compiles=True)):
        task = on(device, engine, ipc=2, iterations=2)
        images.append(distil(task, toy_backend("dc", task)).batch.images)
    torch.testing.assert_close(images[1], images[0], rtol=1e-2, atol=1e-3)
