"""``distillsec benchmark``: suites, their runs, tables and pictures; resume; failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from distillsec.distill.types import RequestError
from distillsec.eval.figures import heatmap
from distillsec.eval.grid.suite import TwinGroup, groups, read_suite
from distillsec.eval.grid.summarise_benchmark import defense_row
from distillsec.eval.results.benchmark import Benchmark
from distillsec.eval.results.metrics import summarise
from distillsec.eval.results.record import Outcome, read_record

Cli = Callable[..., Result]
TINY: dict[str, Any] = {
    "dataset": "digits",
    "backend": "dc",
    "ipc": 1,
    "iterations": 2,
    "network": "convnet",
    "width": 4,
    "depth": 1,
    "poison_rate": 0.1,
    "victim_epochs": 3,
    "threads": 1,
    "device": "cpu",
}
OWN = '''
import os
from pathlib import Path
import torch
from distillsec.defenses.base import DefenseOptions, InputScorer, SetScorer, SetScores
from distillsec.distill.training import predict

class Bright(SetScorer):
    """Scores rows by their brightness."""
    name, Options = "bright", DefenseOptions
    def __init__(self, options):
        self.options = options
    def score_set(self, view):
        rows = view.distilled.batch.images.mean(dim=(1, 2, 3))
        return SetScores(rows=rows, flagged=rows > 9, statistic=float(rows.max()), alarm=False)

class Needy(InputScorer):
    """Never applies."""
    name, Options = "needy", DefenseOptions
    def __init__(self, options):
        self.options = options
    def not_applicable_because(self, view):
        return "it needs more"
    def score_inputs(self, view, images):
        raise AssertionError
    def threshold(self, view):
        return None
'''


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A factory of suite files that run in seconds."""
    (tmp_path / "own_defenses_of_suite.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def make(**changes: Any) -> Path:
        found: dict[str, Any] = {
            "description": "a tiny suite",
            "settings": {"tiny": {"keys": TINY}},
            "attacks": {
                "naive": {"attack": "naive"},
                "big": {"attack": "naive", "trigger_size": 4},
            },
            "defenses": ["own_defenses_of_suite:Bright", "own_defenses_of_suite:Needy"],
            "seeds": 2,
            "victims": 1,
            "holdout": 50,
            "images": 60,
        }
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**found, **changes}, sort_keys=False))
        return path

    yield make
    sys.modules.pop("own_defenses_of_suite", None)


