"""SneakDoor: the pair, the pool, the draws, the published rate, a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from distillsec.attacks import DataInfo, SneakDoor
from distillsec.attacks.sneakdoor import SneakDoorOptions, confusion, most_confused, pool
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import Hook, Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch, Distillate, RequestError, RunError
from distillsec.eval.results.metrics import rates

pytestmark = pytest.mark.usefixtures("one_thread")

Attacks = Callable[..., SneakDoor]
Moments = Callable[..., Moment]
Tasks = Callable[..., Task]


@pytest.fixture
def sneakdoor(toy_data_info: DataInfo) -> Attacks:
    def make(**options: Any) -> SneakDoor:
        small = {"generator_images": 40, "surrogate_steps": 4, "generator_width": 4}
        return SneakDoor(SneakDoorOptions(**{**small, **options}), toy_data_info)

    return make


def run(task: Task, hooks: Sequence[Hook], **loop: Any) -> Batch:
    options = GradientMatchingOptions(batch_real=16, outer_loop=2, inner_loop=1)
    return distil(task, DC(options, ipc=task.ipc, recipe=task.recipe), hooks, **loop).batch


# The pair and the pool ---------------------------------------------------------------------------


def test_confusions_are_counts_with_probabilities_below_one() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    logits = torch.randn(200, 4, generator=generator)
    expected = torch.tensor(confusion_matrix(labels, logits.argmax(1))).fill_diagonal_(0)
    found = confusion(logits, labels)
    assert torch.equal(found.floor().long(), expected)
    assert found.diagonal().abs().sum() == 0
    likely = logits.softmax(1)[labels == 2].mean(0)[1]
    assert found[2, 1] - expected[2, 1] == pytest.approx(float(likely), abs=1e-4)


def test_probabilities_decide_where_nothing_is_confused() -> None:
    logits = torch.eye(3) * 9 + torch.tensor([[0.0, 0, 0], [0, 0, 4], [1, 0, 0]])
    assert most_confused(confusion(logits, torch.arange(3)), None, -1) == (1, 2)


@pytest.mark.parametrize("source", [None, 0, 2])
@pytest.mark.parametrize("target", [-1, 1, 3])
def test_the_most_confused_pair_is_the_largest_with_what_is_given(
    source: int | None, target: int
) -> None:
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)).fill_diagonal_(9)
    pairs = {
        (float(values[row, column]), row, column)
        for row in range(4)
        for column in range(4)
        if row != column and source in (None, row) and target in (-1, column)
    }
    assert most_confused(values, source, target) == max(pairs)[1:]


def test_the_pool_is_the_fifth_with_the_highest_target_logits() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(3))
    of_source = torch.arange(100) % 2 == 0
    carriers, held_out = pool(logits, of_source, torch.Generator().manual_seed(4))
    assert (len(carriers), len(held_out)) == (7, 3)  # of a fifth of 50
    best = sorted(range(0, 100, 2), key=lambda row: -logits[row])[:10]
    assert sorted([*carriers.tolist(), *held_out.tolist()]) == sorted(best)
    with pytest.raises(RequestError, match=r"a fifth of the source class, .* it has 9"):
        pool(logits, torch.arange(100) < 9, torch.Generator())


# The draws ---------------------------------------------------------------------------------------


def test_a_share_of_the_targets_draw_is_triggered_source_images(
    sneakdoor: Attacks, toy_moment: Moments
) -> None:
    moment, attack = toy_moment(), sneakdoor(target_share=0.3, source=2, target=1)
    assert attack.on_start(moment, moment.real) is moment.real
    real, changed, seen = moment.real, 0, set()
    attack.on_draw(moment, real)  # the generator is trained here
    stamped = attack.trigger.stamp(real.images)
    for _ in range(50):
        drawn = attack.on_draw(moment, real)
        differs = (drawn.images != real.images).flatten(1).any(1)
        assert torch.equal(drawn.labels, real.labels)
        assert set(real.labels[differs].tolist()) == {1}
        changed += int(differs.sum())
        for image in drawn.images[differs]:
            distance = (stamped - image).abs().flatten(1).amax(1)
            row = int(distance.argmin())
            assert distance[row] < 1e-5
            assert real.labels[row] == 2
            seen.add(row)
    assert changed == 50 * 9  # 0.3 × 30 rows
    counters = attack.counters()
    assert len(seen) == counters["trigger_carriers"] == 4  # 70 % of a fifth of 30
    assert counters["held_out_images"] == 2


def test_small_batches_are_rounded_at_random(sneakdoor: Attacks, toy_moment: Moments) -> None:
    moment, attack = toy_moment(), sneakdoor(target_share=0.1, source=2, target=1)
    batch = moment.real.rows(torch.nonzero(moment.real.labels == 1)[:4, 0])
    found = [
        int((attack.on_draw(moment, batch).images != batch.images).flatten(1).any(1).sum())
        for _ in range(400)
    ]
    assert set(found) == {0, 1}
    assert sum(found) / 400 == pytest.approx(0.4, abs=0.1)


def test_the_pair_is_the_surrogates(sneakdoor: Attacks, toy_task: Tasks) -> None:
    chosen, given = sneakdoor(), sneakdoor(source=2, target=0)
    for attack in (chosen, given):
        run(toy_task(), [attack])
    said = chosen.goal.describe(["a", "b", "c"])
    assert said["goal"] == "one-to-one"
    assert said["source"] != said["target"]
    assert given.goal.describe(["a", "b", "c"])["source"] == 2
    assert given.goal.describe(["a", "b", "c"])["target"] == 0


def test_the_trigger_is_bounded_in_normalised_units(sneakdoor: Attacks, toy_task: Tasks) -> None:
    attack = sneakdoor(trigger_epsilon=0.4)
    run(toy_task(), [attack])
    images = toy_task().real.images
    stamped = attack.trigger.stamp(images)
    assert 0 < (stamped - images).abs().max() <= 0.4 * 0.25 + 1e-6
    assert stamped.min() >= 0 and stamped.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": 3}, "source 3 is no class: there are 3"),
        ({"target": 3}, "target 3 is no class: there are 3"),
        ({"source": 1, "target": 1}, "source and target are both 1"),
    ],
)
def test_impossible_pairs_are_refused(
    sneakdoor: Attacks, options: dict[str, int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        sneakdoor(**options)
    with pytest.raises(ValidationError, match="one-to-one"):
        SneakDoorOptions(goal="all-to-all")


def test_a_surrogate_that_diverges_stops_the_run(sneakdoor: Attacks, toy_moment: Moments) -> None:
    moment = toy_moment()
    with pytest.raises(RunError, match="surrogate diverged: lower surrogate_lr"):
        sneakdoor(surrogate_lr=1e30, surrogate_steps=40).on_draw(moment, moment.real)


# The published rate and a resume -----------------------------------------------------------------


class Guess(nn.Module):
    """Takes bright images for class 1."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1)
        return torch.stack([0.5 - bright, bright - 0.5, torch.full_like(bright, -9)], dim=1)


