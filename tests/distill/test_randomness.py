"""Named random streams: repeatable, independent, and the only source of randomness."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from distillsec.attacks import ATTACKS, DataInfo
from distillsec.distill.backends.gradient_matching import DSA, SiameseOptions
from distillsec.distill.core.loop import distil
from distillsec.distill.core.task import Task
from distillsec.distill.randomness import STREAMS, Streams

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(seed: int, name: str, *key: int) -> Tensor:
    return torch.rand(8, generator=Streams(seed).generator(name, *key))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_repeats(name: str) -> None:
    assert torch.equal(numbers(3, name, 1, 2), numbers(3, name, 1, 2))
    assert Streams(3).integer(name, 1) == Streams(3).integer(name, 1)  # type: ignore[arg-type]


def test_streams_differ_in_seed_name_and_key() -> None:
    keys: list[tuple[int, ...]] = [(), (0,), (1,), (11,), (0, 0), (1, 1), (1, 11), (11, 1), (111,)]
    drawn = [numbers(seed, name, *key) for seed in (0, 1, 10) for name in STREAMS for key in keys]
    assert all(not torch.equal(a, b) for a, b in combinations(drawn, 2))


def test_what_one_stream_has_used_disturbs_no_other() -> None:
    streams = Streams(0)
    torch.rand(1000, generator=streams.generator("attack", 4))
    assert torch.equal(torch.rand(8, generator=streams.generator("draw", 4)), numbers(0, "draw", 4))


def test_seeds_have_63_bits_and_no_visible_bias() -> None:
    drawn = np.array([Streams(seed).integer("draw") for seed in range(2000)], dtype=np.uint64)
    assert int(drawn.max()) < 2**63
    shares = [(drawn >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(63)]
    # A fair coin thrown 2000 times: 5 standard deviations are 0.056.
    assert max(abs(share - 0.5) for share in shares) < 0.056


def test_an_unknown_stream_is_refused() -> None:
    with pytest.raises(KeyError, match=r"no random stream 'luck'.*victim"):
        Streams(0).generator("luck")  # type: ignore[arg-type]


def test_the_global_generators_are_left_alone(
    toy_task: Callable[..., Task], toy_data_info: DataInfo
) -> None:
    options = ATTACKS["doorping"].Options.model_validate(
        {"objective": "student", "update_every": 1, "trigger_steps": 2, "poison_rate": 0.1}
    )
    attack = ATTACKS["doorping"](options, toy_data_info)
    task = toy_task(ipc=2, init="real")
    backend = DSA(SiameseOptions(outer_loop=2, inner_loop=1), ipc=2, recipe=task.recipe)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    distil(task, backend, [attack])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002


def test_a_distillation_does_not_depend_on_the_global_generator(
    toy_task: Callable[..., Task],
) -> None:
    found = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.default_generator.manual_seed(seed)
            task = toy_task(ipc=2)
            backend = DSA(SiameseOptions(outer_loop=2, inner_loop=1), ipc=2, recipe=task.recipe)
            found.append(distil(task, backend).batch.images)
    assert torch.equal(*found)
