"""What a defender can reach: no secret of the attack, clean held-out images, shuffled inputs."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillsec.attacks import Attack, Goal, TestCase, Trigger
from distillsec.defenses.base import DefenderView, DefenseOptions, InputScorer
from distillsec.distill.randomness import Streams
from distillsec.eval.config.schema import Config
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.folder import RunFolder
from distillsec.eval.run.setup import Setup

MakeBench = Callable[..., Any]
MakeToy = Callable[..., Any]
SECRET_TYPES: tuple[type, ...] = (Config, Setup, Attack, Trigger, Goal, TestCase, Streams)
SECRET_TYPES += (Path, RunFolder, Record)


def reachable(root: object) -> Iterator[object]:
    """All objects that an object refers to: attributes, items, closures, owners of methods."""
    seen: set[int] = set()
    waiting: list[object] = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, dict):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        elif isinstance(thing, types.FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
            waiting += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        elif isinstance(thing, types.MethodType):
            waiting += [thing.__self__, thing.__func__]
        else:
            waiting += [*getattr(thing, "__dict__", {}).values()]
            waiting += [
                getattr(thing, name)
                for kind in type(thing).__mro__
                for name in getattr(kind, "__slots__", ())
                if isinstance(name, str) and hasattr(thing, name)
            ]


def test_hidden_objects_are_reachable() -> None:
    secret = object()

    def closure() -> object:
        return secret

    @dataclasses.dataclass
    class Holder:
        inner: Any

    for hidden in ([{"a": (secret,)}], Holder(closure), Holder(Holder({1: [closure]}))):
        assert any(thing is secret for thing in reachable(hidden))
    assert any(thing == 5 for thing in reachable(Streams(5).generator))


def test_a_defender_sees_no_secret(
    toy: MakeToy, make_bench: MakeBench, attacked: Path, secrets: tuple[int, float]
) -> None:
    made = make_bench()
    watching, corner = toy("watching"), toy("corner")
    for defense in (watching, corner, toy("fresh"), toy("halve")):
        assert made.bench.outcome(defense, "quick").status == "done"
    record = read_record(attacked / "record.json")
    case = made.tested.case
    assert case is not None and len(watching.views) == 4
    words = {"naive", "secret-place", "run-of-the-attacker", "bottom-right"}
    found = list(reachable(watching.views))
    assert any(thing is watching.views[0].victim for thing in found)
    for thing in found:
        assert not isinstance(thing, SECRET_TYPES), thing
        assert thing not in secrets if isinstance(thing, int | float) else True
        if isinstance(thing, str):
            assert not any(word in thing for word in words), thing
        if isinstance(thing, Tensor):
            assert thing.dtype != torch.bool, "a mask of poisoned or triggered rows"
            assert thing.shape != case.triggered.shape or not thing.equal(case.triggered)
    asr = record.metrics["attack_success_rate"].values
    assert not any(
        isinstance(thing, float) and thing in asr and thing not in (0, 1) for thing in found
    )


def test_the_holdout_is_clean_and_never_measured_on(make_bench: MakeBench) -> None:
    made = make_bench(holdout=80)
    bench, data = made.bench, made.tested.setup.data
    held = {image.numpy().tobytes() for image in bench._holdout.images}
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(data.test.images, data.test.labels, strict=True)
    }
    assert len(bench._holdout) == 80 and held <= known.keys()
    assert bench._holdout.index is None  # row numbers would identify the images
    for image, label in zip(bench._holdout.images, bench._holdout.labels, strict=True):
        assert known[image.numpy().tobytes()] == int(label)
    assert bench._inputs is not None
    for images in (bench._test.images, bench._inputs.images[~bench._inputs.triggered]):
        assert held.isdisjoint(image.numpy().tobytes() for image in images)
    assert len(bench._test) == len(data.test) - 80


class Position(InputScorer):
    """Scores an input by its position in the batch."""

    name, Options = "position", DefenseOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return torch.arange(len(images)).float()

    def threshold(self, view: DefenderView) -> None:
        return None


def test_inputs_are_shuffled(make_bench: MakeBench) -> None:
    """The position of an image says nothing about it."""
    outcome = make_bench().bench.outcome(Position(DefenseOptions()), "quick")
    assert abs((outcome.metrics["auroc"].mean or 0) - 0.5) < 0.08
    assert "fpr_paper" not in outcome.metrics


def test_victims_and_defenses_have_independent_streams(make_bench: MakeBench) -> None:
    views = make_bench().views
    draws = [torch.rand(1, generator=view.generator("strip")).item() for view in views]
    assert draws[0] == draws[2] and draws[1] == draws[3]  # the same for a victim and its twin
    assert draws[0] != draws[1]
    assert torch.rand(1, generator=views[0].generator("strip", 1)).item() != draws[0]
    assert torch.rand(1, generator=views[0].generator("teco")).item() != draws[0]


def test_the_runs_seed_cannot_be_found_by_trying(
    make_bench: MakeBench, secrets: tuple[int, float]
) -> None:
    """Seeds are small numbers: a defender could compare the view with what each seed gives."""
    made = make_bench()
    entropies = {view.entropy for view in made.views}
    test = made.tested.setup.data.test
    first = made.views[0].holdout.images[:5]
    keys = [("defense", 2, number) for number in (0, 1)] + [("defense", "view", 0)]
    for seed in {*range(2000), secrets[0]}:
        streams = Streams(seed)
        assert entropies.isdisjoint(streams.integer(*key) for key in keys)
        for key in (0, "held-out images"):
            order = torch.randperm(len(test), generator=streams.generator("defense", key))
            assert not torch.equal(test.images[order[:5]], first)
