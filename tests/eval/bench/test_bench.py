"""The bench: what a defender can reach, how each family is measured, what becomes of failures."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distillsec.attacks import Attack, Goal, TestCase, Trigger
from distillsec.defenses.base import (
    FAMILIES,
    DefenderView,
    Defense,
    DefenseOptions,
    InputScorer,
    Inspection,
    Inspector,
    Predictor,
    Purifier,
    Repairer,
    Sanitiser,
    SetScorer,
    SetScores,
    Trainer,
)
from distillsec.distill.files.artifact import load_set
from distillsec.distill.randomness import Streams
from distillsec.distill.training import fit, predict
from distillsec.distill.types import DistilledSet, RequestError
from distillsec.eval.bench.bench import Bench, BenchOptions, Subject, choose_defenses, make_defense
from distillsec.eval.bench.store import VictimStore
from distillsec.eval.bench.trial import Measured, auroc, calibrated, effectiveness
from distillsec.eval.config.schema import Config
from distillsec.eval.results.metrics import summarise
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.folder import RunFolder
from distillsec.eval.run.source import trigger_case
from distillsec.eval.run.victims import train_victim
from distillsec.eval.run.workshop import Workshop, open_workshop

Tiny = Callable[..., Config]
SEED, TARGET, RATE = 918273, 6, 0.0871


class Options(DefenseOptions):
    level: int = 3


class Toy:
    """What the toys below share."""

    Options: ClassVar[type[DefenseOptions]] = Options

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options


class Watching(Toy, SetScorer):
    """Scores rows by their number, points at class 2, and remembers what it was shown."""

    name = "watching"
    names_class = True
    views: list[DefenderView]

    def __init__(self, options: DefenseOptions) -> None:
        super().__init__(options)
        self.views = []

    def score_set(self, view: DefenderView) -> SetScores:
        self.views.append(view)
        rows = torch.arange(len(view.labels)).double()
        return SetScores(
            rows=rows, flagged=rows < 2, statistic=float(rows.sum()), alarm=True, suspect=2
        )


class Corner(Toy, InputScorer):
    """Scores an input by the brightness of the trigger's corner."""

    name = "corner"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return images[:, :, 5:7, 5:7].mean(dim=(1, 2, 3))

    def threshold(self, view: DefenderView) -> float:
        return 0.99


class Cheat(Toy, InputScorer):
    """Scores an input by its place among those it is shown."""

    name = "cheat"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return torch.arange(len(images)).float()

    def threshold(self, view: DefenderView) -> None:
        return None


class Halve(Toy, Sanitiser):
    name = "halve"

    def sanitise(self, view: DefenderView) -> DistilledSet:
        batch = view.distilled.batch
        kept = batch.rows(torch.arange(0, len(batch), 2))
        return dataclasses.replace(view.distilled, batch=kept)


class Fresh(Toy, Trainer):
    name = "fresh"

    def train(self, view: DefenderView) -> nn.Module:
        batch, recipe = view.distilled.batch, view.distilled.recipe
        return fit(view.network(1), batch, recipe, view.generator(self.name))

    def figures(self, view: DefenderView) -> dict[str, float]:
        return {"epsilon": 2.5}


class Zero(Toy, Purifier):
    """Answers class 0 to everything."""

    name = "zero"

    def purify(self, view: DefenderView) -> Predictor:
        return lambda images: torch.zeros(len(images), dtype=torch.int64)


class Look(Toy, Inspector):
    name = "look"

    def inspect(self, view: DefenderView) -> Inspection:
        return Inspection(statistic=0.5, alarm=True, anomaly=torch.arange(view.classes).float())


class Nothing(Toy, Repairer):
    """Repairs nothing."""

    name = "nothing"

    def repair(self, view: DefenderView) -> nn.Module:
        return view.victim


class Broken(Corner):
    name = "broken"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return torch.full((len(images),), torch.nan)


class Crash(Corner):
    name = "crash"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        raise ValueError("no luck\nat all")


