"""Every published form of a set: in which space it is, found out, and what a wrong one costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from distillsec.distill.preprocessing import Preprocessing, digest
from distillsec.distill.types import Batch, RequestError
from distillsec.eval.config.schema import configure
from distillsec.eval.results.record import read_record
from distillsec.eval.run import small_victims
from distillsec.eval.run.reading import ReadingOptions, read_set
from distillsec.eval.run.setup import Setup, prepare
from distillsec.eval.run.small_victims import SmallVictims

pytestmark = pytest.mark.usefixtures("one_thread", "shorter")
PER_CLASS = 5
LOGITS = 9.0


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the training and testing of small victims: enough for digits."""
    monkeypatch.setattr(small_victims, "HELD_OUT", 250)
    monkeypatch.setattr(small_victims, "_MOST_EPOCHS", 40)
    monkeypatch.setattr(small_victims, "_VISITS", 3500)


@contextmanager
def refused(path: Path, fault: str) -> Iterator[None]:
    """Expects a RequestError of one line that names the file and the fault."""
    with pytest.raises(RequestError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and fault in text


@pytest.fixture(scope="module")
def setup() -> Setup:
    torch.set_num_threads(1)
    return prepare(configure(dataset="digits", device="cpu", threads=1))


@pytest.fixture(scope="module")
def chosen(setup: Setup) -> Batch:
    """A small set: real images that stay clear of those that test it, sharpened beyond [0, 1]."""
    train = setup.data.train
    rows = [torch.nonzero(train.labels == label)[-PER_CLASS:, 0] for label in range(10)]
    batch = train.rows(torch.cat(rows))
    return Batch(images=1.2 * batch.images - 0.1, labels=batch.labels)


@pytest.fixture(scope="module")
def whitening(setup: Setup) -> Preprocessing:
    return setup.data.whitened().preprocessing


def to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def packed(batch: Batch, setup: Setup) -> Tensor:
    """Four real images of one class in each, reduced, as IDC starts from."""
    train, rng = setup.data.train, torch.Generator().manual_seed(0)
    images = []
    for label in batch.labels.tolist():
        rows = torch.nonzero(train.labels == label)[:, 0]
        rows = rows[torch.randperm(len(rows), generator=rng)[:4]]
        small = interpolate(train.images[rows], size=(4, 4), mode="area")
        images.append(torch.cat([torch.cat([*pair], dim=-1) for pair in small.split(2)], dim=-2))
    return torch.stack(images)


# The published forms -----------------------------------------------------------------------------

Write = Callable[[Path, Batch, Setup, Preprocessing], Path]


def dc(path: Path, batch: Batch, setup: Setup, _: Preprocessing) -> Path:
    pairs = [[setup.data.preprocessing.normalise(batch.images), batch.labels] for _ in range(2)]
    torch.save({"data": pairs, "accs_all_exps": {"ConvNet": [np.float64(0.5)]}}, path / "res.pt")
    return path / "res.pt"


def datadam(path: Path, batch: Batch, _: Setup, whitening: Preprocessing) -> Path:
    torch.save({"data": [whitening.normalise(batch.images), batch.labels]}, path / "syn.pt")
    return path / "syn.pt"


def mtt(path: Path, batch: Batch, setup: Setup, _: Preprocessing) -> Path:
    torch.save(setup.data.preprocessing.normalise(batch.images), path / "images_best.pt")
    torch.save(batch.labels, path / "labels_best.pt")
    return path / "images_best.pt"


def datm(path: Path, batch: Batch, _: Setup, whitening: Preprocessing) -> Path:
    torch.save(whitening.normalise(batch.images), path / "images_best.pt")
    logits = LOGITS * torch.nn.functional.one_hot(batch.labels, 10).float() - 1
    torch.save(logits, path / "labels_best.pt")
    torch.save(torch.tensor(0.02), path / "lr_best.pt")
    return path / "images_best.pt"


def dd_ranking(path: Path, batch: Batch, setup: Setup, whitening: Preprocessing) -> Path:
    datm(path, batch, setup, whitening)
    for word in ("images", "labels", "lr"):
        (path / f"{word}_best.pt").rename(path / f"{word}.pt")
    return path


def idc(path: Path, batch: Batch, setup: Setup, _: Preprocessing) -> Path:
    noise = 0.02 * torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    torch.save([packed(batch, setup) + noise, batch.labels], path / "data.pt")
    return path / "data.pt"


def idc_shared(path: Path, batch: Batch, setup: Setup, _: Preprocessing) -> Path:
    torch.save([to_bytes(packed(batch, setup)), batch.labels], path / "cifar10_ipc10.pt")
    return path / "cifar10_ipc10.pt"


def ncfm(path: Path, batch: Batch, setup: Setup, _: Preprocessing) -> Path:
    torch.save([packed(batch, setup), batch.labels], path / "data_20000.pt")
    return path / "data_20000.pt"


def image_folder(path: Path, batch: Batch, *_: Any) -> Path:
    for number, (image, label) in enumerate(zip(to_bytes(batch.images), batch.labels, strict=True)):
        folder = path / f"new{int(label):03d}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"class{int(label):03d}_id{number:03d}.png")
    return path


def npz(path: Path, batch: Batch, *_: Any) -> Path:
    np.savez(path / "x.npz", images=batch.images.numpy(), labels=batch.labels.numpy())
    return path / "x.npz"


def symmetric(path: Path, batch: Batch, *_: Any) -> Path:
    images = batch.images.clamp(0, 1) * 2 - 1
    save_file({"images": images, "labels": batch.labels}, path / "x.safetensors")
    return path / "x.safetensors"


# The function that writes it, its format, its space and its factor.
PUBLISHED: dict[str, tuple[Write, str, str, int]] = {
    "DC, DSA, DM, IDM": (dc, "torch file", "normalised", 1),
    "DataDAM": (datadam, "torch file", "zca", 1),
    "MTT": (mtt, "torch file", "normalised", 1),
    "DATM": (datm, "torch file", "zca", 1),
    "DD-Ranking": (dd_ranking, "tensor folder", "zca", 1),
    "IDC": (idc, "torch file", "pixels", 2),
    "IDC, shared": (idc_shared, "torch file", "uint8", 2),
    "NCFM": (ncfm, "torch file", "pixels", 2),
    "SRe2L, RDED": (image_folder, "image folder", "uint8", 1),
    "npz, unbounded pixels": (npz, "npz", "pixels", 1),
    "safetensors in [-1, 1]": (symmetric, "safetensors", "symmetric", 1),
}


@pytest.mark.parametrize(("write", "form", "space", "factor"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_space_is_found_out(
    write: Write,
    form: str,
    space: str,
    factor: int,
    tmp_path: Path,
    setup: Setup,
    chosen: Batch,
    whitening: Preprocessing,
) -> None:
    path = write(tmp_path, chosen, setup, whitening)
    found = read_set(path, setup, ReadingOptions())
    assert (found.form, found.space, found.factor) == (form, space, factor)
    assert any(note.startswith(f"read as {space} (") for note in found.notes)
    assert len(found.distilled.batch) == factor**2 * len(chosen)
    assert (found.distilled.recipe.preprocessing.zca is not None) == (space == "zca")
    # Test images, which the choice has not seen: what the other readings cost.
    found_cta = cta(path, setup, space, factor)
    others = {name: cta(path, setup, name, factor) for name in WRONG if name != space}
    if factor > 1:
        others["as stored"] = cta(path, setup, space, 1)
    print(f"{path.name}: {space} {found_cta:.3f}, {others}")
    assert all(found_cta > other + 0.05 for other in others.values()), others


WRONG = ("pixels", "normalised", "zca")
_KNOWN: dict[str, float] = {}


def cta(path: Path, setup: Setup, space: str, factor: int) -> float:
    """The accuracy of small victims if ``path`` is read in ``space``; 0 where that is refused."""
    try:
        read = read_set(path, setup, ReadingOptions(space=space, factor=factor))
    except RequestError as error:
        assert "another --space?" in str(error)
        return 0.0
    batch, recipe = read.distilled.batch, read.distilled.recipe
    key = f"{digest(batch.images, batch.labels)} {recipe.preprocessing.zca is None}"
    if key not in _KNOWN:  # several forms hold the same set
        test = SmallVictims(setup=setup, clean=setup.data.test.rows(torch.arange(0, 500, 2)))
        _KNOWN[key] = test.accuracy(batch, recipe.preprocessing)
    return _KNOWN[key]


# What a user says --------------------------------------------------------------------------------


def test_what_is_given_is_not_tried(
    tmp_path: Path, setup: Setup, chosen: Batch, whitening: Preprocessing
) -> None:
    path = dc(tmp_path, chosen, setup, whitening)
    options = ReadingOptions(space="zca", factor=2)
    found = read_set(path, setup, options)
    assert (found.space, found.factor, found.accuracies) == ("zca", 2, {})
    assert "read as zca (pixels whitened as the data is), as given" in found.notes
    assert "each image packs 4: cut and enlarged, they are 200 images, as given" in found.notes
    with refused(path, "unknown space 'fourier': there are auto, pixels, uint8"):
        read_set(path, setup, ReadingOptions(space="fourier"))
    whitened = dataclasses.replace(setup, data=setup.data.whitened())  # as with --zca
    assert read_set(path, whitened, ReadingOptions()).space == "zca"


def test_without_clean_images_the_values_decide(
    tmp_path: Path, setup: Setup, chosen: Batch, whitening: Preprocessing
) -> None:
    none = setup.data.train.rows(torch.zeros(0, dtype=torch.int64))
    for write, space in ((dc, "normalised"), (datadam, "zca"), (npz, "pixels")):
        found = read_set(write(tmp_path, chosen, setup, whitening), setup, ReadingOptions(), none)
        assert (found.space, found.accuracies) == (space, {})
        assert any("deviations from the data's" in note for note in found.notes)


def test_soft_labels_and_the_rate_reach_the_set(
    tmp_path: Path, setup: Setup, chosen: Batch, whitening: Preprocessing
) -> None:
    path = datm(tmp_path, chosen, setup, whitening)
    found = read_set(path, setup, ReadingOptions(space="zca", factor=1))
    assert found.distilled.recipe.lr == pytest.approx(0.02)
    logits = torch.load(tmp_path / "labels_best.pt", weights_only=True)
    assert torch.equal(found.distilled.batch.labels, logits.softmax(dim=1))
    torch.testing.assert_close(found.distilled.batch.images, chosen.images, atol=1e-4, rtol=0)


def test_classes_are_matched_by_name(
    tmp_path: Path, setup: Setup, chosen: Batch, whitening: Preprocessing
) -> None:
    names = np.array([*"9876543210"])
    images = to_bytes(chosen.images).numpy()
    np.savez(tmp_path / "x.npz", images=images, labels=9 - chosen.labels.numpy(), classes=names)
    found = read_set(tmp_path / "x.npz", setup, ReadingOptions())
    assert torch.equal(found.distilled.batch.labels, chosen.labels)
    soft = np.eye(10, dtype=np.float32)[9 - chosen.labels.numpy()]
    np.savez(tmp_path / "x.npz", images=images, labels=soft, classes=names)
    soft_set = read_set(tmp_path / "x.npz", setup, ReadingOptions())
    assert torch.equal(soft_set.distilled.batch.labels.argmax(dim=1), chosen.labels)
    assert found.distilled.classes == setup.data.classes


def test_folders_are_classes_by_name_or_by_number(
    tmp_path: Path, setup: Setup, chosen: Batch
) -> None:
    image_folder(tmp_path, chosen.rows(torch.isin(chosen.labels, torch.tensor([2, 7]))))
    found = read_set(tmp_path, setup, ReadingOptions())
    assert found.distilled.batch.labels.unique().tolist() == [2, 7]
    (tmp_path / "new007").rename(tmp_path / "new012")
    with refused(tmp_path, "labels run from 2 to 12, expected 0 to 9"):
        read_set(tmp_path, setup, ReadingOptions())
    (tmp_path / "new012").rename(tmp_path / "cat")
    with refused(tmp_path, "2 classes don't fit digits: 10 classes"):
        read_set(tmp_path, setup, ReadingOptions())


@pytest.mark.parametrize(
    ("images", "labels", "fault"),
    [
        (torch.rand(4, 1, 9, 9), torch.arange(4), "don't fit digits"),
        (torch.rand(4, 1, 8, 8), torch.arange(4) + 7, "labels run from 7 to 10"),
        (torch.rand(4, 1, 8, 8), torch.eye(4), "soft labels have 4 classes"),
        (torch.rand(4, 1, 8, 8) * 1e9 - 1, torch.arange(4), "its values fit no known space"),
    ],
)
def test_other_sets_are_refused(
    tmp_path: Path, setup: Setup, images: Tensor, labels: Tensor, fault: str
) -> None:
    torch.save([images, labels], tmp_path / "x.pt")
    with refused(tmp_path / "x.pt", fault):
        read_set(tmp_path / "x.pt", setup, ReadingOptions())


# Commands ----------------------------------------------------------------------------------------


def test_victims_see_what_the_set_was_made_for(
    cli: Callable[..., Result],
    tmp_path: Path,
    setup: Setup,
    chosen: Batch,
    whitening: Preprocessing,
) -> None:
    """A whitened set is evaluated with whitening networks, soft labels and the learned rate."""
    path = datm(tmp_path, chosen, setup, whitening)
    words = ["evaluate", path, "--dataset", "digits", "--threads", 1, "--victims", 1, "--quiet"]
    words += ["--victim-epochs", 60, "--set", "width=16", "--set", "depth=2"]
    found: dict[str, float] = {}
    for name, more in (("auto", ()), ("zca", ("--zca",)), ("wrong", ("--space", "normalised"))):
        done = cli(*words, *more, "--out", tmp_path / name)
        assert done.exit_code == 0, done.stderr
        record = read_record(tmp_path / name / "record.json")
        found[name] = record.mean("clean_test_accuracy") or 0.0
        assert ("! read as" in done.stdout) and record.recipe["lr"] == pytest.approx(0.02)
        assert (record.recipe["zca"] is None) == (name == "wrong")
    assert found["auto"] == found["zca"] and found["auto"] > found["wrong"]


def test_a_folder_is_defended_and_a_file_of_ours_has_its_space(
    cli: Callable[..., Result], finished: Path, tmp_path: Path, chosen: Batch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image_folder(folder, chosen)
    words = ["--dataset", "digits", "--threads", 1, "--victims", 1, "--quiet"]
    words += ["--victim-epochs", 1, "--set", "width=4", "--set", "depth=1"]
    done = cli("defend", folder, *words, "--defense", "scan", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "read as uint8" in done.stdout
    (folder / "new000").rename(folder / "other")
    mixed = cli("evaluate", folder, *words, "--out", tmp_path / "other")
    assert mixed.exit_code == 0 and "matched by number" not in mixed.stderr
    own = finished / "distilled.safetensors"
    done = cli("evaluate", own, *words, "--space", "zca", "--out", tmp_path / "own")
    assert done.exit_code == 2 and "is a file of this suite" in done.stderr
