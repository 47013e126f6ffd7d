"""Hooks: how answers are folded, what is refused, and how a hook's failure is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import (
    EVENTS,
    Event,
    Hook,
    Moment,
    announce,
    extra_loss,
    fold,
    listeners,
)
from distillsec.distill.core.loop import distil
from distillsec.distill.core.task import Task
from distillsec.distill.types import Batch, RequestError, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

Moments = Callable[..., Moment]


def batch(**changes: Tensor) -> Batch:
    base = Batch(images=torch.rand(4, 1, 8, 8), labels=torch.arange(4), index=torch.arange(4))
    return base.replace(**changes)


class Answer(Hook):
    """Answers every event with a function of the test."""

    name = "liar"

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer = answer

    def on_sample(self, moment: Moment, label: int, rows: Tensor) -> Any:
        return self.answer(rows)

    def on_draw(self, moment: Moment, clean: Batch) -> Any:
        return self.answer(clean)

    def on_loss(self, moment: Moment, synthetic: Batch) -> Any:
        return self.answer(synthetic)

    def on_network(self, moment: Moment) -> Any:
        return self.answer(moment)


# Subclasses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["on_netwrok", "on_end", "on_"])
def test_a_misspelt_event_is_refused_when_the_class_is_made(name: str) -> None:
    with pytest.raises(TypeError, match=f"Typo defines {name}, which the loop never calls.*on_dra"):
        type("Typo", (Hook,), {name: lambda self, moment: None})


def test_a_misspelt_event_of_a_mixin_is_refused_too() -> None:
    mixin = type("Mixin", (), {"on_strat": lambda self, moment, real: real})
    with pytest.raises(TypeError, match="on_strat"):
        type("Mixed", (mixin, Hook), {})


def test_the_base_class_has_every_event_and_answers_with_the_value(toy_moment: Moments) -> None:
    assert {name for name in vars(Hook) if name.startswith("on_")} == set(EVENTS)
    hook, now, given = Hook(), toy_moment(), batch()
    rows = torch.arange(3)
    assert hook.on_sample(now, 0, rows) is rows
    assert all(getattr(hook, e)(now, given) is given for e in ("on_start", "on_draw"))
    assert all(getattr(hook, e)(now, given) is given for e in ("on_synthetic", "on_finish"))
    assert hook.on_loss(now, given) is None
    assert hook.state_dict() == {}
    assert listeners([hook], "on_draw") == []


# Folding ---------------------------------------------------------------------------------------


def test_values_pass_through_the_hooks_in_list_order(toy_moment: Moments) -> None:
    double = Answer(lambda b: b.replace(images=b.images * 2))
    add = Answer(lambda b: b.replace(images=b.images + 1))
    given = batch()
    one = fold([double, add], "on_draw", toy_moment, given)
    other = fold([add, double], "on_draw", toy_moment, given)
    assert torch.equal(one.images, given.images * 2 + 1)
    assert torch.equal(other.images, (given.images + 1) * 2)


def test_arguments_before_the_value_are_passed_on(toy_moment: Moments) -> None:
    seen = []

    class Sampler(Hook):
        def on_sample(self, moment: Moment, label: int, rows: Tensor) -> Tensor:
            seen.append((moment.step, label))
            return rows.flip(0)

    rows = fold([Sampler()], "on_sample", lambda: toy_moment(step=5), torch.arange(3), 2)
    assert rows.tolist() == [2, 1, 0]
    assert seen == [(5, 2)]


def test_no_moment_is_made_where_no_hook_listens() -> None:
    def never() -> Moment:
        raise AssertionError("a moment was made")

    class Deaf(Hook):
        def on_finish(self, moment: Moment, synthetic: Batch) -> Batch:
            return synthetic

    given = batch()
    events: tuple[Event, ...] = ("on_start", "on_draw", "on_synthetic")
    for event in events:
        assert fold([Deaf(), Hook()], event, never, given) is given
    announce([Deaf()], never)
    assert extra_loss([Deaf()], never, given) is None


NOT_A_BATCH = [
    (lambda b: None, "must return a Batch, not NoneType"),
    (lambda b: b.images, "must return a Batch, not Tensor"),
    (lambda b: b.replace(images=b.images[:3]), r"images: shape is .*3, 1, 8, 8.*expected .*4, 1"),
    (lambda b: b.replace(images=b.images.double()), "images: dtype is torch.float64, expected"),
    (lambda b: b.replace(images=b.images.to("meta")), "images: device is meta, expected cpu"),
    (lambda b: b.replace(images=b.images / 0), "images: values are not finite"),
    (lambda b: b.replace(images=b.images * torch.nan), "images: values are not finite"),
    (lambda b: b.replace(labels=b.labels[:, None]), "labels: shape"),
    (lambda b: b.replace(labels=b.labels.float()), "labels: dtype"),
    (lambda b: Batch(images=b.images, labels=b.labels), "the batch lost its index"),
]


@pytest.mark.parametrize(("answer", "message"), NOT_A_BATCH)
def test_a_batch_that_would_not_fit_is_refused(
    toy_moment: Moments, answer: Callable[[Batch], Any], message: str
) -> None:
    with pytest.raises(RunError, match=rf"^liar\.on_draw at step 6.*{message}"):
        fold([Answer(answer)], "on_draw", lambda: toy_moment(step=6), batch())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: rows.tolist(), "must be a tensor, not list"),
        (lambda rows: rows[:2], "shape"),
        (lambda rows: rows.int(), "dtype is torch.int32"),
    ],
)
def test_rows_that_would_not_fit_are_refused(
    toy_moment: Moments, answer: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(RunError, match=rf"liar\.on_sample at step 6.*{message}"):
        fold([Answer(answer)], "on_sample", lambda: toy_moment(step=6), torch.arange(3), 0)


# Extra losses ----------------------------------------------------------------------------------


def test_losses_are_added_and_none_counts_for_nothing(toy_moment: Moments) -> None:
    seen = torch.rand(4, 1, 8, 8, requires_grad=True)
    given = Batch(images=seen, labels=torch.arange(4))
    hooks = [
        Answer(lambda b: b.images.sum()),
        Answer(lambda b: None),
        Answer(lambda b: b.images.square().sum()),
    ]
    total = extra_loss(hooks, toy_moment, given)
    assert total is not None
    torch.testing.assert_close(total, seen.sum() + seen.square().sum())
    assert extra_loss(hooks[1:2], toy_moment, given) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda b: 3.0, "must return one number"),
        (lambda b: b.images, "must return one number"),
        (lambda b: b.images.detach().sum(), "not attached to the synthetic images"),
        (lambda b: b.images.sum() * torch.nan, "the loss is not finite"),
        (lambda b: b.images.sum() / 0, "the loss is not finite"),
    ],
)
def test_a_loss_that_is_none_is_refused(
    toy_moment: Moments, answer: Callable[[Batch], Any], message: str
) -> None:
    given = Batch(images=torch.rand(4, 1, 8, 8, requires_grad=True), labels=torch.arange(4))
    with pytest.raises(RunError, match=rf"^liar\.on_loss at step 6.*{message}"):
        extra_loss([Answer(answer)], lambda: toy_moment(step=6), given)


# Failures --------------------------------------------------------------------------------------


def fail(_: Any) -> Any:
    raise ZeroDivisionError("a bug of the hook's")


def refuse(_: Any) -> Any:
    raise RequestError("the hook says no")


def test_an_exception_in_a_hook_names_hook_event_and_step(
    toy_moment: Moments,
) -> None:
    hook, now = Answer(fail), lambda: toy_moment(step=9)
    report = r"at step 9: ZeroDivisionError: a bug of the hook's$"
    with pytest.raises(RunError, match=rf"^liar\.on_draw {report}") as caught:
        fold([hook], "on_draw", now, batch())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RunError, match=rf"^liar\.on_network {report}"):
        announce([hook], now)
    with pytest.raises(RunError, match=rf"^liar\.on_loss {report}"):
        extra_loss([hook], now, batch())


def test_a_request_error_of_a_hook_keeps_its_message(toy_moment: Moments) -> None:
    with pytest.raises(RequestError, match=r"^the hook says no$"):
        announce([Answer(refuse)], toy_moment)


@pytest.mark.parametrize("event", EVENTS)
def test_a_hook_that_fails_fails_the_distillation(
    toy_task: Callable[..., Task], event: str
) -> None:
    broken = type("Broken", (Hook,), {event: lambda self, *_: fail(_), "name": "broken"})
    task = toy_task()
    backend = DC(GradientMatchingOptions(batch_real=8), ipc=1, recipe=task.recipe)
    with pytest.raises(RunError, match=rf"^broken\.{event} at step \d: ZeroDivisionError"):
        distil(task, backend, [broken()])