class Refusing(Corner):
    name = "refusing"

    def objection(self, view: DefenderView) -> str:
        return "the network has no batch norm"


class Stray(Toy, Defense):
    """Of no family."""

    name = "stray"


@dataclasses.dataclass
class Stand:
    """A bench over a finished run, with what it was made of."""

    bench: Bench
    subject: Subject
    progress: list[tuple[str, int, int]]

    @property
    def views(self) -> list[DefenderView]:
        return [trial.view for side in self.bench._trials for trial in side]


@pytest.fixture(scope="session")
def attacked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished attack whose secrets are numbers that nothing else has."""
    from distillsec.eval.run.cell import run_cell
    from distillsec.eval.run.progress import Reporter

    out = tmp_path_factory.mktemp("secret-place") / "run-of-the-attacker"
    config = tiny(seed=SEED, target=TARGET, poison_rate=RATE, trigger_size=3, victim_epochs=20)
    run_cell(config, out, reporter=Reporter(quiet=True))
    return out


def subject_of(run: Path) -> Subject:
    folder = RunFolder(run)
    record = read_record(folder.record)
    from distillsec.eval.config.schema import configure

    workshop = open_workshop(configure(**record.config))
    return Subject(
        workshop=workshop,
        attacked=load_set(folder.distilled),
        twin=load_set(run / "control" / "distilled.safetensors"),
        case=trigger_case(folder.trigger, workshop, record.model_copy(deep=True)),
        poisoned=None,
    )


@pytest.fixture
def stand(attacked: Path, tmp_path: Path) -> Callable[..., Stand]:
    def make(*, without: tuple[str, ...] = (), **options: Any) -> Stand:
        gone: dict[str, Any] = dict.fromkeys(without)
        subject = dataclasses.replace(subject_of(attacked), **gone)
        progress: list[tuple[str, int, int]] = []
        bench = Bench(
            subject,
            BenchOptions(**{"holdout": 60, **options}),
            VictimStore(tmp_path / "victims"),
            lambda *told: progress.append(told),
        )
        return Stand(bench, subject, progress)

    return make


# What a defender can reach -----------------------------------------------------------------------


def reachable(root: object) -> Iterator[object]:
    """Everything that hangs on an object: attributes, items, closures, bound methods' owners."""
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


def test_the_walk_finds_what_is_hidden() -> None:
    secret = object()

    def closure() -> object:
        return secret

    @dataclasses.dataclass
    class Holder:
        inner: Any

    for hidden in ([{"a": (secret,)}], Holder(closure), Holder(Holder({1: [closure]}))):
        assert any(thing is secret for thing in reachable(hidden))
    assert any(thing == 5 for thing in reachable(Streams(5).generator))


SECRET_TYPES: tuple[type, ...] = (Config, Workshop, Attack, Trigger, Goal, TestCase, Streams)
SECRET_TYPES += (Path, RunFolder, Record)


def test_a_defender_sees_no_secret(stand: Callable[..., Stand], attacked: Path) -> None:
    made = stand()
    watching, corner = Watching(Options()), Corner(Options())
    for defense in (watching, corner, Fresh(Options()), Halve(Options())):
        assert made.bench.outcome(defense, "quick").status == "done"
    record = read_record(attacked / "record.json")
    case = made.subject.case
    assert case is not None and len(watching.views) == 4
    words = {"naive", "secret-place", "run-of-the-attacker", "bottom-right"}
    found = list(reachable(watching.views))
    assert any(thing is watching.views[0].victim for thing in found)  # the walk got anywhere
    for thing in found:
        assert not isinstance(thing, SECRET_TYPES), thing
        assert thing not in (SEED, RATE) if isinstance(thing, int | float) else True
        if isinstance(thing, str):
            assert not any(word in thing for word in words), thing
        if isinstance(thing, Tensor):
            assert thing.dtype != torch.bool, "a mask of poisoned or triggered rows"
            assert thing.shape != case.triggered.shape or not thing.equal(case.triggered)
    asr = record.metrics["attack_success_rate"].values
    assert not any(
        isinstance(thing, float) and thing in asr and thing not in (0, 1) for thing in found
    )


