"""A bench over one finished attack, and toy defenses of every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses.base import (
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
from distillsec.distill.training import fit
from distillsec.distill.types import DistilledSet
from distillsec.eval.bench.bench import Bench, SetUnderTest
from distillsec.eval.bench.options import BenchOptions
from distillsec.eval.bench.store import VictimStore
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.results.record import read_record
from distillsec.eval.run.cell import run_cell
from distillsec.eval.run.folder import RunFolder
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.setup import prepare
from distillsec.eval.run.source import trigger_case


class ToyOptions(DefenseOptions):
    level: int = 3


class Toy:
    """The base of the toys."""

    Options: ClassVar[type[DefenseOptions]] = ToyOptions

    def __init__(self, options: DefenseOptions) -> None:
        self.options = options


class Watching(Toy, SetScorer):
    """Scores rows by their number, suspects class 2, and keeps the views that it gets."""

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
    """Predicts class 0 for everything."""

    name = "zero"

    def purify(self, view: DefenderView) -> Predictor:
        return lambda images: torch.zeros(len(images), dtype=torch.int64)


class Look(Toy, Inspector):
    name = "look"

    def inspect(self, view: DefenderView) -> Inspection:
        return Inspection(statistic=0.5, alarm=True, anomaly=torch.arange(view.classes).float())


class Nothing(Toy, Repairer):
    """Returns the victim unchanged."""

    name = "nothing"

    def repair(self, view: DefenderView) -> nn.Module:
        return view.victim


TOYS = {kind.name: kind for kind in (Watching, Corner, Halve, Fresh, Zero, Look, Nothing)}


@pytest.fixture
def toy() -> Callable[..., Defense]:
    """A factory of toy defenses: ``toy("corner", level=2)``."""
    return lambda name, **options: TOYS[name](ToyOptions(**options))


@dataclasses.dataclass
class MadeBench:
    """A bench, the set that it tests, and its calls of ``progress``."""

    bench: Bench
    tested: SetUnderTest
    progress: list[tuple[str, int, int]]

    @property
    def views(self) -> list[DefenderView]:
        return [trial.view for side in self.bench._trials for trial in side]


SEED, TARGET, RATE = 918273, 6, 0.0871


@pytest.fixture(scope="session")
def secrets() -> tuple[int, float]:
    """The seed and poison rate of ``attacked``: numbers that occur nowhere else."""
    return SEED, RATE


@pytest.fixture(scope="session")
def attacked(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished attack."""
    out = tmp_path_factory.mktemp("secret-place") / "run-of-the-attacker"
    config = tiny(seed=SEED, target=TARGET, poison_rate=RATE, trigger_size=3, victim_epochs=20)
    run_cell(config, out, reporter=Reporter(quiet=True))
    return out


@pytest.fixture
def tested(attacked: Path) -> SetUnderTest:
    """The set of ``attacked``, as ``defend`` opens it."""
    folder = RunFolder(attacked)
    record = read_record(folder.record)
    setup = prepare(configure(**record.config))
    return SetUnderTest(
        setup=setup,
        attacked=load_set(folder.distilled),
        twin=load_set(attacked / "control" / "distilled.safetensors"),
        case=trigger_case(folder.trigger, setup, record),
        poisoned=None,
    )


@pytest.fixture
def make_bench(tested: SetUnderTest, tmp_path: Path) -> Callable[..., MadeBench]:
    """A factory: ``make_bench(without=("twin",), holdout=80)``; the rest are bench options."""

    def make(*, without: tuple[str, ...] = (), **options: Any) -> MadeBench:
        missing: dict[str, Any] = dict.fromkeys(without)
        changed = dataclasses.replace(tested, **missing)
        progress: list[tuple[str, int, int]] = []
        bench = Bench(
            changed,
            BenchOptions(**{"holdout": 60, **options}),
            VictimStore(tmp_path / "victims"),
            lambda *call: progress.append(call),
        )
        return MadeBench(bench, changed, progress)

    return make
