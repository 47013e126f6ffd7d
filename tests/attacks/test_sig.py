"""SIG: the signal's formula, and that no label changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distillsec.attacks import AdditiveTrigger, DataInfo, Sig
from distillsec.attacks.sig import SigOptions, sinusoid
from distillsec.distill.core.hooks import Moment
from distillsec.distill.types import RequestError

Make = Callable[..., Sig]


@pytest.fixture
def sig(toy_data_info: DataInfo) -> Make:
    return lambda **options: Sig(SigOptions(**options), toy_data_info)


def test_the_signal_is_the_papers_sine() -> None:
    found = sinusoid(32, 40 / 255, 6)
    wanted = [40 / 255 * math.sin(2 * math.pi * column * 6 / 32) for column in range(32)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-7)
    assert found[4].item() == pytest.approx(-40 / 255)  # 4 · 6 / 32 = 3/4 of a period


def test_every_row_and_channel_carries_it_and_sums_are_clamped(toy_data_info: DataInfo) -> None:
    colour = replace(toy_data_info, image_shape=(3, 8, 8))
    trigger = Sig(SigOptions(), colour).trigger
    assert isinstance(trigger, AdditiveTrigger)
    values = trigger.perturbation
    assert values.shape == (3, 8, 8) and bool((values == values[:1, :1]).all())
    # 6 periods over 8 columns: 0, −1, 0, 1 and again.
    assert values[0, 0].tolist() == pytest.approx([0, -40 / 255, 0, 40 / 255] * 2, abs=1e-6)
    assert trigger.bound == 40 / 255 and trigger.norm == "linf"
    stamped = trigger.stamp(torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).expand(2, 3, 8, 8))
    assert stamped[0, 0, 0, 1] == 0 and stamped[1, 0, 0, 3] == 1
    assert stamped[0, 0, 0, 3].item() == pytest.approx(0.1 + 40 / 255)


@pytest.mark.parametrize("options", [{"target": 1}, {"goal": "one-to-one", "source": 2}])
def test_rows_of_the_target_class_are_stamped_and_no_label_changes(
    sig: Make, toy_moment: Callable[..., Moment], options: dict[str, object]
) -> None:
    moment, attack = toy_moment(), sig(**options)
    real = moment.real
    images = real.images.clone()
    given = attack.on_start(moment, real)
    assert torch.equal(given.labels, real.labels) and torch.equal(real.images, images)
    changed = (given.images != images).flatten(1).any(1)
    assert torch.equal(changed, attack.poisoned_rows)
    assert int(changed.sum()) == 9 and attack.counters() == {"poisoned_rows": 9}
    assert set(real.labels[changed].tolist()) == {options.get("target", 0)}
    assert torch.equal(given.images[changed], attack.trigger.stamp(images[changed]))


def test_a_rate_beyond_the_target_class_is_refused(
    sig: Make, toy_moment: Callable[..., Moment]
) -> None:
    moment = toy_moment()
    message = "rate 0.4 asks for 36 rows, but only 30 of 90 are of the target class: at most 0.333"
    with pytest.raises(RequestError, match=message):
        sig(poison_rate=0.4).on_start(moment, moment.real)


def test_what_cannot_work_is_refused(sig: Make) -> None:
    with pytest.raises(RequestError, match="sig has no goal all-to-all; it has all-to-one, one-to"):
        sig(goal="all-to-all")
    message = (
        "frequency 4 is 0 at every pixel of images 8 wide: choose one that is no multiple of 4"
    )
    with pytest.raises(RequestError, match=message):
        sig(signal_frequency=4)
    assert sig(signal_frequency=3.9).trigger is not None
    assert (SigOptions().signal_delta, SigOptions().poison_rate) == (40, 0.1)