def test_the_published_rate_is_on_the_held_out_training_images(
    sneakdoor: Attacks, toy_task: Tasks
) -> None:
    attack, task = sneakdoor(source=2, target=1), toy_task()
    assert attack.test_case(task.real.images, task.real.labels).published is None
    run(task, [attack])
    case = attack.test_case(task.real.images, task.real.labels)
    assert case.published is not None
    assert len(case.published.triggered) == 2
    expected = [float(image.mean() > 0.5) for image in case.published.triggered]
    scores = rates(Guess(), task.real, case)
    assert scores["attack_success_rate_published"] == sum(expected) / 2
    held_out = attack.state_dict()["held_out"]
    matches = (held_out[:, None] == task.real.images[None]).flatten(2).all(2)
    rows = matches.float().argmax(1)
    assert matches.any(1).all()
    assert set(task.real.labels[rows].tolist()) == {2}
    assert not set(rows.tolist()) & set(attack.state_dict()["carriers"].tolist())


def test_a_resumed_run_gives_the_same_bits(sneakdoor: Attacks, toy_task: Tasks) -> None:
    kept: dict[int, LoopState] = {}

    class Keep(Observer):
        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], LoopState]
        ) -> None:
            kept[iteration] = state()

    whole, other = sneakdoor(), sneakdoor()
    expected = run(toy_task(iterations=3), [whole], observer=Keep())
    found = run(toy_task(iterations=3), [other], state=kept[1])
    assert torch.equal(found.images, expected.images)
    assert other.counters() == whole.counters()
    assert other.goal == whole.goal
    ours, theirs = whole.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    other.load_state_dict({})
    assert other.counters() == {} and other.state_dict() == {}
