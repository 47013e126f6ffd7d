"""The start of a run: initial images, refusals, the real data as hooks show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.attacks import ATTACKS, Attack, DataInfo
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.run import Run
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

Tasks = Callable[..., Task]
Runs = Callable[..., Run]


def attack(name: str, data: DataInfo, **options: Any) -> Attack:
    options = {"poison_rate": 0.2, **options}
    return ATTACKS[name](ATTACKS[name].Options.model_validate(options), data)


def among(images: Tensor, pool: Tensor) -> bool:
    """Whether each image is one of ``pool``, up to the rounding of the normalisation."""
    apart = (images[:, None] - pool[None]).flatten(2).abs().amax(2)
    return bool((apart.amin(1) < 1e-6).all())


def test_noise_is_standard_normal_in_normalised_space(toy_task: Tasks, toy_run: Runs) -> None:
    leaf = toy_run(toy_task(ipc=50)).synthetic.leaf.detach()  # 9600 numbers
    assert abs(leaf.mean().item()) < 5 / 98
    assert abs(leaf.std().item() - 1) < 0.05


def test_real_starts_are_clean_pixels_of_rows_that_kept_their_label(
    toy_task: Tasks, toy_run: Runs, toy_data_info: DataInfo
) -> None:
    naive = attack("naive", toy_data_info, poison_rate=0.4)
    task = toy_task(ipc=8, init="real")
    run = toy_run(task, [naive])
    poisoned = (run.real.batch.labels != task.real.labels).nonzero()[:, 0]
    assert len(poisoned) == 36
    images = run.synthetic.batch().images
    for label in range(3):
        own = task.real.labels == label
        kept = own.clone()
        kept[poisoned] = False
        start = images[label * 8 : label * 8 + 8]
        assert among(start, task.real.images[kept])
        assert len(start.unique(dim=0)) == 8
    assert not among(images, naive.trigger.stamp(task.real.images))


def test_real_starts_are_clean_even_where_a_stamp_left_the_label(
    toy_task: Tasks, toy_run: Runs
) -> None:
    class Stamper(Hook):
        def on_start(self, moment: Moment, real: Batch) -> Batch:
            return real.replace(images=real.images * 0)

    task = toy_task(ipc=4, init="real")
    assert among(toy_run(task, [Stamper()]).synthetic.batch().images, task.real.images)


def test_poisoned_starts_are_rows_as_the_distillation_sees_them(
    toy_task: Tasks, toy_run: Runs, toy_data_info: DataInfo
) -> None:
    naive = attack("naive", toy_data_info, target_share=0.5)
    task = toy_task(ipc=8, init="poisoned")
    run = toy_run(task, [naive])
    images = run.synthetic.batch().images
    corner = images[:, :, 5:7, 5:7].flatten(1)
    stamped = (corner > 1 - 1e-6).all(1)
    assert stamped[:8].sum() == 4  # of the target class
    assert not bool(stamped[8:].any())
    assert among(images[:8], run.real.batch.images[run.real.batch.labels == 0])


@pytest.mark.parametrize("init", ["real", "poisoned"])
def test_a_start_needs_enough_rows(toy_task: Tasks, toy_run: Runs, init: str) -> None:
    with pytest.raises(RequestError, match="class 0 has 30 rows to start 31 images per class"):
        toy_run(toy_task(ipc=31, init=init))


def test_a_class_without_rows_is_refused(
    toy_task: Tasks, toy_run: Runs, toy_data_info: DataInfo
) -> None:
    empty = type(
        "Thief", (Hook,), {"on_start": lambda s, m, real: real.replace(labels=real.labels * 0)}
    )
    with pytest.raises(RequestError, match="class 1 has no training rows left"):
        toy_run(toy_task(), [empty()])


def test_the_twin_starts_from_nearly_the_same_images(
    toy_task: Tasks, toy_run: Runs, toy_data_info: DataInfo
) -> None:
    attacked = toy_run(
        toy_task(ipc=4, init="real"), [attack("naive", toy_data_info)]
    ).synthetic.batch()
    twin = toy_run(toy_task(ipc=4, init="real")).synthetic.batch()
    same = torch.isclose(attacked.images[:, None], twin.images[None]).flatten(2).all(2)
    # A fifth of the rows are poisoned, none of the target class, whose start is the same.
    assert bool(same[:4, :4].diagonal().all())
    assert int(same.any(1).sum()) >= 8


def test_a_draw_takes_rows_of_its_class_once(toy_task: Tasks, toy_run: Runs) -> None:
    task = toy_task()
    run = toy_run(task)
    for label in range(3):
        batch = run.real.draw(label, 20, torch.Generator().manual_seed(0))
        assert batch.index is not None
        assert len(batch.index.unique()) == len(batch) == 20
        assert bool((task.real.labels[batch.index] == label).all())
        assert torch.equal(batch.images, task.real.images[batch.index])
    assert len(run.real.draw(0, 500, torch.Generator())) == 30


def test_writing_pixels_moves_the_leaf_and_keeps_it_a_leaf(toy_task: Tasks, toy_run: Runs) -> None:
    run = toy_run(toy_task())
    leaf, wanted = run.synthetic.leaf, torch.rand(3, 1, 8, 8)
    run.synthetic.write(wanted)
    assert run.synthetic.leaf is leaf
    assert leaf.is_leaf
    torch.testing.assert_close(leaf.detach(), (wanted - 0.5) / 0.25)
    torch.testing.assert_close(run.synthetic.batch().images, wanted)
    assert run.synthetic.pixels().requires_grad
    assert not run.synthetic.batch().images.requires_grad


def test_batches_go_through_all_rows_or_as_many_as_are_wanted(
    toy_task: Tasks, toy_run: Runs
) -> None:
    run = toy_run(toy_task())

    def seen(seed: int, count: int | None) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        batches = list(run.real.batches(20, generator, count))
        assert all(len(batch) <= 20 for batch in batches)
        rows: list[int] = torch.cat(
            [batch.index for batch in batches if batch.index is not None]
        ).tolist()
        return rows

    assert sorted(seen(0, None)) == list(range(90))
    part = seen(0, 50)
    assert part == seen(0, None)[:50] and len(set(part)) == 50
    assert set(seen(1, 50)) != set(part)