def test_the_holdout_is_clean_and_never_measured_on(stand: Callable[..., Stand]) -> None:
    made = stand(holdout=80)
    bench, data = made.bench, made.subject.workshop.data
    held = {image.numpy().tobytes() for image in bench._holdout.images}
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(data.test.images, data.test.labels, strict=True)
    }
    assert len(bench._holdout) == 80 and held <= known.keys()
    assert bench._holdout.index is None  # a row's number would lead to the data
    for image, label in zip(bench._holdout.images, bench._holdout.labels, strict=True):
        assert known[image.numpy().tobytes()] == int(label)
    assert bench._inputs is not None
    for images in (bench._test.images, bench._inputs.images[~bench._inputs.triggered]):
        assert held.isdisjoint(image.numpy().tobytes() for image in images)
    assert len(bench._test) == len(data.test) - 80


def test_inputs_come_shuffled(stand: Callable[..., Stand]) -> None:
    """Who looks at an image's place instead of the image finds nothing."""
    outcome = stand().bench.outcome(Cheat(Options()), "quick")
    assert abs((outcome.metrics["auroc"].mean or 0) - 0.5) < 0.08
    assert "fpr_paper" not in outcome.metrics


# How each family is measured ---------------------------------------------------------------------


def test_every_family_is_measured(stand: Callable[..., Stand]) -> None:
    made = stand()
    told = {
        each.family: made.bench.outcome(each, "quick")
        for kind in (Watching, Halve, Fresh, Corner, Zero, Look, Nothing)
        for each in [kind(Options())]
    }
    assert tuple(told) == FAMILIES
    look = told["inspection"].metrics
    assert look["model_statistic"].mean == 0.5 and look["alarm"].mean == 1
    # It points at class 9, which is not the target, whether it raises an alarm or not.
    assert look["target_found"].mean == look["target_suspected"].mean == 0
    assert told["training"].metrics["epsilon"].values == (2.5, 2.5)
    for family, outcome in told.items():
        assert (outcome.status, outcome.family) == ("done", family)
        for summary in outcome.metrics.values():
            assert len(summary.values) == 2  # a value for each victim


def test_inputs_are_measured_as_a_brute_force_would(stand: Callable[..., Stand]) -> None:
    made = stand()
    bench = made.bench
    found = bench.outcome(Corner(Options()), "quick").metrics
    case, test = bench._case, bench._test
    assert case is not None
    score = Corner(Options()).score_inputs
    view = made.views[0]
    clean = score(view, test.images[case.eligible]).double()
    triggered = score(view, case.triggered[case.eligible]).double()
    pairs = (triggered[:, None] > clean[None]).double() + 0.5 * (triggered[:, None] == clean[None])
    assert found["auroc"].mean == pytest.approx(float(pairs.mean()), abs=1e-12)
    held = score(view, view.holdout.images).double().sort().values
    threshold = held[-1 - int(0.05 * (len(held) - 1))]
    assert found["fpr_at_5"].mean == pytest.approx(float((clean > threshold).double().mean()))
    assert found["tpr_paper"].mean == float((triggered > 0.99).double().mean())
    assert found["control_auroc"] == found["auroc"]  # it never looks at the victim


def test_no_holdout_no_calibration(stand: Callable[..., Stand]) -> None:
    found = stand(holdout=0).bench.outcome(Corner(Options()), "quick").metrics
    assert "auroc" in found and "tpr_at_5" not in found and "fpr_paper" in found


