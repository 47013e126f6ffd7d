"""Sets from and to the formats of others: what comes back, what is lost, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image

from distillsec.distill.files.artifact import load_set, quantised, save_set
from distillsec.distill.files.formats.writers import WRITERS
from distillsec.distill.preprocessing import Preprocessing, fit_zca
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError, Step
from distillsec.eval.config.schema import Config, configure
from distillsec.eval.run.convert import convert
from distillsec.eval.run.reading import ReadingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {
    "distillsec": "x.safetensors",
    "dc": "x.pt",
    "mtt": "images_x.pt",
    "npz": "x.npz",
    "png": "pictures",
}


@pytest.fixture
def digits() -> Config:
    return configure(dataset="digits", device="cpu", threads=1)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A file of two unbounded images of each class, with a long recipe."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 8, 8, generator=rng) * 1.4 - 0.2
    space = Preprocessing((0.30522584915161133,), (0.37597206234931946,))  # digits' own
    recipe = Recipe(
        preprocessing=space,
        lr=0.02,
        steps=(Step(rows=(0, 1), rate=0.1),),
        initial=torch.ones(3),
        network={"network": "convnet", "width": 8},
    )
    return save(tmp_path / "ours.safetensors", images, torch.arange(20) % 10, recipe)


def save(path: Path, images: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> Path:
    batch = Batch(images=images, labels=labels)
    save_set(path, DistilledSet(batch=batch, classes=tuple("0123456789"), recipe=recipe))
    return path


def test_every_writer_is_reached_by_a_name() -> None:
    assert NAMES.keys() == WRITERS.keys()


SPACES = {"dc": "normalised", "mtt": "normalised", "npz": "pixels", "png": None, "distillsec": None}


@pytest.mark.parametrize("form", WRITERS)
def test_a_set_comes_back(form: str, ours: Path, tmp_path: Path, digits: Config) -> None:
    there = convert(ours, tmp_path / NAMES[form])
    assert there.form == form and there.read is None and all(map(Path.is_file, there.files))
    back = convert(
        tmp_path / NAMES[form],
        tmp_path / "back.safetensors",
        config=digits,
        reading=ReadingOptions(space=SPACES[form]) if SPACES[form] else None,
    )
    first, second = load_set(ours), load_set(tmp_path / "back.safetensors")
    order = torch.arange(20)
    if form == "png":  # files are in the order of their classes
        first, order = quantised(first), first.batch.labels.argsort(stable=True)
    wanted = first.batch.images[order]
    exact = form in ("distillsec", "npz", "png")
    torch.testing.assert_close(second.batch.images, wanted, atol=0 if exact else 1e-6, rtol=0)
    assert torch.equal(second.batch.labels, first.batch.labels[order])
    assert second.classes == first.classes
    assert (back.read is None) == (form == "distillsec")
    assert second.recipe.lr == pytest.approx(0.02 if form in ("mtt", "distillsec") else 0.01)
    assert (second.recipe == first.recipe) == (form == "distillsec") == (not there.lost)


@pytest.mark.parametrize("form", [form for form in WRITERS if form != "distillsec"])
def test_what_is_lost_is_named(form: str, ours: Path, tmp_path: Path) -> None:
    lost = "\n".join(convert(ours, tmp_path / NAMES[form]).lost)
    for part in ("the preprocessing", "1 learned steps", "weights that", "network", "epochs"):
        assert part in lost
    assert ("names of the classes" in lost) == (form in ("dc", "mtt"))
    assert (" lr," in lost) == (form != "mtt")
    images = load_set(ours).batch.images
    outside = f"{float(((images < 0) | (images > 1)).float().mean()):.0%} were outside [0, 1]"
    assert (outside in lost) == (form == "png")


def test_soft_labels_and_whitening(tmp_path: Path, digits: Config) -> None:
    rng = torch.Generator().manual_seed(0)
    images, soft = torch.rand(10, 1, 8, 8, generator=rng), torch.eye(10) * 0.9 + 0.01
    zca = fit_zca(torch.rand(100, 1, 8, 8, generator=rng))
    recipe = Recipe(preprocessing=Preprocessing((0.0,), (1.0,), zca))
    path = save(tmp_path / "ours.safetensors", images, soft, recipe)
    convert(path, tmp_path / "set.pt")
    ((stored, labels),) = torch.load(tmp_path / "set.pt", weights_only=True)["data"]
    torch.testing.assert_close(stored, zca.whiten(images))
    assert torch.equal(labels, soft)
    done = convert(path, tmp_path / "pictures")
    assert any("soft labels: a file lies in the folder of its most" in each for each in done.lost)
    assert len(done.files) == 10
    convert(path, tmp_path / "x.npz")
    back = convert(
        tmp_path / "x.npz",
        tmp_path / "back.safetensors",
        config=digits,
        reading=ReadingOptions(space="pixels"),
    )
    assert torch.equal(back.distilled.batch.labels, soft)


def test_equal_sets_give_equal_bytes(ours: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for form in ("dc", "mtt", "npz"):
            convert(ours, tmp_path / folder / NAMES[form])
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("out", "form", "fault"),
    [
        ("x.bin", None, "is a name of no known format"),
        ("x.pt", "tar", "unknown format 'tar': there are distillsec, dc"),
        ("no/x.pt", None, "no such folder"),
        ("ours.safetensors", None, "exists already"),
        ("set.pt", "mtt", 'expected "images" in it'),
    ],
)
def test_what_is_refused(
    out: str, form: str | None, fault: str, ours: Path, tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RequestError) as caught:
        convert(ours, tmp_path / out, form=form)
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_no_file_beside_is_overwritten(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "labels_x.pt").write_text("mine")
    with pytest.raises(RequestError, match=r"labels_x\.pt: exists already"):
        convert(ours, tmp_path / "images_x.pt")
    assert not (tmp_path / "images_x.pt").exists()


def test_other_channels_are_no_picture(tmp_path: Path) -> None:
    recipe = Recipe(preprocessing=Preprocessing((0.5,) * 2, (0.5,) * 2))
    path = save(tmp_path / "x.safetensors", torch.rand(10, 2, 4, 4), torch.arange(10), recipe)
    with pytest.raises(RequestError, match="PNG holds 1 or 3 channels, the set has 2"):
        convert(path, tmp_path / "pictures")


# The command -------------------------------------------------------------------------------------


def test_the_command_reports_both_ways(
    cli: Callable[..., Result], finished: Path, tmp_path: Path
) -> None:
    done = cli("convert", finished, tmp_path / "set.pt")
    assert done.exit_code == 0, done.stderr
    assert "dc: a .pt file as DC, DSA and DM write it" in done.stdout
    assert "  lost: the preprocessing" in done.stdout
    words = ("convert", tmp_path / "set.pt", tmp_path / "back.safetensors", "--threads", 1)
    refused = cli(*words)
    assert refused.exit_code == 2 and "--dataset NAME" in refused.stderr
    done = cli(*words, "--dataset", "digits", "--space", "normalised", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert "! read as normalised" in done.stdout and "nothing is lost" in done.stdout
    assert "! no recipe is in the files: the default one is written (300 epochs" in done.stdout
    again = cli(*words, "--dataset", "digits")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_the_report_is_json(cli: Callable[..., Result], finished: Path, tmp_path: Path) -> None:
    cli("convert", finished, tmp_path / "pictures")
    words = ("convert", tmp_path / "pictures", tmp_path / "x.npz", "--dataset", "digits")
    done = cli(*words, "--threads", 1, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["format"], report["images"], report["soft_labels"]) == ("npz", 10, False)
    read = report["read"]
    assert (read["format"], read["space"], read["factor"]) == ("image folder", "uint8", 1)
    assert report["files"] == [str(tmp_path / "x.npz")] and report["lost"]
    with Image.open(tmp_path / "pictures" / "0_0" / "000.png") as picture:
        assert picture.size == (8, 8)


def test_a_damaged_file_writes_nothing(
    cli: Callable[..., Result], finished: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((finished / "distilled.safetensors").read_bytes()[:-9])
    done = cli("convert", bad, tmp_path / "x.pt")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and str(bad) in done.stderr
    assert not (tmp_path / "x.pt").exists()
    done = cli("convert", finished, tmp_path / "x.pt", "--space", "zca")
    assert done.exit_code == 2 and "which says how it is read" in done.stderr
