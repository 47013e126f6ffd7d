"""What students of several architectures are, how they are tested, and whose gradient counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distillsec.attacks import DataInfo, Unrolled
from distillsec.attacks.student_training import as_tested
from distillsec.attacks.unrolled import UnrolledOptions, with_gradient
from distillsec.distill import weights as flat
from distillsec.distill.batch_norm import batch_norm_layers
from distillsec.distill.core.hooks import Moment
from distillsec.distill.core.run import Run
from distillsec.distill.core.task import Task
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.networks.variants import maker_of, variant_of
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Moments = Callable[..., Moment]
Tasks = Callable[..., Task]
SMALL = {"unroll_warmup": 2, "unroll_steps": 2, "images_per_update": 16, "weight": 1.0}


@pytest.fixture
def convnets() -> NetworkMaker:
    """Small ConvNets with instance norm for the toy task's images."""
    spec = NetworkSpec(network="convnet", width=4, depth=1)
    space = Preprocessing((0.5,), (0.25,))
    return NetworkMaker(spec=spec, image_shape=(1, 8, 8), classes=3, preprocessing=space)


def synthetic() -> Batch:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return Batch(images=images.requires_grad_(), labels=torch.arange(3).repeat_interleave(2))


# Architectures -----------------------------------------------------------------------------------


def test_an_update_takes_the_architectures_in_turn(
    toy_data_info: DataInfo, toy_moment: Moments, toy_task: Tasks
) -> None:
    asked: list[str] = []

    def fresh(name: str = "own") -> torch.nn.Module:
        asked.append(name)
        return toy_task().network(0)

    moment = toy_moment(fresh_network=fresh)
    names = ("own", "batch-norm", "mlp")
    options = UnrolledOptions(**SMALL, students=2, student_networks=names)
    attack = Unrolled(options, toy_data_info)
    attack.on_start(moment, moment.real)
    for _ in range(3):
        attack.on_loss(moment, synthetic())
    assert asked == [*names, *names]


@pytest.mark.parametrize("network", ["convnet", "mlp"])
def test_a_moment_gives_untrained_networks_of_other_architectures(
    network: str, convnets: NetworkMaker, toy_task: Tasks, toy_run: Callable[..., Run]
) -> None:
    moment = toy_run(replace(toy_task(), network=convnets)).moments.at("on_loss")()
    other = "batch-norm" if network == "convnet" else "mlp"
    own, made = moment.fresh_network(), moment.fresh_network(other)
    assert not batch_norm_layers(own)
    assert bool(batch_norm_layers(made)) == (network == "convnet")
    wide = variant_of(convnets.spec, "wide")
    assert (wide.width, wide.depth) == (8, 1)
    assert flat.count(made) != flat.count(own) or network == "convnet"


def test_a_task_with_a_network_of_unknown_kind_has_no_variants(
    toy_task: Tasks, toy_run: Callable[..., Run], convnets: NetworkMaker
) -> None:
    moment = toy_run(replace(toy_task(), network=lambda seed: convnets(seed))).moments.at(
        "on_loss"
    )()
    moment.fresh_network()
    with pytest.raises(RequestError, match="no variant mlp"):
        moment.fresh_network("mlp")


def test_unknown_architectures_and_an_empty_list_are_refused() -> None:
    for names in (["resnet"], []):
        with pytest.raises(ValidationError):
            UnrolledOptions.model_validate({"student_networks": names})


def test_new_options_at_their_defaults_are_left_out_of_a_configuration() -> None:
    plain = UnrolledOptions().model_dump(mode="json")
    assert not {"student_networks", "weight_by", "goal"} & plain.keys()
    chosen = UnrolledOptions(student_networks=("own", "mlp"), weight_by="gradient")
    dumped = chosen.model_dump(mode="json")
    assert dumped["student_networks"] == ["own", "mlp"] and dumped["weight_by"] == "gradient"


# Batch norm --------------------------------------------------------------------------------------


def test_batch_norm_is_tested_on_the_statistics_of_the_set(convnets: NetworkMaker) -> None:
    make = maker_of(convnets, "batch-norm")
    network, images = make(0), synthetic().images.detach()
    weights = flat.laid_out(network)
    tested = as_tested(network, weights, images)
    assert network.training and not tested.training
    one = flat.logits(tested, weights, images[:1])
    assert torch.allclose(one, flat.logits(tested, weights, images)[:1], atol=1e-5)
    (layer,) = batch_norm_layers(tested)
    entering: list[Tensor] = []
    layer.register_forward_hook(lambda _, given, __: entering.append(given[0]))
    flat.logits(tested, weights, images)
    kept = layer.get_buffer("running_mean")
    assert torch.allclose(kept, entering[0].mean((0, 2, 3)), atol=1e-5)


def test_networks_without_batch_norm_are_tested_as_they_are(convnets: NetworkMaker) -> None:
    network = convnets(0)
    assert as_tested(network, flat.laid_out(network), synthetic().images) is network


@pytest.mark.parametrize("gradient", ["exact", "recompute"])
def test_the_gradient_through_batch_norm_students_is_that_of_their_training(
    gradient: Any, convnets: NetworkMaker, toy_data_info: DataInfo, toy_moment: Moments
) -> None:
    """The test's statistics do not enter the training that the backward pass repeats."""
    make = maker_of(convnets, "batch-norm")
    options = UnrolledOptions(**SMALL, unroll_gradient=gradient, trigger="fixed", rows="all")
    slopes = []
    for each in (options, options.model_copy(update={"unroll_gradient": "exact"})):
        attack, batch = Unrolled(each, toy_data_info), synthetic()
        moment = toy_moment(fresh_network=lambda: make(0))
        loss = attack.on_loss(moment, batch)
        assert loss is not None
        slopes.append(torch.autograd.grad(loss, batch.images)[0])
    assert torch.allclose(slopes[0], slopes[1], rtol=1e-3, atol=1e-6)


# The weight --------------------------------------------------------------------------------------


def test_the_gradient_has_the_asked_size_beside_the_backends_own() -> None:
    images = synthetic().images
    images.grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    loss = images[:2].pow(3).sum()
    (plain,) = torch.autograd.grad(loss, images, retain_graph=True)
    found = with_gradient(loss, images, 0.5)
    (slope,) = torch.autograd.grad(found, images)
    assert found.item() == pytest.approx(loss.item())
    assert slope.norm().item() == pytest.approx(0.5 * images.grad[:2].norm().item(), rel=1e-5)
    assert torch.allclose(slope / slope.norm(), plain / plain.norm())


def test_the_gradient_stays_where_the_backend_has_none() -> None:
    images = synthetic().images
    (slope,) = torch.autograd.grad(with_gradient(images.sum(), images, 7.0), images)
    assert torch.equal(slope, torch.ones_like(images))