def test_sets_are_measured_by_their_rows(attacked: Path, tmp_path: Path) -> None:
    subject = subject_of(attacked)
    poisoned = torch.zeros(10, dtype=torch.bool)
    poisoned[[1, 9]] = True
    subject = dataclasses.replace(subject, poisoned=poisoned)
    bench = Bench(subject, BenchOptions(), VictimStore(tmp_path), lambda *_: None)
    found = bench.outcome(Watching(Options()), "quick").metrics
    assert found["set_statistic"].mean == 45 and found["set_alarm"].mean == 1
    assert found["rows_flagged"].mean == pytest.approx(0.2)
    assert found["row_auroc"].mean == pytest.approx(9 / 16)  # rows 1, 9 among 0 to 9
    assert found["row_tpr_paper"].mean == 0.5 and found["row_fpr_paper"].mean == 1 / 8
    assert found["target_found"].mean == 0
    assert "control_row_auroc" not in found and "control_set_statistic" in found
    assert found["control_row_fpr_calibrated"].mean == pytest.approx(0.0)


def test_row_scores_are_calibrated_on_the_next_victims_twin() -> None:
    def made(*values: float) -> Measured:
        return Measured({}, torch.tensor(values, dtype=torch.float64))

    poisoned = torch.tensor([True, False, False])
    ours, twins = [made(5, 3, 1), made(5, 3, 1)], [made(1, 2, 4), made(1, 2, 2)]
    calibrated(ours, twins, poisoned)
    assert ours[0].numbers == {"row_tpr_calibrated": 1.0, "row_fpr_calibrated": 0.5}  # above 2
    assert ours[1].numbers == {"row_tpr_calibrated": 1.0, "row_fpr_calibrated": 0.0}  # above 4
    assert twins[0].numbers == {"row_fpr_calibrated": pytest.approx(1 / 3)}
    alone = [made(1, 2, 3)]
    calibrated(alone, alone, poisoned)
    assert alone[0].numbers == {}


def test_answers_are_measured_on_both_sides(stand: Callable[..., Stand]) -> None:
    made = stand()
    before = made.bench.before()
    found = made.bench.outcome(Zero(Options()), "quick").metrics
    test = made.bench._test
    share = float((test.labels == 0).double().mean())
    assert found["clean_test_accuracy"].mean == pytest.approx(share)
    assert found["control_clean_test_accuracy"].mean == pytest.approx(share)
    assert found["attack_success_rate"].mean == 0
    asr, cta = before["attack_success_rate"].values, before["clean_test_accuracy"].values
    expected = [
        (max(0.0, a or 0) - max(0.0, (c or 0) - share) + 1) / 2
        for a, c in zip(asr, cta, strict=True)
    ]
    assert found["defense_effectiveness_rating"].values == pytest.approx(expected)
    nothing = made.bench.outcome(Nothing(Options()), "quick").metrics
    assert nothing["attack_success_rate"] == before["attack_success_rate"]
    assert nothing["defense_effectiveness_rating"].mean == 0.5


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([score for score, _ in rows])
    positive = torch.tensor([kind for _, kind in rows])
    ours, theirs = scores[positive], scores[~positive]
    if not len(ours) or not len(theirs):
        assert auroc(scores, positive) is None
        return
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in ours.tolist() for b in theirs.tolist()])
    assert auroc(scores, positive) == pytest.approx(float(wins), abs=1e-9)


def test_effectiveness_is_the_published_formula() -> None:
    def both(asr: float | None, cta: float) -> dict[str, float | None]:
        return {"attack_success_rate": asr, "clean_test_accuracy": cta}

    assert effectiveness(both(1.0, 0.9), both(0.0, 0.9)) == 1.0
    assert effectiveness(both(1.0, 0.9), both(1.0, 0.9)) == 0.5
    assert effectiveness(both(1.0, 0.9), both(0.2, 0.8)) == pytest.approx((0.8 - 0.1 + 1) / 2)
    assert effectiveness(both(0.5, 0.8), both(0.7, 0.9)) == 0.5  # neither gain nor loss counts
    assert effectiveness(both(None, 0.8), both(0.7, 0.9)) is None


