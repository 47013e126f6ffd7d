"""An audit from the file to the verdict, with small victims and a short search."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image

from distillsec.distill.data.registry import load_dataset
from distillsec.distill.files.artifact import save_set
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError
from distillsec.eval.audit import examine
from distillsec.eval.audit.audit import AuditOptions, audit, calibrate
from distillsec.eval.audit.calibration import read_calibration
from distillsec.eval.audit.record import AuditRecord
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.run.progress import Reporter
from distillsec.eval.run.setup import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Result]
QUIET = Reporter(quiet=True)
OPTIONS = AuditOptions(clean=80)
MACHINE = ("--device", "cpu", "--threads", "1", "--quiet", "--dataset", "digits")


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examine, "STEPS", 3)
        yield


@pytest.fixture(scope="module")
def digits() -> Config:
    return configure(dataset="digits", device="cpu", threads=1)


def clean_set(folder: Path, first: int) -> Path:
    """Five training digits of each class as a set of narrow networks that train for 15 epochs."""
    data = load_dataset("digits")
    rows = torch.cat(
        [torch.nonzero(data.train.labels == k)[first : first + 5, 0] for k in range(10)]
    )
    recipe = Recipe(
        preprocessing=data.preprocessing,
        epochs=15,
        batch_size=32,
        network={"network": "convnet", "width": 8, "depth": 2},
    )
    batch = Batch(images=data.train.images[rows], labels=data.train.labels[rows])
    path = folder / f"clean-{first}.safetensors"
    save_set(path, DistilledSet(batch=batch, classes=data.classes, recipe=recipe))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits: Config) -> tuple[list[Path], Path]:
    """Four clean sets, and the calibration of the first three."""
    folder = tmp_path_factory.mktemp("audit")
    sets = [clean_set(folder, 5 * number) for number in range(4)]
    out = folder / "mine.json"
    calibrate(sets[:3], lambda _: digits, out, options=OPTIONS, reporter=QUIET)
    return sets, out


def with_spread(path: Path, by: float) -> Path:
    """A calibration whose three sets have the evidence −by, by and by in every class."""
    found = read_calibration(path)
    sets = [
        each.model_copy(
            update={"evidence": {kind: [by if number else -by] * 10 for kind in each.evidence}}
        )
        for number, each in enumerate(found.sets)
    ]
    other = path.with_name("other.json")
    found.model_copy(update={"sets": sets}).write(other)
    return other


def test_a_calibration_is_continued(
    made: tuple[list[Path], Path],
    digits: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets, made_file = made
    first, out = read_calibration(made_file), tmp_path / "mine.json"
    first.write(out)
    assert [each.name for each in first.sets] == [path.name for path in sets[:3]]
    assert {"inversion", "rows", "weights"} == first.sets[0].evidence.keys()
    grown = calibrate(sets, lambda _: digits, out, options=OPTIONS, reporter=QUIET)
    assert grown.sets[:3] == first.sets and len(grown.sets) == 4
    assert grown.smallest_rate == 1 / 5

    def refuse(*_: Any) -> None:
        raise AssertionError("a set was examined again")

    monkeypatch.setattr("distillsec.eval.audit.audit.examine", refuse)
    again = calibrate(sets, lambda _: digits, out, options=OPTIONS, reporter=QUIET)
    assert again == grown
    with pytest.raises(RequestError, match="which is for clean 80, not 0"):
        calibrate(sets, lambda _: digits, out, options=AuditOptions(clean=0), reporter=QUIET)


@pytest.mark.parametrize(
    ("spread", "verdict", "code"), [(1e-4, "backdoored", 3), (1e4, "no evidence", 0)]
)
def test_the_verdict_is_the_exit_code(
    made: tuple[list[Path], Path],
    tmp_path: Path,
    cli: Cli,
    spread: float,
    verdict: str,
    code: int,
) -> None:
    sets, mine = made
    chosen = ("--calibration", str(with_spread(mine, spread)), "--false-alarms", "0.25")
    words = ("audit", str(sets[3]), *MACHINE, "--holdout", "80", *chosen)
    done = cli(*words, "--out", str(tmp_path / "a"))
    assert done.exit_code == code, done.stderr
    assert done.stdout.startswith(f"{sets[3]}: {verdict.upper()}")
    record = AuditRecord.model_validate_json((tmp_path / "a" / "audit.json").read_text())
    assert record.verdict == verdict and record.clean_sets == 3
    assert record.suspect is not None and len(record.classes) == 10
    assert record.accuracy is not None and record.accuracy > 0.3
    with Image.open(tmp_path / "a" / "audit.png") as picture:
        assert picture.width > 700
    again = cli(*words, "--out", str(tmp_path / "a"))
    assert again.exit_code == 2 and "not empty" in again.stderr
    as_json = cli(*words, "--json", "--out", str(tmp_path / "b"))
    found = json.loads(as_json.stdout)
    same = record.model_dump(mode="json")
    for key in ("verdict", "score", "classes", "parts", "as_high"):
        assert found[key] == same[key]


def test_without_a_fitting_calibration_nothing_is_said(
    made: tuple[list[Path], Path], tmp_path: Path, cli: Cli
) -> None:
    sets, _ = made
    done = cli("audit", str(sets[0]), *MACHINE, "--holdout", "7", "--out", str(tmp_path / "a"))
    assert done.exit_code == 0, done.stderr
    assert "CANNOT SAY" in done.stdout
    assert "the nearest calibration is for" in done.stdout and "not 7" in done.stdout
    assert "--calibrate FILE" in done.stdout


def test_without_clean_images_the_set_itself_carries_the_patches(
    made: tuple[list[Path], Path], tmp_path: Path, digits: Config
) -> None:
    options = AuditOptions(clean=0)
    record = audit(made[0][0], digits, tmp_path / "a", options=options, reporter=QUIET)
    assert record.accuracy is None
    assert record.classes[0].evidence.keys() == {"inversion", "weights"}


def test_refusals(made: tuple[list[Path], Path], tmp_path: Path, digits: Config) -> None:
    source = made[0][0]
    with pytest.raises(RequestError, match=r"has \d+ test images"):
        audit(source, digits, tmp_path / "a", options=AuditOptions(clean=10**6), reporter=QUIET)
    with pytest.raises(RequestError, match="--holdout 1 are images of one class"):
        audit(source, digits, tmp_path / "a", options=AuditOptions(clean=1), reporter=QUIET)
    with pytest.raises(RequestError, match="more than --budget"):
        audit(source, digits, tmp_path / "a", options=AuditOptions(budget=1e-6), reporter=QUIET)
    assert not (tmp_path / "a").exists()


def test_one_set_at_a_time(made: tuple[list[Path], Path], cli: Cli) -> None:
    done = cli("audit", *map(str, made[0]), *MACHINE)
    assert done.exit_code == 2 and "one SET is audited at a time" in done.stderr


@pytest.mark.parametrize(("width", "wanted"), [(None, 32), (128, 32), (8, 8)])
def test_victims_are_at_most_32_wide(width: int | None, wanted: int) -> None:
    setup = prepare(configure(dataset="digits", device="cpu", threads=1, depth=2, width=width))
    empty = Batch(images=torch.zeros(0, 1, 8, 8), labels=torch.zeros(0, dtype=torch.int64))
    distilled = DistilledSet(batch=empty, classes=setup.data.classes, recipe=setup.recipe)
    audited = examine.AuditedSet(distilled=distilled, setup=setup, clean=empty)
    assert audited.network.spec.width == wanted
    assert audited.other_network.spec.network == "mlp"
