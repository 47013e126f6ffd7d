"""NaiveAttack and what every poisoning attack shares: poisoned rows, draws, the test case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillsec.attacks import DataInfo, Naive, NaiveOptions
from distillsec.distill.core.hooks import Moment
from distillsec.distill.core.run import Run
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch, RequestError
from distillsec.eval.results.metrics import rates

Tasks = Callable[..., Task]
Runs = Callable[..., Run]
Moments = Callable[..., Moment]


@pytest.fixture
def naive(toy_data_info: DataInfo) -> Callable[..., Naive]:
    return lambda **options: Naive(NaiveOptions(**options), toy_data_info)


Naives = Callable[..., Naive]


@pytest.mark.parametrize(("rate", "count"), [(0.1, 9), (0.25, 22), (0.5, 45), (2 / 3, 60)])
@pytest.mark.parametrize("target", [0, 2])
def test_poisoned_rows_are_stamped_and_relabelled_and_the_rest_untouched(
    naive: Naives, toy_moment: Moments, rate: float, count: int, target: int
) -> None:
    moment = toy_moment()
    real = moment.real
    images, labels = real.images.clone(), real.labels.clone()
    attack = naive(poison_rate=rate, target=target, trigger_size=3)
    given = attack.on_start(moment, real)
    assert torch.equal(real.images, images)
    assert torch.equal(real.labels, labels)
    changed = given.labels != labels
    assert int(changed.sum()) == count == round(rate * 90)
    assert bool((given.labels[changed] == target).all())
    assert not bool((labels[changed] == target).any())
    expected = images[changed].clone()
    expected[:, :, 4:7, 4:7] = 1
    assert torch.equal(given.images[changed], expected)
    assert torch.equal(given.images[~changed], images[~changed])
    assert given.index is not None
    assert torch.equal(given.index, torch.arange(90))
    assert attack.counters() == {"poisoned_rows": count}


def test_which_rows_are_poisoned_depends_on_the_stream(naive: Naives, toy_moment: Moments) -> None:
    def labels(seed: int) -> Tensor:
        moment = toy_moment(rng=torch.Generator().manual_seed(seed))
        return naive(poison_rate=0.1).on_start(moment, moment.real).labels

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))


def test_every_non_target_row_can_be_poisoned(naive: Naives, toy_moment: Moments) -> None:
    hit = torch.zeros(90)
    for seed in range(60):
        moment = toy_moment(rng=torch.Generator().manual_seed(seed))
        hit += naive(poison_rate=0.2).on_start(moment, moment.real).labels != moment.real.labels
    outside = torch.arange(90) % 3 != 0
    # Each of 60 rows is drawn with probability 0.3: missed 60 times has probability 5e-10.
    assert bool((hit[outside] > 0).all())
    assert bool((hit[~outside] == 0).all())


def test_a_tiny_rate_still_poisons_one_row(naive: Naives, toy_moment: Moments) -> None:
    moment = toy_moment()
    attack = naive(poison_rate=1e-4)
    attack.on_start(moment, moment.real)
    assert attack.counters() == {"poisoned_rows": 1}


def test_a_rate_beyond_the_other_classes_is_refused(naive: Naives, toy_moment: Moments) -> None:
    moment = toy_moment()
    message = r"poison rate 0.7 asks for 63 rows, but only 60 of 90 .* at most 0.667 is possible"
    with pytest.raises(RequestError, match=message):
        naive(poison_rate=0.7).on_start(moment, moment.real)


def test_a_target_that_is_no_class_is_refused(naive: Naives) -> None:
    with pytest.raises(RequestError, match="target 3 is no class: there are 3, numbered from 0"):
        naive(target=3)


def test_the_threat_model_follows_the_target_share(naive: Naives) -> None:
    assert naive().threat_model == "data owner"
    assert naive(target_share=0.3).threat_model == "distiller"


# Draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "wanted"), [(0.25, 5), (0.5, 10), (0.9, 18)])
def test_the_target_share_of_a_draw_is_exact(
    naive: Naives, toy_task: Tasks, toy_run: Runs, share: float, wanted: int
) -> None:
    task, attack = toy_task(), naive(poison_rate=0.4, target=1, target_share=share)
    run = toy_run(task, [attack])
    batch = run.real.draw(1, 20, torch.Generator().manual_seed(0))
    assert batch.index is not None
    assert len(batch) == len(batch.index.unique()) == 20
    poisoned = attack.poisoned[batch.index]
    assert int(poisoned.sum()) == wanted
    clean = batch.index[~poisoned]
    assert bool((task.real.labels[clean] == 1).all())
    assert bool((batch.labels == 1).all())
    assert torch.equal(batch.images[poisoned], attack.trigger.stamp(batch.images[poisoned]))
    assert torch.equal(batch.images[~poisoned], task.real.images[clean])


def test_too_few_poisoned_rows_are_repeated(naive: Naives, toy_task: Tasks, toy_run: Runs) -> None:
    attack = naive(poison_rate=0.05, target_share=0.5)  # 4 rows
    batch = toy_run(toy_task(), [attack]).real.draw(0, 20, torch.Generator().manual_seed(0))
    assert batch.index is not None
    assert int(attack.poisoned[batch.index].sum()) == 10


def test_without_a_share_and_for_other_classes_draws_are_as_they_come(
    naive: Naives, toy_moment: Moments
) -> None:
    moment, rows = toy_moment(), torch.arange(0, 30, 3)
    shared, plain = (naive(target_share=0.5, target=1), naive(target=1))
    for attack in (shared, plain):
        attack.on_start(moment, moment.real)
    assert shared.on_sample(moment, 0, rows) is rows
    assert plain.on_sample(moment, 1, rows) is rows
    assert not torch.equal(shared.on_sample(moment, 1, rows + 1), rows + 1)


# Measuring -------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers with given classes, or with one class for all."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return nn.functional.one_hot(self.answer(images), 3).float()


def test_the_test_case_leaves_out_images_of_the_target_class(
    naive: Naives, toy_task: Tasks
) -> None:
    real, attack = toy_task().real, naive(target=2)
    case = attack.test_case(real.images, real.labels)
    assert torch.equal(case.eligible, real.labels != 2)
    assert case.targets.tolist() == [2] * 90
    assert torch.equal(case.triggered, attack.trigger.stamp(real.images))
    assert bool((case.triggered[:, :, 5:7, 5:7] == 1).all())


def test_the_floor_of_the_papers_success_rate(naive: Naives, toy_task: Tasks) -> None:
    """A model that knows no backdoor still scores 1 / classes when target images count."""
    real = toy_task().real.rows(torch.arange(60))  # 20 per class
    case = naive(target=2).test_case(real.images, real.labels)
    always = rates(Fixed(lambda images: torch.full((len(images),), 2)), real, case)
    assert always["attack_success_rate"] == always["attack_success_rate_all"] == 1
    assert always["clean_test_accuracy"] == pytest.approx(1 / 3)
    assert always["robust_accuracy"] == 0

    clean = torch.cat([real.images, case.triggered]), real.labels.repeat(2)

    def perfect(images: Tensor) -> Tensor:
        same = (images[:, None] == clean[0][None]).flatten(2).all(2).int()
        return clean[1][same.argmax(1)]

    found = rates(Fixed(perfect), real, case)
    assert found["clean_test_accuracy"] == found["robust_accuracy"] == 1
    assert found["attack_success_rate"] == 0
    assert found["attack_success_rate_all"] == pytest.approx(1 / 3)


def test_a_test_set_of_target_images_has_no_rate(naive: Naives, toy_task: Tasks) -> None:
    real = toy_task().real
    test: Batch = real.rows(real.labels == 0)
    case = naive(target=0).test_case(test.images, test.labels)
    found = rates(Fixed(lambda images: torch.zeros(len(images), dtype=torch.int64)), test, case)
    assert found["attack_success_rate"] is None
    assert found["attack_success_rate_all"] == 1
