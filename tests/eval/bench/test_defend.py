"""``distillsec defend``, from the command line and from Python: runs, files, resume, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from distillsec.defenses import DEFENSES
from distillsec.distill.files.safe import read_json
from distillsec.eval.bench.defend import defend
from distillsec.eval.config.catalogue import CATALOGUES
from distillsec.eval.config.schema import configure
from distillsec.eval.results.record import Outcome, Record, read_record
from distillsec.eval.run.progress import Reporter

Cli = Callable[..., Result]

# Defenses of a user: one that works, and one that fails until a file exists.
OWN = '''
from pathlib import Path
import torch
from distillsec.defenses.base import DefenseOptions, InputScorer, Purifier
from distillsec.distill.training import predict

class Options(DefenseOptions):
    level: float = 1.0

class Dim(Purifier):
    """Makes inputs darker."""
    name, Options, quick = "dim", Options, {"level": 0.5}
    def __init__(self, options):
        self.options = options
    def purify(self, view):
        return lambda images: predict(view.victim, images * self.options.level)

class Failing(InputScorer):
    """Fails where the file ``good`` is missing."""
    name, Options = "failing", Options
    def __init__(self, options):
        self.options = options
    def caution(self, view):
        return "it may fail"
    def score_inputs(self, view, images):
        if not Path("good").exists():
            raise ValueError("no such file")
        return images.mean(dim=(1, 2, 3))
    def threshold(self, view):
        return None
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    import sys

    (tmp_path / "own_defenses_of_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "own_defenses_of_test:Dim", "own_defenses_of_test:Failing"
    sys.modules.pop("own_defenses_of_test", None)


def test_a_run_is_defended(finished: Path, own: tuple[str, str], cli: Cli, tmp_path: Path) -> None:
    dim, failing = own
    (tmp_path / "good").touch()
    words = ("--defense", dim, "--defense", failing, "--holdout", 50, "--images", 80)
    done = cli("defend", finished, *words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    for part in (
        "no defense: CTA",
        "purified input",
        "input scores",
        "it may fail",
        "defenses.png",
    ):
        assert part in done.stdout
    record = read_record(tmp_path / "out" / "record.json")
    assert (record.kind, record.status) == ("defend", "done")
    assert record.bench == {"budget": "quick", "holdout": 50, "images": 80}
    assert list(record.defenses) == [dim, failing]
    assert record.defenses[dim].options == {"level": 0.5}  # the quick budget's
    assert record.defenses[failing].caution == "it may fail"
    assert record.config["victims"] == 2
    for metrics in (record.metrics, record.defenses[dim].metrics):
        assert {"attack_success_rate", "control_attack_success_rate"} <= metrics.keys()
    assert (tmp_path / "out" / "defenses.png").read_bytes()[:4] == b"\x89PNG"
    assert record.model_dump(mode="json") == read_json(tmp_path / "out" / "record.json")


def test_a_failed_defense_is_recorded_and_run_again(
    finished: Path, own: tuple[str, str], cli: Cli, tmp_path: Path
) -> None:
    dim, failing = own
    words = ["defend", finished, "--defense", failing, "--defense", dim, "--out", tmp_path / "out"]
    done = cli(*words, "--budget", "paper", "--victims", 1)
    assert done.exit_code == 1 and f"{failing} failed: see the table" in done.stderr
    assert "error: ValueError('no such file')" in done.stdout
    first = read_record(tmp_path / "out" / "record.json")
    assert first.status == "done" and first.defenses[dim].options == {"level": 1.0}
    (tmp_path / "good").touch()
    again = cli(*words, "--budget", "paper", "--victims", 1, "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    record = Record.model_validate(json.loads(again.stdout))
    assert record.defenses[failing].status == "done"
    assert record.defenses[dim] == first.defenses[dim]  # its seconds too: it did not run again
    assert record.metrics == first.metrics
    changed = cli(
        *words, "--option", f"{dim}.level=0.25", "--budget", "paper", "--victims", 1, "--resume"
    )
    assert changed.exit_code == 0, changed.stderr
    record = read_record(tmp_path / "out" / "record.json")
    assert record.defenses[dim].options == {"level": 0.25}


def test_a_received_file(finished: Path, own: tuple[str, str], cli: Cli, tmp_path: Path) -> None:
    dim, failing = own
    received = tmp_path / "received.safetensors"
    shutil.copy(finished / "distilled.safetensors", received)
    network = ["--set", "width=4", "--set", "depth=1", "--dataset", "digits", "--threads", 1]
    words = ["defend", received, *network, "--defense", dim, "--defense", failing, "--quiet"]
    done = cli(*words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    outcomes = read_record(tmp_path / "out" / "record.json").defenses
    assert outcomes[failing].status == "not applicable"
    assert outcomes[dim].metrics.keys() == {"clean_test_accuracy"}
    trigger = ("--trigger", finished / "trigger.safetensors")
    (tmp_path / "good").touch()
    done = cli(*words, *trigger, "--out", tmp_path / "other")
    assert done.exit_code == 0, done.stderr
    outcomes = read_record(tmp_path / "other" / "record.json").defenses
    assert "attack_success_rate" in outcomes[dim].metrics and outcomes[failing].status == "done"
    assert not any(name.startswith("control_") for name in outcomes[dim].metrics)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--defense", "stripp"], "unknown defense 'stripp'"),
        (["--option", "strip"], "--option needs NAME.KEY=VALUE, got 'strip'"),
        (["--option", "nope.copies=1"], "options for nope, which was not chosen"),
        (["--holdout", 500], "holdout 500: there are 500 test images"),
        (["--holdout", -1], "-1 is not in the range"),
        (["--budget", "huge"], "'huge' is not one of 'quick', 'paper'"),
        (["--defense", "nowhere:Nothing"], "no module nowhere"),
        (["--resume"], "--resume needs the run's folder"),
    ],
)
def test_a_wrong_request_is_one_line(
    finished: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("defend", finished, *words, "--quiet")
    assert done.exit_code == 2 and text in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_another_request_does_not_resume(
    finished: Path, own: tuple[str, str], cli: Cli, tmp_path: Path
) -> None:
    words = ["defend", finished, "--defense", own[0], "--out", tmp_path / "out", "--quiet"]
    assert cli(*words).exit_code == 0
    kept = (tmp_path / "out" / "record.json").read_bytes()
    assert "not empty" in cli(*words).stderr
    other = cli(*words, "--holdout", 20, "--resume")
    assert other.exit_code == 2 and "run on another set, trigger or recipe" in other.stderr
    assert (tmp_path / "out" / "record.json").read_bytes() == kept


def test_a_run_of_defend_is_no_set(
    finished: Path, cli: Cli, own: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("defend", finished, "--defense", own[0], "--out", out, "--quiet").exit_code == 0
    again = cli("defend", out, "--defense", own[0], "--quiet")
    assert again.exit_code == 2 and "is itself" in again.stderr


def test_from_python(finished: Path, tmp_path: Path) -> None:
    config = configure(**read_record(finished / "record.json").config)
    record = defend(finished, config, tmp_path / "out", defenses={}, reporter=Reporter(quiet=True))
    assert record.defenses == {} and record.metrics["clean_test_accuracy"].mean is not None


@pytest.mark.parametrize("name", DEFENSES)
def test_the_catalogue_gives_family_needs_and_description(name: str) -> None:
    row = CATALOGUES["defenses"]()[name]
    assert row["family"] and row["needs"] and row["description"]
    outcome = Outcome(family=row["family"], status="done", budget="paper")
    assert outcome.metrics == {}


def test_the_catalogue_marks_what_was_tried_on_doorping_before() -> None:
    rows = CATALOGUES["defenses"]()
    assert sum(bool(row["tried"]) for row in rows.values()) == 7
    assert rows["strip"]["tried"] and rows["neural-cleanse"]["tried"] and not rows["nad"]["tried"]