# What becomes of failures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defense", "status", "reason"),
    [
        (Crash, "error", r"ValueError\('no luck.*at all'\)"),
        (
            Broken,
            "error",
            r"broken: expected (\d+) finite numbers, got shape .*, \1 of them not .*",
        ),
        (Refusing, "not applicable", "the network has no batch norm"),
    ],
)
def test_a_defense_that_gives_no_figure_says_why(
    stand: Callable[..., Stand], defense: type[Toy], status: str, reason: str
) -> None:
    outcome = stand().bench.outcome(defense(Options()), "paper")  # type: ignore[arg-type]
    assert (outcome.status, outcome.budget) == (status, "paper")
    assert outcome.reason is not None and outcome.metrics == {}
    assert re.fullmatch(reason, outcome.reason)
    assert "\n" not in outcome.reason
    assert outcome.options == {"level": 3}


def test_without_a_trigger_inputs_cannot_be_told_apart(stand: Callable[..., Stand]) -> None:
    made = stand(without=("case", "twin"))
    outcome = made.bench.outcome(Corner(Options()), "quick")
    assert outcome.status == "not applicable" and "no trigger is known" in (outcome.reason or "")
    assert made.bench.outcome(Zero(Options()), "quick").metrics.keys() == {"clean_test_accuracy"}
    assert made.bench.outcome(Watching(Options()), "quick").status == "done"


def test_a_class_of_no_family_is_refused(stand: Callable[..., Stand]) -> None:
    with pytest.raises(RequestError, match="stray: Stray is of no family"):
        stand().bench.outcome(Stray(Options()), "quick")


# Sharing and budgets -----------------------------------------------------------------------------