def test_a_suite_ends_in_a_table_and_a_heat_map(
    suite: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli("benchmark", suite(calibration=1), "--out", out, "--jobs", 1, "--json")
    assert done.exit_code == 0, done.stderr
    found = Benchmark.model_validate(json.loads(done.stdout))
    assert found == Benchmark.model_validate_json((out / "table.json").read_text())
    assert (found.status, found.failures) == ("done", [])
    names = ["none", "own_defenses_of_suite:Bright", "own_defenses_of_suite:Needy"]
    assert [(row.attack, row.defense) for row in found.rows] == [
        (attack, name) for attack in ("naive", "big") for name in names
    ]
    none, bright, needy = found.select(attack="naive")
    assert none.seeds == bright.seeds == [0, 1] and bright.cells == {"done": 2}
    assert needy.cells == {"not applicable": 2} and needy.reason == "it needs more"
    assert {"set_auroc", "control_set_statistic"} <= bright.metrics.keys()
    assert bright.clean_sets == 1 and needy.clean_sets == 0  # needy has no statistic of sets
    assert "set_alarm_calibrated" not in bright.metrics  # two clean sets calibrate nothing
    reference = read_record(out / "tiny" / "seed-1000" / "clean-defended" / "record.json")
    assert "attack" not in reference.config and reference.status == "done"
    assert list(reference.defenses) == names[1:2]
    for seed in (0, 1):
        place = out / "tiny" / f"seed-{seed}"
        attacked, defended = (
            read_record(place / name / "record.json") for name in ("naive", "naive-defended")
        )
        assert attacked.control is not None and attacked.control["reused"]
        assert (
            defended.metrics["clean_test_accuracy"].mean
            == none.metrics["clean_test_accuracy"].values[seed]
        )
    # A twin and two attacks for each seed, and the set for calibration.
    assert len(list((out / "victims").iterdir())) == 2 * 3 + 1
    text = (out / "table.md").read_text()
    assert "# a tiny suite" in text and "not applicable: it needs more" in text
    assert (out / "heatmap.png").read_bytes()[:4] == b"\x89PNG"


def test_a_suite_resumes_where_it_stopped(
    suite: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = cli("benchmark", suite(seeds=1), "--out", out, "--jobs", 1, "--quiet")
    assert first.exit_code == 0, first.stderr
    record = out / "tiny" / "seed-0" / "naive-defended" / "record.json"
    kept, stamp = (
        read_record(record),
        (out / "tiny/seed-0/naive/distilled.safetensors").stat().st_mtime_ns,
    )
    again = cli("benchmark", suite(), "--out", out, "--jobs", 1, "--quiet")
    assert again.exit_code == 2 and "continue with --resume" in again.stderr
    more = cli("benchmark", suite(seeds=2), "--out", out, "--jobs", 1, "--resume", "--quiet")
    assert more.exit_code == 0 and "2 seeds" in more.stdout
    assert read_record(record).defenses == kept.defenses
    assert (out / "tiny/seed-0/naive/distilled.safetensors").stat().st_mtime_ns == stamp
    other = cli("benchmark", suite(holdout=20), "--out", out, "--resume", "--quiet")
    assert other.exit_code == 2 and "holds another suite" in other.stderr


def test_a_failed_run_is_in_the_table_and_the_others_continue(
    suite: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    attacks = {"greedy": {"attack": "naive", "poison_rate": 0.99}, "naive": {"attack": "naive"}}
    file = suite(attacks=attacks, seeds=1)
    done = cli("benchmark", file, "--out", tmp_path / "out", "--jobs", 1)
    assert done.exit_code == 1 and "2 cells failed" in done.stderr
    assert "- `tiny/seed-0/greedy`: poison rate 0.99 asks for" in done.stdout
    assert "- `tiny/seed-0/greedy-defended`: failed dependency: tiny/seed-0/greedy" in done.stdout
    found = Benchmark.model_validate_json((tmp_path / "out" / "table.json").read_text())
    assert found.status == "running"
    assert [row.cells for row in found.select(defense="none")] == [
        {"done": 0, "missing": 1},
        {"done": 1, "missing": 0},
    ]


@pytest.mark.slow
def test_several_processes_give_the_same(
    suite: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    found = []
    for jobs in (1, 2):
        out = tmp_path / f"out-{jobs}"
        done = cli("benchmark", suite(defenses=[]), "--out", out, "--jobs", jobs, "--quiet")
        assert done.exit_code == 0, done.stderr
        table = Benchmark.model_validate_json((out / "table.json").read_text())
        found.append([row.model_dump() for row in table.rows])
    assert found[0] == found[1]


def test_victims_of_several_architectures(
    suite: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    attacks = {"naive": {"attack": "naive"}}
    file = suite(victim_networks=["convnet", "mlp"], attacks=attacks, seeds=1)
    done = cli("benchmark", file, "--out", tmp_path / "out", "--jobs", 1, "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    none = [row for row in Benchmark.model_validate_json(done.stdout).rows if row.defense == "none"]
    assert [row.network for row in none] == ["convnet", "mlp"]
    assert none[0].metrics != none[1].metrics


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"defences": []}, "has no option defences"),
        ({"defenses": ["stripp"]}, "unknown defense 'stripp'"),
        ({"settings": {}}, "settings: .*at least 1 item"),
        ({"settings": {"a/b": {"keys": TINY}}}, "names a folder"),
        ({"attacks": {"clean": {"attack": "naive"}}}, "'clean' is the folder of the clean twin"),
        ({"seeds": 1001}, "seeds: .*less than or equal to 1000"),
        ({"calibration": -1}, "calibration: .*greater than or equal to 0"),
        ({"settings": {"a": {"preset": "digits-nope"}}}, "digits-nope"),
        ({"settings": {"a": {"keys": {"ipcc": 1}}}}, "ipcc"),
        ({"attacks": {"a": {"attack": "nope"}}}, "unknown attack 'nope'"),
        ({"attacks": {"a": {}}}, "a of tiny: no attack is set"),
        ({"budget": "huge"}, "budget"),
        ({"seeds": 0}, "seeds"),
        ({"options": {"strip": {"copies": 1}}}, "options for strip, which was not chosen"),
    ],
)
def test_a_wrong_suite_is_one_line(
    suite: Callable[..., Path], cli: Cli, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    file = suite(**changes)
    with pytest.raises(RequestError, match=rf"suite\.yaml.*{text}"):
        read_suite(file)
    done = cli("benchmark", file)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_attacks_of_a_setting_must_share_a_twin(suite: Callable[..., Path], cli: Cli) -> None:
    attacks = {"a": {"attack": "naive"}, "b": {"attack": "naive", "iterations": 3}}
    done = cli("benchmark", suite(attacks=attacks, seeds=1), "--out", "out", "--jobs", 1)
    assert done.exit_code == 2
    assert "tiny: b needs another clean twin than the others" in done.stderr


def test_groups_of_all_settings_come_seed_by_seed(suite: Callable[..., Path]) -> None:
    settings = {
        "a": {"keys": TINY},
        "b": {"keys": TINY, "seeds": 1, "attacks": {"big": None, "naive": {"trigger_size": 3}}},
    }
    found = read_suite(suite(settings=settings, first_seed=7))
    assert groups(found) == [TwinGroup("a", 7), TwinGroup("b", 7), TwinGroup("a", 8)]
    assert found.attacks_of("a") == ["naive", "big"] and found.attacks_of("b") == ["naive"]
    assert found.config("b", "naive", 7)["trigger_size"] == 3


# The table ---------------------------------------------------------------------------------------


def test_missing_and_failed_outcomes_are_counted() -> None:
    done = Outcome(
        family="input scores", status="done", budget="paper", metrics={"auroc": summarise([0.95])}
    )
    failed = Outcome(family="input scores", status="error", reason="no", budget="paper")
    where = {"setting": "s", "attack": "a", "network": "n"}
    row = defense_row(where, "x", {0: done, 2: failed}, {}, 3, {})
    assert row.cells == {"missing": 1, "done": 1, "error": 1} and row.seeds == [0]
    assert row.reason == "no" and row.holds is True


def test_a_quick_budget_or_few_sets_give_no_verdict() -> None:
    def holds(count: int, budget: Any, **metrics: Any) -> bool | None:
        given = {name: summarise(values) for name, values in metrics.items()}
        one = Outcome(family="set scores", status="done", budget=budget, metrics=given)
        where = {"setting": "s", "attack": "a", "network": "n"}
        return defense_row(where, "x", dict.fromkeys(range(count), one), {}, count, {}).holds

    sets = {"set_statistic": [2.0], "control_set_statistic": [1.0]}
    assert [holds(count, "paper", **sets) for count in (9, 10)] == [None, True]
    assert holds(10, "quick", **sets) is None
    models = {"model_statistic": [2.0, 3.0], "control_model_statistic": [1.0, 1.0]}
    assert holds(5, "paper", **models) is None  # it raises no alarm
    models["alarm"] = [1.0, 1.0]
    assert [holds(count, "tuned", **models) for count in (4, 5)] == [None, True]


def test_a_cell_of_the_heat_map_rates_a_defense() -> None:
    def cell(**metrics: float) -> tuple[float | None, str]:
        given = {name: summarise([value]) for name, value in metrics.items()}
        return heatmap.heat_cell(given, ["not applicable"])

    assert cell(model_auroc=0.8) == (0.8, "0.80\nmodels")
    rates = {"attack_success_rate": 0.1, "clean_test_accuracy": 0.9}
    assert cell(**rates, defense_effectiveness_rating=0.75) == (0.75, "0.75\n0.10 / 0.90")
    assert cell(**rates) == (None, "0.10 / 0.90")  # no defense
    assert cell() == (None, "not applicable")


@pytest.mark.parametrize("key", ["calibration: 1000000000", "seeds: 1000000000", "seeds: 1000"])
def test_runs_are_counted_before_they_are_made(key: str, tmp_path: Path) -> None:
    attacks = ", ".join(f"a{number}: {{attack: naive}}" for number in range(20))
    path = tmp_path / "suite.yaml"
    path.write_text(f"settings: {{d: {{preset: digits-naive}}}}\nattacks: {{{attacks}}}\n{key}\n")
    with pytest.raises(RequestError, match=r"at most 5000 are|less than or equal to 1000"):
        read_suite(path)
