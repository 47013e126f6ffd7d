"""``folder:PATH``: image files in their modes, sizes and faults, and the cache of pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from distillsec.distill.data import images as data_images
from distillsec.distill.data import raw as data_raw
from distillsec.distill.data.registry import ImageSet, load_dataset
from distillsec.distill.notices import warn

Bytes = NDArray[np.uint8]
Refusal = Callable[..., str]
CheckPixels = Callable[..., None]
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("offline")


def noise(*shape: int) -> Bytes:
    """Random images: no two pixels' places can be exchanged unseen."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def plain(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tree(top: Path, rows: int, mode: str = "RGB", size: int = 6) -> Bytes:
    """``rows`` images in each of the classes ant and bee; the images, NCHW, class by class."""
    images = (
        noise(2 * rows, size, size + 2, 3) if mode == "RGB" else noise(2 * rows, size, size + 2)
    )
    for number, image in enumerate(images):
        path = top / ("ant", "bee")[number // rows] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images.transpose(0, 3, 1, 2) if mode == "RGB" else images[:, None]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder_with_a_split(check_pixels: CheckPixels, mode: str, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    train, test = tree(top / "train", 3, mode), tree(top / "test", 1, mode)
    plain(top / "train" / "ant" / "Thumbs.db", b"no image")
    plain(top / "train" / ".hidden" / "x.png", b"no image")
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    check_pixels(data, train, test, [0, 0, 0, 1, 1, 1], [0, 1])
    assert data.classes == ("ant", "bee")
    assert data.mean == pytest.approx((train / 255).mean(axis=(0, 2, 3)), abs=1e-6)
    assert data.std == pytest.approx((train / 255).std(axis=(0, 2, 3)), abs=1e-6)


def test_a_relative_folder_is_looked_for_here_and_among_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "data" / "mine" / "train", 3)
    tree(tmp_path / "data" / "mine" / "test", 1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert len(load_dataset("folder:mine", data_dir=tmp_path / "data").train) == 6
    tree(tmp_path / "here" / "mine" / "train", 2)
    tree(tmp_path / "here" / "mine" / "test", 1)
    assert len(load_dataset("folder:mine", data_dir=tmp_path / "data").train) == 4


def test_folder_without_a_split(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    pool = tree(top, 10)
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    assert [torch.bincount(b.labels).tolist() for b in (data.train, data.test)] == [[8, 8], [2, 2]]
    known = {(image / np.float32(255)).tobytes(): row // 10 for row, image in enumerate(pool)}
    seen = set()
    for batch in (data.train, data.test):
        for image, label in zip(batch.images.numpy(), batch.labels, strict=True):
            assert known[image.tobytes()] == label
            seen.add(image.tobytes())
    assert len(seen) == 20
    again = load_dataset(f"folder:{top}", data_dir=tmp_path / "elsewhere")
    assert torch.equal(again.test.images, data.test.images)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    (top / "bee").rename(top / "train")
    assert load_dataset(f"folder:{top}", data_dir=tmp_path / "d").classes == ("ant", "train")


def test_modes_of_images(tmp_path: Path) -> None:
    """Grey among colour becomes three equal channels; palettes and alpha become RGB."""
    top = tmp_path / "tree"
    tree(top / "test", 1)
    grey, colour = noise(6, 8), noise(6, 8, 3)
    clear = Image.fromarray(colour).convert("RGBA")
    palette = Image.fromarray(grey).convert("RGB").quantize(256)
    folder = top / "train" / "ant"
    (top / "train" / "bee").mkdir(parents=True)
    folder.mkdir(parents=True)
    Image.fromarray(grey).save(folder / "0.png")
    Image.fromarray(grey > 127).save(folder / "1.png")
    Image.fromarray(colour).save(top / "train" / "bee" / "2.png")
    clear.save(top / "train" / "bee" / "3.png")
    palette.save(top / "train" / "bee" / "4.png", transparency=bytes(range(256)))
    images = load_dataset(f"folder:{top}", data_dir=tmp_path).train.images * 255
    for row, wanted in enumerate((grey, (grey > 127) * 255, colour, colour)):
        planes = wanted.transpose(2, 0, 1) if wanted.ndim == 3 else np.stack([wanted] * 3)
        assert np.array_equal(images[row].round().numpy(), planes)
    assert np.array_equal(
        images[4].round().numpy(), np.array(palette.convert("RGB")).transpose(2, 0, 1)
    )


def test_mixed_sizes_need_image_size(refusal: Refusal, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top / "train", 2, size=6)
    tree(top / "test", 1, size=9)
    name = f"folder:{top}"
    refusal(name, tmp_path / "d", "9x11", "6x8", "image_size", top / "test" / "ant" / "000.png")
    assert load_dataset(name, data_dir=tmp_path / "d", image_size=5).image_shape == (3, 5, 5)


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, home = tmp_path / "tree", tmp_path / "data"
    tree(top / "train", 2)
    tree(top / "test", 1)
    decoded: list[str] = []
    decode = data_images._decode

    def counted(file: str, size: int | None) -> Any:
        decoded.append(file)
        return decode(file, size)

    monkeypatch.setattr(data_images, "_decode", counted)

    def load(**options: Any) -> tuple[int, ImageSet]:
        decoded.clear()
        data = load_dataset(f"folder:{top}", data_dir=home, **options)
        return len(decoded), data

    before = sorted(top.rglob("*"))
    (count, first), (cached, second) = load(), load()
    assert (count, cached) == (6, 0)
    assert torch.equal(first.train.images, second.train.images)
    assert sorted(top.rglob("*")) == before  # nothing in the user's folder
    (stored,) = (home / ".cache").iterdir()
    assert stored.suffix == ".npz"
    stored.write_bytes(stored.read_bytes()[:100])
    assert load()[0] == 6  # a broken cache is made anew
    assert load(image_size=4)[0] == 6
    path = top / "train" / "ant" / "000.png"
    Image.new("RGB", (8, 6)).save(path)
    os.utime(path, (1, 1))
    count, changed = load()
    assert count == 6 and changed.train.images[0].max() == 0


def test_no_cache_where_it_cannot_be_written(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    home = plain(tmp_path / "file", b"")
    assert len(load_dataset(f"folder:{top}", data_dir=home).train) == 8


def test_bad_folders(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, home = tmp_path / "tree", tmp_path / "data"
    name = f"folder:{top}"
    refusal(name, home, top, "no such folder")
    top.mkdir()
    refusal(name, home, top, "0 class folders")
    tree(top / "train", 2)
    refusal(name, home, top, "train/ only")
    tree(top / "test", 1)
    (top / "test" / "bee").rename(top / "test" / "cow")
    refusal(name, home, top, "bee, cow")
    (top / "test" / "cow").rename(top / "test" / "bee")
    (top / "train" / "cow").mkdir()
    refusal(name, home, top / "train" / "cow", "without images")
    (top / "train" / "cow").rmdir()
    path = top / "train" / "bee" / "002.png"
    good = path.read_bytes()
    for broken in (good[:60], b"", b"text"):
        path.write_bytes(broken)
        refusal(name, home, path, "not a readable image")
    Image.fromarray(np.zeros((6, 8), dtype=np.uint16)).save(path)
    refusal(name, home, path, "8-bit")
    path.write_bytes(good)
    monkeypatch.setattr(data_raw, "MAX_BYTES", 100)
    refusal(name, home, "GiB")
    assert not (home / ".cache").exists()


def test_a_folder_too_small_to_split(refusal: Refusal, tmp_path: Path) -> None:
    tree(tmp_path / "tree", 1)
    refusal(f"folder:{tmp_path / 'tree'}", tmp_path, tmp_path / "tree", "too few images")


# Layouts and files that are not as expected -------------------------------------------------------


def notes(caplog: pytest.LogCaptureFixture) -> str:
    """What loading warned about."""
    return "\n".join(caplog.messages)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("TRAIN", "test"), ("training", "validation"), ("train", "val")],
)
def test_splits_are_recognised_in_any_capitalisation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, test: str
) -> None:
    top = tmp_path / "tree"
    tree(top / train, 3)
    tree(top / test, 1)
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    assert (data.classes, len(data.train), len(data.test)) == (("ant", "bee"), 6, 2)
    assert (f"{test}/ is the test set" in notes(caplog)) == test.startswith("val")


def test_what_stands_beside_the_splits_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top = tmp_path / "tree"
    for split in ("train", "test", "val"):
        tree(top / split, 1)
    plain(top / "labels.CSV", b"")
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    assert len(data.test) == 2
    assert "left out: 1 × .csv beside the folders, 1 × folder val/" in notes(caplog)


def test_two_folders_of_one_split_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    for split in ("train", "test", "testing"):
        tree(top / split, 1)
    refusal(f"folder:{top}", tmp_path, "test/ and testing/ are both the test split")


def test_class_folders_that_hold_the_same_folders_are_refused(
    refusal: Refusal, tmp_path: Path
) -> None:
    top = tmp_path / "tree"
    for name in ("2019", "2020"):
        tree(top / name, 3)
    refusal(f"folder:{top}", tmp_path, top, "2019, 2020 all hold the same folders (ant, bee)")
    tree(top / "split" / "train" / "2019", 3)
    tree(top / "split" / "train" / "2020", 3)
    tree(top / "split" / "test" / "2019", 3)
    refusal(f"folder:{top / 'split'}", tmp_path, "all hold the same folders")


def test_one_inner_folder_of_the_same_name_is_a_nested_class(tmp_path: Path) -> None:
    """Tiny ImageNet keeps its images in CLASS/images."""
    top = tmp_path / "tree"
    tree(top / "flat", 5)
    for name in ("ant", "bee"):
        (top / "nested" / name).mkdir(parents=True)
        (top / "flat" / name).rename(top / "nested" / name / "images")
    data = load_dataset(f"folder:{top / 'nested'}", data_dir=tmp_path / "data")
    assert (data.classes, len(data.train)) == (("ant", "bee"), 8)


def test_other_files_and_hidden_folders_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    for name in (".git/x.png", "ant/.ipynb_checkpoints/x.png", "ant/deep/.hidden/x.png"):
        plain(top / name, b"no image")
    for name in ("ant/a.avif", "ant/b.avif", "bee/notes.TXT", "bee/LICENSE", "bee/._000.png"):
        plain(top / name, b"no image")
    (top / "bee" / "more").symlink_to(top / "ant")
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    assert len(data.train) + len(data.test) == 10
    noted = notes(caplog)
    for counted in ("3 × hidden folder", "2 × .avif", "1 × linked folder", "and 1 more"):
        assert counted in noted
    assert noted.count("\n") == 0


@pytest.mark.parametrize("ending", ["JPG", "jpe", "jfif", "webp", "gif", "TIFF", "bmp", "Png"])
def test_endings_that_are_read(tmp_path: Path, ending: str) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    kinds = {"jpg": "jpeg", "jpe": "jpeg", "jfif": "jpeg"}
    file = top / "bee" / f"more.{ending}"
    Image.new("RGB", (8, 6)).save(file, kinds.get(ending.lower(), ending.lower()))
    data = load_dataset(f"folder:{top}", data_dir=tmp_path / "data")
    assert len(data.train) + len(data.test) == 11


def test_changes_of_pixels_are_reported_with_and_without_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top = tmp_path / "tree"
    tree(top / "train", 2)
    tree(top / "test", 1)
    colour, ant = noise(6, 8, 3), top / "train" / "ant"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colour).rotate(90, expand=True).save(ant / "a.png", exif=turned)
    clear = Image.fromarray(colour).convert("RGBA")
    clear.save(ant / "b.png")  # opaque
    clear.putpixel((0, 0), (1, 2, 3, 4))
    clear.save(ant / "c.png")
    Image.new("CMYK", (8, 6)).save(ant / "d.jpg")
    frames = [Image.new("L", (8, 6), shade) for shade in (0, 255)]
    frames[0].save(ant / "e.gif", save_all=True, append_images=frames[1:])
    noted = []
    for _ in range(2):
        warn.cache_clear()
        caplog.clear()
        images = load_dataset(f"folder:{top}", data_dir=tmp_path / "data").train.images * 255
        noted.append(notes(caplog))
    upright, opaque = (images[row].round().numpy().transpose(1, 2, 0) for row in (2, 3))
    assert np.array_equal(upright, colour) and np.array_equal(opaque, colour)
    assert images[4][:, 0, 0].round().tolist() == [1, 2, 3]
    assert images[6].max() == 0
    assert noted[0] == noted[1]
    for change in (
        "turned upright, as their EXIF orientation says: 1 of 11 images",
        "transparency dropped, the colour below it kept: 1 of 11 images",
        "converted from CMYK to RGB: 1 of 11 images",
        "only the first of several frames read: 1 of 11 images",
    ):
        assert change in noted[0]


def test_a_pipe_and_a_program_for_a_printer_are_no_images(refusal: Refusal, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    path = top / "ant" / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n")
    refusal(f"folder:{top}", tmp_path, path, "not a readable image")
    path.unlink()
    os.mkfifo(path)
    refusal(f"folder:{top}", tmp_path, path, "not a regular file")


def test_names_that_a_set_cannot_hold_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    tree(top, 5)
    (top / "bee").rename(top / ("b" * 201))
    refusal(f"folder:{top}", tmp_path, top, "class 1 has 201 characters")
    (top / ("b" * 201)).rename(top / "白\u3000猫")
    assert load_dataset(f"folder:{top}", data_dir=tmp_path).classes == ("ant", "白\u3000猫")
