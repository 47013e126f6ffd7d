"""What defenses share: victims are trained once, and changes of one defense are undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses.base import DefenderView, DefenseOptions, InputScorer
from distillsec.distill.training import predict
from distillsec.distill.types import RequestError
from distillsec.eval.bench import store
from distillsec.eval.results.record import read_record
from distillsec.eval.run.victims import train_victim

MakeBench = Callable[..., Any]
MakeToy = Callable[..., Any]


def test_victims_are_trained_once(
    toy: MakeToy, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = []

    def counting(*args: Any) -> nn.Module:
        trained.append(args[3])
        return train_victim(*args)

    monkeypatch.setattr(store, "train_victim", counting)
    first = make_bench()
    assert trained == [0, 1, 0, 1]  # attacked, then the twin
    again = make_bench()
    assert len(trained) == 4 and again.bench.before() == first.bench.before()
    first.bench.outcome(toy("halve"), "quick")
    again.bench.outcome(toy("halve"), "quick")
    assert len(trained) == 8
    assert first.progress[3] == ("training victims", 4, 4)
    assert first.progress[-1] == ("halve", 4, 4)
    for victim in (tmp_path / "victims").iterdir():
        victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(RequestError, match=r"victims/\w+\.safetensors: "):
        make_bench()


def test_victims_are_those_that_the_run_measured(make_bench: MakeBench, attacked: Path) -> None:
    made = make_bench(holdout=0, images=10_000)
    record = read_record(attacked / "record.json")
    found = made.bench.before()
    for name in ("clean_test_accuracy", "attack_success_rate", "control_attack_success_rate"):
        assert sorted(found[name].values) == sorted(record.metrics[name].values)  # type: ignore[type-var]


def test_activations_and_predictions_are_computed_once(make_bench: MakeBench) -> None:
    view = make_bench().views[0]
    calls = []
    handle = view.victim.register_forward_hook(lambda *_: calls.append(1))
    images = view.holdout.images
    first = view.logits(images)
    count = len(calls)
    assert torch.equal(view.logits(images), first) and len(calls) == count > 0
    assert torch.equal(first.argmax(dim=1), predict(view.victim, images))
    features = view.features(images)
    assert features.shape[0] == len(images)
    view.features(images).zero_()  # each caller gets a copy
    assert torch.equal(view.features(images), features) and bool(features.any())
    assert not features.requires_grad and not first.requires_grad
    handle.remove()


class LevelOptions(DefenseOptions):
    level: int = 3


class Vandal(InputScorer):
    """Changes what it gets; ``level`` says which part."""

    name, Options = "vandal", LevelOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        weights = next(view.victim.parameters())
        tensors = (images, view.holdout.images, view.distilled.batch.images, weights.detach())
        level = self.options.level  # type: ignore[attr-defined]
        if level < len(tensors):
            tensors[level].numpy()[:] = 7
        elif level == 4:
            for parameter in view.victim.parameters():
                parameter.data = torch.zeros_like(parameter)
        elif level == 5:
            view.victim.register_forward_hook(lambda *_: torch.zeros(len(images), 10))
        else:
            view.victim.train()
        view.logits(images)
        return torch.zeros(len(images))

    def threshold(self, view: DefenderView) -> None:
        return None


class Logit(InputScorer):
    """Scores an input by the first of the victim's logits."""

    name, Options = "logit", LevelOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return view.logits(images)[:, 0]

    def threshold(self, view: DefenderView) -> None:
        return None


@pytest.mark.parametrize("level", range(7))
def test_changes_of_a_defense_are_undone_for_the_next(
    toy: MakeToy, make_bench: MakeBench, level: int
) -> None:
    made = make_bench()
    before = make_bench().bench.outcome(Logit(LevelOptions()), "quick").metrics
    zero = made.bench.outcome(toy("nothing"), "quick").metrics
    outcome = made.bench.outcome(Vandal(LevelOptions(level=level)), "quick")
    assert outcome.status == "error"
    assert "vandal changed what other defenses see" in (outcome.reason or "")
    assert made.bench.outcome(Logit(LevelOptions()), "quick").metrics == before
    assert made.bench.outcome(toy("nothing"), "quick").metrics == zero
