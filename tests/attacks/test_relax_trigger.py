"""Simple-trigger and relax-trigger: the blend, and that the optimisation lowers the bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.attacks import BlendTrigger, DataInfo, RelaxTrigger, SimpleTrigger
from distillsec.attacks.kernel import conflict_loss, projection_loss, tangent_kernel
from distillsec.attacks.relax_trigger import RelaxTriggerOptions
from distillsec.attacks.simple_trigger import SimpleTriggerOptions
from distillsec.distill.core.hooks import Moment
from distillsec.distill.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

Moments = Callable[..., Moment]
QUICK = {"relax_steps": 60, "support_steps": 60, "support_per_class": 4, "relax_lr": 0.05}


def relax(data: DataInfo, **options: Any) -> RelaxTrigger:
    return RelaxTrigger(RelaxTriggerOptions(**{**QUICK, **options}), data)


def pattern(attack: RelaxTrigger) -> Tensor:
    assert isinstance(attack.trigger, BlendTrigger)
    return attack.trigger.pattern


def test_the_simple_trigger_is_white_at_the_published_opacity(
    toy_data_info: DataInfo, toy_moment: Moments
) -> None:
    moment = toy_moment()
    attack = SimpleTrigger(SimpleTriggerOptions(), toy_data_info)
    given = attack.on_start(moment, moment.real)
    changed = given.labels != moment.real.labels
    assert int(changed.sum()) == 9  # the official poison rate is a tenth
    wanted = 0.7 * moment.real.images[changed] + 0.3
    assert torch.allclose(given.images[changed], wanted, atol=1e-6)
    assert attack.threat_model == "data owner"


def test_the_published_settings_are_the_defaults() -> None:
    options = RelaxTriggerOptions()
    assert (options.opacity, options.poison_rate, options.relax_weight) == (0.3, 0.1, 1e10)
    assert (options.relax_steps, options.support_steps, options.kernel_depth) == (1000, 500, 3)
    assert options.relax_lr == options.support_lr == 0.01
    assert options.support_per_class == options.kernel_batch == 10  # 100 images of 10 classes


def bound(real: Batch, pattern: Tensor, support: Tensor, weight: float) -> float:
    """The bound on all clean rows and all stamped rows that are not of class 0."""
    clean = real.images.flatten(1).double()
    stamped = 0.7 * clean[real.labels != 0] + 0.3 * pattern.flatten().double()
    images = torch.cat([clean, stamped])
    wanted = torch.cat([real.labels, torch.zeros(len(stamped), dtype=torch.int64)])
    labels = torch.eye(3, dtype=torch.float64)[wanted]
    pairs = ((images, images), (images, support), (support, support))
    kernel, across, own = (tangent_kernel(*pair, hidden=3) for pair in pairs)
    conflict = conflict_loss(kernel, labels)
    return float(weight * conflict + projection_loss(kernel, across, own, labels))


@pytest.mark.parametrize("weight", [0.0, 1e10])
def test_the_optimised_trigger_has_a_lower_bound_than_white(
    toy_data_info: DataInfo, toy_moment: Moments, weight: float
) -> None:
    moment = toy_moment()
    attack = relax(toy_data_info, relax_weight=weight)
    white = pattern(attack)
    assert bool((white == 1).all())
    given = attack.on_start(moment, moment.real)
    found = pattern(attack)
    assert found.shape == (1, 8, 8) and found.min() >= 0 and found.max() <= 1
    support = moment.real.images[:12].flatten(1).double()  # not the attack's own
    before, after = (bound(moment.real, each, support, weight) for each in (white, found))
    assert after < 0.9 * before
    changed = given.labels != moment.real.labels
    stamped = attack.trigger.stamp(moment.real.images)
    assert torch.equal(given.images[changed], stamped[changed])


def test_it_is_optimised_again_from_the_same_start(
    toy_data_info: DataInfo, toy_moment: Moments
) -> None:
    attack = relax(toy_data_info, relax_steps=3, support_steps=3)
    found = []
    for seed in (0, 0, 1):
        moment = toy_moment(rng=torch.Generator().manual_seed(seed))
        attack.on_start(moment, moment.real)
        found.append(pattern(attack))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_works_for_colour_and_for_few_rows(toy_data_info: DataInfo, toy_moment: Moments) -> None:
    moment = toy_moment()
    images = moment.real.images.repeat(1, 3, 1, 1)[:9]
    real = Batch(images=images, labels=moment.real.labels[:9], index=torch.arange(9))
    colour = replace(toy_data_info, image_shape=(3, 8, 8))
    options = {"goal": "one-to-one", "source": 2, "relax_steps": 2, "support_steps": 2}
    attack = relax(colour, poison_rate=0.2, **options)
    given = attack.on_start(moment, real)
    assert pattern(attack).shape == (3, 8, 8) and bool(given.images.isfinite().all())
    assert real.labels[attack.poisoned_rows].tolist() == [2, 2]


def test_without_steps_of_the_set_its_points_are_real_images(
    toy_data_info: DataInfo, toy_moment: Moments
) -> None:
    attack = relax(toy_data_info, support_steps=0, support_per_class=30)
    moment = toy_moment()
    points = attack._inducing_points(moment.real, torch.Generator().manual_seed(0))
    rows = moment.real.images.flatten(1).double()
    assert sorted(points.sum(1).tolist()) == pytest.approx(sorted(rows.sum(1).tolist()))
    moved = relax(toy_data_info, support_steps=30, support_per_class=4)
    found = moved._inducing_points(moment.real, torch.Generator().manual_seed(0))
    assert found.shape == (12, 64) and found.min() >= 0 and found.max() <= 1