def test_victims_are_trained_once(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distillsec.eval.bench import store

    trained = []

    def counting(*args: Any) -> nn.Module:
        trained.append(args[3])
        return train_victim(*args)

    monkeypatch.setattr(store, "train_victim", counting)
    first = stand()
    assert trained == [0, 1, 0, 1]  # attacked, then the twin
    again = stand()
    assert len(trained) == 4 and again.bench.before() == first.bench.before()
    first.bench.outcome(Halve(Options()), "quick")
    again.bench.outcome(Halve(Options()), "quick")
    assert len(trained) == 8
    assert first.progress[3] == ("training victims", 4, 4)
    assert first.progress[-1] == ("halve", 4, 4)
    for victim in (tmp_path / "victims").iterdir():
        victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(RequestError, match=r"victims/\w+\.safetensors: "):
        stand()


def test_a_victim_is_the_one_that_the_run_measured(
    stand: Callable[..., Stand], attacked: Path
) -> None:
    made = stand(holdout=0, images=10_000)
    record = read_record(attacked / "record.json")
    found = made.bench.before()
    for name in ("clean_test_accuracy", "attack_success_rate", "control_attack_success_rate"):
        assert sorted(found[name].values) == sorted(record.metrics[name].values)  # type: ignore[type-var]


def test_activations_and_predictions_are_computed_once(stand: Callable[..., Stand]) -> None:
    view = stand().views[0]
    calls = []
    handle = view.victim.register_forward_hook(lambda *_: calls.append(1))
    images = view.holdout.images
    first = view.logits(images)
    count = len(calls)
    assert torch.equal(view.logits(images), first) and len(calls) == count > 0
    assert torch.equal(first.argmax(dim=1), predict(view.victim, images))
    features = view.features(images)
    assert features.shape[0] == len(images)
    view.features(images).zero_()  # each caller has a copy of its own
    assert torch.equal(view.features(images), features) and bool(features.any())
    assert not features.requires_grad and not first.requires_grad
    handle.remove()


def test_the_defenders_randomness_is_his_own(stand: Callable[..., Stand]) -> None:
    views = stand().views
    draws = [torch.rand(1, generator=view.generator("strip")).item() for view in views]
    assert draws[0] == draws[2] and draws[1] == draws[3]  # twins are pairs
    assert draws[0] != draws[1]
    assert torch.rand(1, generator=views[0].generator("strip", 1)).item() != draws[0]
    # Two defenses share no stream, whatever keys they use.
    assert torch.rand(1, generator=views[0].generator("teco")).item() != draws[0]


def test_the_runs_seed_does_not_follow_from_what_a_defender_sees(
    stand: Callable[..., Stand],
) -> None:
    """Seeds are small: who can compute what follows from a seed tries them all."""
    made = stand()
    entropies = {view.entropy for view in made.views}
    test = made.subject.workshop.data.test
    first = made.views[0].holdout.images[:5]
    keys = [("defense", 2, number) for number in (0, 1)] + [("defense", "view", 0)]
    for seed in {*range(2000), SEED}:
        streams = Streams(seed)
        assert entropies.isdisjoint(streams.integer(*key) for key in keys)
        for key in (0, "held-out images"):
            order = torch.randperm(len(test), generator=streams.generator("defense", key))
            assert not torch.equal(test.images[order[:5]], first)


class Vandal(Toy, InputScorer):
    """Changes what it is given, the ``level``-th thing of it."""

    name = "vandal"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        weights = next(view.victim.parameters())
        things = (images, view.holdout.images, view.distilled.batch.images, weights.detach())
        level = self.options.level  # type: ignore[attr-defined]
        if level < len(things):
            things[level].numpy()[:] = 7
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


class Sees(Toy, InputScorer):
    """Scores an input by the victim's logits."""

    name = "sees"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        return view.logits(images)[:, 0]

    def threshold(self, view: DefenderView) -> None:
        return None


@pytest.mark.parametrize("level", range(7))
def test_what_one_defense_changes_the_next_does_not_see(
    stand: Callable[..., Stand], level: int
) -> None:
    made = stand()
    before = stand().bench.outcome(Sees(Options()), "quick").metrics
    zero = made.bench.outcome(Nothing(Options()), "quick").metrics
    outcome = made.bench.outcome(Vandal(Options(level=level)), "quick")
    assert outcome.status == "error"
    assert "vandal changed what other defenses see" in (outcome.reason or "")
    assert made.bench.outcome(Sees(Options()), "quick").metrics == before
    assert made.bench.outcome(Nothing(Options()), "quick").metrics == zero


class Shift(Toy, Repairer):
    """Adds ``level`` to the bias of class 0: the larger, the more images it takes."""

    name = "shift"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({"level": 0}, {"level": 1}, {"level": 1000})

    def repair(self, view: DefenderView) -> nn.Module:
        network = view.trainable_victim()
        with torch.no_grad():
            network.head.bias[0] += self.options.level / 10  # type: ignore[attr-defined,index,operator,union-attr]
        return network.requires_grad_(False)


def test_a_tuned_defender_chooses_by_held_out_accuracy_alone(stand: Callable[..., Stand]) -> None:
    made = stand()
    outcome = made.bench.outcome(Shift(Options()), "tuned")
    assert outcome.status == "done" and outcome.options == {"level": 3}  # what was asked for
    assert outcome.tuning.keys() == {"attacked", "twin"}
    for tuning in outcome.tuning.values():
        tried = tuning.tried
        assert [each.options["level"] for each in tried] == [0, 1, 1000]
        least = (tried[0].accuracy or 0) - 0.02  # level 0 is the victim itself
        assert tuning.least == pytest.approx(least) and tuning.caution is None
        wanted = max(n for n, each in enumerate(tried) if (each.accuracy or 0) >= least)
        assert [each.chosen for each in tried] == [n == wanted for n in range(3)]
    few = stand(holdout=19).bench.outcome(Shift(Options()), "tuned")
    assert few.caution == "too few held-out images to choose settings by"
    assert all(tuning.tried == [] for tuning in few.tuning.values())
    assert made.bench.outcome(Shift(Options()), "paper").tuning == {}
    assert made.bench.outcome(Corner(Options()), "tuned").tuning == {}  # it has no grid


def test_what_was_asked_for_is_not_tuned_away(stand: Callable[..., Stand]) -> None:
    outcome = stand().bench.outcome(Shift(Options(level=1)), "tuned")
    (tried,) = outcome.tuning["attacked"].tried  # the grid changes nothing else
    assert tried.options == {"level": 1} and tried.chosen


class Ruins(Shift):
    """Gives a broken network, an error of PyTorch, or one of its own."""

    name = "ruins"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({"level": 1000}, {"level": 2000})

    def repair(self, view: DefenderView) -> nn.Module:
        if self.options.level == 2000:  # type: ignore[attr-defined]
            raise RuntimeError("no such\nkernel")
        return super().repair(view)


class Silent(Ruins):
    name = "silent"
    grid = ({"level": 2000},)

    def caution(self, view: DefenderView) -> str:
        return "of little use"


def test_a_tuned_defense_says_where_no_setting_will_do(stand: Callable[..., Stand]) -> None:
    made = stand()
    outcome = made.bench.outcome(Ruins(Options()), "tuned")
    tried = outcome.tuning["twin"].tried
    assert outcome.status == "done" and [each.chosen for each in tried] == [True, False]
    assert tried[1].accuracy is None and tried[1].reason == "no such kernel"
    assert (outcome.caution or "").startswith("no setting keeps the held-out accuracy (0.")
    silent = made.bench.outcome(Silent(Options()), "tuned")
    assert silent.caution == "of little use; no setting gave an answer"
    assert not any(each.chosen for each in silent.tuning["attacked"].tried)


class Endless(Toy, SetScorer):
    """Says that a set is infinitely suspicious."""

    name = "endless"

    def score_set(self, view: DefenderView) -> SetScores:
        rows = torch.zeros(len(view.labels))
        return SetScores(rows=rows, flagged=rows > 0, statistic=float("inf"), alarm=None)


class Leaves(Corner):
    name = "leaves"

    def score_inputs(self, view: DefenderView, images: Tensor) -> Tensor:
        raise SystemExit(3)


def test_figures_that_are_not_finite_and_exits_are_errors(stand: Callable[..., Stand]) -> None:
    bench = stand().bench
    endless = bench.outcome(Endless(Options()), "quick")
    assert endless.reason == "endless: one of its figures is inf"
    assert bench.outcome(Leaves(Options()), "quick").reason == "SystemExit(3)"


def test_only_a_detector_that_names_classes_is_asked_for_the_target(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = stand().bench
    assert "target_suspected" in bench.outcome(Watching(Options()), "quick").metrics
    monkeypatch.setattr(Watching, "names_class", False)
    assert "target_suspected" not in bench.outcome(Watching(Options()), "quick").metrics


def test_a_quick_budget_measures_fewer_images() -> None:
    assert BenchOptions().most_images == 500
    assert BenchOptions(budget="paper").most_images is None
    assert BenchOptions(images=7).most_images == BenchOptions(budget="paper", images=7).most_images


def test_options_of_a_defense_and_of_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quick(Corner):
        quick = types.MappingProxyType({"level": 1})

    from distillsec.eval.bench import bench

    monkeypatch.setattr(bench, "DEFENSES", {"corner": Quick, "watching": Watching})

    def level(budget: Any, **options: Any) -> int:
        options_of = make_defense("corner", budget, options).options
        assert isinstance(options_of, Options)
        return options_of.level

    assert (level("quick"), level("paper"), level("quick", level=9)) == (1, 3, 9)
    assert list(choose_defenses(["all", "corner"], "quick", {})) == ["corner", "watching"]
    for names, options, text in (
        (["cornr"], {}, "unknown defense 'cornr'.*did you mean corner"),
        (["corner"], {"corner": {"lvl": 1}}, "corner has no option lvl; it takes level"),
        (["corner"], {"corner": {"level": "x"}}, "corner: level: .*got 'x'"),
        (["corner"], {"watching": {"level": 1}}, "options for watching, which was not chosen"),
        (["corner:Nope"], {}, "no module corner"),
    ):
        with pytest.raises(RequestError, match=text):
            choose_defenses(names, "quick", options)


def test_a_summary_of_no_values_is_none() -> None:
    assert summarise([None, None]).mean is None
